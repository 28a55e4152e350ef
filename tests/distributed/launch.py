"""Two processes over gloo that run named checks, each in all processes at once.

`python -m tests.distributed.launch WORLD FOLDER CHECK…` imports what they need and forks them;
`outcomes` starts it and says of each check "" or what went wrong in which process.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import subprocess
import sys
import traceback
import zlib
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
# A process that waits for another one which will not come gives up, then the parent does.
PATIENCE = timedelta(seconds=40)


def outcomes(checks: Sequence[str], folder: Path, seconds: float, world: int = 2) -> dict[str, str]:
    """{check: "" if it passed in all processes, else why not}; kills what takes longer.

    A check that fails leaves its processes out of step: others begin with the next one.
    """
    found: dict[str, str] = {}
    for attempt in range(len(checks)):
        left = [check for check in checks if check not in found]
        if left:
            own = folder / str(attempt)
            own.mkdir()
            of_left = _run(left, own, seconds, world)
            failed = next((i for i, check in enumerate(left) if of_left[check]), len(left))
            found |= {check: of_left[check] for check in left[: failed + 1]}
    return found


def _run(checks: Sequence[str], folder: Path, seconds: float, world: int) -> dict[str, str]:
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(paths),
        "GLOO_SOCKET_IFNAME": "lo",
    }
    command = [sys.executable, "-m", "tests.distributed.launch", str(world), str(folder), *checks]
    logs = [folder / f"log.{rank}" for rank in range(world)]
    with logs[0].open("w") as file:
        running = subprocess.Popen(
            command, env=environment, stdout=file, stderr=file, start_new_session=True
        )
    try:
        running.wait(seconds)
    except subprocess.TimeoutExpired:
        pass
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(running.pid, signal.SIGKILL)
        running.wait()
    return {check: _why_not(check, folder, logs) for check in checks}


def _why_not(check: str, folder: Path, logs: list[Path]) -> str:
    found = []
    for rank, log in enumerate(logs):
        done = folder / f"{check}.{rank}"
        said = done.read_text() if done.exists() else f"not finished\n{read_end(log)}"
        if said:
            found.append(f"process {rank}: {said}")
    return "\n".join(found)


def read_end(log: Path) -> str:
    return log.read_text()[-4000:] if log.exists() else ""


def fails(_: Path) -> None:
    raise AssertionError("on purpose")


def passes(_: Path) -> None:
    pass


def main(world: int, folder: Path, checks: Sequence[str]) -> None:
    """Imports once what all need; nothing has run by then, and no thread."""
    import torch  # noqa: F401

    for module in {check.split(".")[0] for check in checks}:
        importlib.import_module(f"tests.distributed.{module}")
    children = []
    for rank in range(world):
        children.append(os.fork())
        if children[-1] == 0:
            log = os.open(folder / f"log.{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            run_checks(rank, world, folder, checks)
            os._exit(0)
    for child in children:
        os.waitpid(child, 0)


def run_checks(rank: int, world: int, folder: Path, checks: Sequence[str]) -> None:
    import torch
    from torch import distributed

    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=world,
        timeout=PATIENCE,
    )  # fmt: skip
    for check in checks:
        module, name = check.split(".")
        torch.manual_seed(zlib.crc32(check.encode()))
        own = folder / f"{check}.files"
        own.mkdir(exist_ok=True)
        try:
            getattr(importlib.import_module(f"tests.distributed.{module}"), name)(own)
        except BaseException:
            (folder / f"{check}.{rank}").write_text(traceback.format_exc())
            # The processes are out of step: the others find the connection closed.
            os._exit(1)
        (folder / f"{check}.{rank}").write_text("")
    distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
