"""A thread that does one thing after another, for as long as whoever made it is there."""

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
    """Begins with the first task. It lives until the interpreter ends, after other threads have.

    ``ThreadPoolExecutor`` ends before them: who is served then would wait for ever. A forked
    process begins with a thread of its own.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._begin()
        _all.add(self)

    def _begin(self) -> None:
        self._tasks: SimpleQueue[Task | None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._starting, self._process = threading.Lock(), os.getpid()

    def submit(self, work: Callable[..., Any], *args: Any) -> Future[Any]:
        """Does it when all that was asked before is done. Takes no notice of what nobody asks."""
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
        """What ``work`` returns or raises; at once where it is asked in the thread itself."""
        if threading.current_thread() is self._thread:
            return work(*args)
        return self.submit(work, *args).result(timeout)

    def close(self) -> None:
        if self._thread is not None and os.getpid() == self._process:
            self._tasks.put(None)
            self._thread.join()


def _run(tasks: SimpleQueue[Task | None]) -> None:
    while _done(tasks.get()):
        pass


def _done(task: Task | None) -> bool:
    """In a frame of its own: while the thread waits it holds nothing of what it did last."""
    if task is None:
        return False
    future, work, args = task
    try:
        future.set_result(work(*args))
    except BaseException as error:
        future.set_exception(error)
    return True


_all: weakref.WeakSet[Worker] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """A thread within a copy does not survive the interpreter."""
    for worker in list(_all):
        worker.close()
