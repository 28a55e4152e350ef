"""Fresh processes that begin with torch imported and nothing else: one imports it for all.

``run`` is a ``subprocess.run`` of ``python -c CODE``; a test whose subject is what gets imported,
or how a process starts, asks subprocess itself.
"""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
import tempfile
import traceback
from functools import cache
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 120


def run(code: str, *arguments: object, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Runs code in a process of its own from the repository, with this environment."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    if not hasattr(os, "fork"):
        return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    server, folder = _server()
    task = {"code": code, "arguments": command[2:], "env": env, "out": folder.name}
    server.stdin.write(json.dumps(task) + "\n")
    server.stdin.flush()
    status = int(server.stdout.readline())
    said = [Path(folder.name, name).read_text() for name in ("1", "2")]
    return subprocess.CompletedProcess(command, os.waitstatus_to_exitcode(status), *said)


@cache
def _server() -> tuple[subprocess.Popen[str], tempfile.TemporaryDirectory[str]]:
    """Started by the first that asks; ends with this process."""
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.support.forks"],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},  # a fork has none of the others' threads
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    atexit.register(server.kill)
    return server, tempfile.TemporaryDirectory()


def _serve(tasks: IO[str], answers: IO[str]) -> None:
    import torch  # noqa: F401

    for line in tasks:
        child = os.fork()
        if child == 0:
            _run(**json.loads(line))
        _, status = os.waitpid(child, 0)
        answers.write(f"{status}\n")
        answers.flush()


def _run(code: str, arguments: list[str], env: dict[str, str], out: str) -> None:
    import signal

    signal.alarm(SECONDS)
    for stream in (1, 2):
        os.dup2(os.open(f"{out}/{stream}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    for name in set(os.environ) - set(env):
        del os.environ[name]
    os.environ.update(env)
    sys.argv = arguments
    status = 0
    try:
        exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    _serve(sys.stdin, os.fdopen(os.dup(1), "w"))
