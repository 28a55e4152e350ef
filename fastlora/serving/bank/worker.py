"""A thread that does one task after another, for as long as its ``Worker`` is referenced."""

from __future__ import annotations

import atexit
import os
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any

Task = tuple[Future[Any], Callable[..., Any], tuple[Any, ...]]


class Worker:
    """A thread that begins with the first task, and ends after the interpreter's other threads.

    ``ThreadPoolExecutor`` ends before them: a thread that waits for a task then would wait for
    ever. A forked process begins with its own thread.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._begin()
        _workers.add(self)

    def _begin(self) -> None:
        self._tasks: SimpleQueue[Task | None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._starting, self._process = threading.Lock(), os.getpid()

    def submit(self, work: Callable[..., Any], *args: Any) -> Future[Any]:
        """Queues a task; the future has what it returns or raises."""
        if os.getpid() != self._process:
            self._begin()
        future: Future[Any] = Future()
        self._tasks.put((future, work, args))
        with self._starting:
            if self._thread is None:
                self._thread = threading.Thread(
                    target=_run, args=(self._tasks,), name=self._name, daemon=True
                )
                self._thread.start()
                weakref.finalize(self, self._tasks.put, None).atexit = False
        return future

    def wait_for(self, work: Callable[..., Any], *args: Any, timeout: float | None = None) -> Any:
        """Returns or raises what ``work`` does; in the thread itself it is done at once."""
        if threading.current_thread() is self._thread:
            return work(*args)
        return self.submit(work, *args).result(timeout)

    def close(self) -> None:
        if self._thread is not None and os.getpid() == self._process:
            self._tasks.put(None)
            self._thread.join()


def _run(tasks: SimpleQueue[Task | None]) -> None:
    while _do(tasks.get()):
        pass


def _do(task: Task | None) -> bool:
    """Does a task, in its own frame: the thread holds nothing of it while it waits for the next."""
    if task is None:
        return False
    future, work, args = task
    try:
        future.set_result(work(*args))
    except BaseException as error:
        future.set_exception(error)
    return True


_workers: weakref.WeakSet[Worker] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """A thread within a copy does not survive the interpreter."""
    for worker in list(_workers):
        worker.close()
