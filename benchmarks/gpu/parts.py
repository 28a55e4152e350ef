"""Parts of a long run, each in a process of its own, so that a hang or failure stays its own.

They begin in their order, side by side while there are cores. Each part's state is in a file of
JSON lines as soon as it is known, and a later run goes on from there.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from benchmarks import ROOT
from benchmarks.gpu import ending

OK, FAILED, TIMEOUT, STOPPED = "ok", "failed", "timeout", "interrupted"
NOT_BEGUN, NOT_APPLICABLE = "not begun", "not applicable"
BAD = (FAILED, TIMEOUT, STOPPED)

_POLL = 0.05
_SHOWN = 12  # last lines of a failed part's log


def explain_nothing() -> None:
    """Returns None: the ``missing`` of a part that always applies."""


@dataclass(frozen=True)
class Part:
    """One command. "{deadline}" in it becomes the seconds that it has, at most ``seconds``.

    It is killed ``grace`` seconds later, and not begun with less than ``least`` remaining. cores:
    how many it keeps busy; None for a part that measures times, which runs alone. after: parts that
    must have ended before. missing: says why the part does not apply, asked at its turn. again:
    begun in every run, since the command itself skips what is done. document: its output is a
    result, written to <name>.md.
    """

    name: str
    command: tuple[str, ...]
    seconds: float
    grace: float = 15.0
    least: float = 10.0
    cores: int | None = 1
    after: tuple[str, ...] = ()
    missing: Callable[[], str | None] = explain_nothing
    again: bool = False
    document: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass
class _Running:
    part: Part
    process: subprocess.Popen[bytes]
    mark: str
    began: float
    limit: float


class Run:
    """Run of the parts. ``states``: a line for each part whose state is known, by name."""

    def __init__(
        self,
        parts: Sequence[Part],
        folder: Path,
        identity: Mapping[str, Any],
        *,
        seconds: float = math.inf,
        cores: int | None = None,
        again: bool = False,
        say: Callable[[str], None] = print,
    ) -> None:
        """folder: of states, logs, documents. identity: what must be the same for an earlier "ok"
        to hold. seconds: after which all has ended. cores: default all. again: forgets what is ok.
        """
        self._waiting, self._folder, self._identity = list(parts), folder, dict(identity)
        self._seconds, self._say = seconds, say
        self._cores = cores or os.cpu_count() or 1
        self._running: list[_Running] = []
        self._file = folder / "run" / "parts.jsonl"
        self._file.parent.mkdir(parents=True, exist_ok=True)
        known = [] if again else read(self._file)
        self._known = {line["part"]: line for line in known if line["of"] == self._identity}
        self.states: dict[str, dict[str, Any]] = {}

    def __call__(self) -> dict[str, dict[str, Any]]:
        """Runs the parts. On KeyboardInterrupt ends and notes those that run, and raises it."""
        self._began = time.monotonic()
        try:
            while self._waiting or self._running:
                self._reap()
                while self._waiting and self._is_next(self._waiting[0]):
                    self._begin(self._waiting.pop(0))
                time.sleep(_POLL)
        except BaseException:
            self._stop()
            raise
        return self.states

    @property
    def _remaining(self) -> float:
        return self._seconds - (time.monotonic() - self._began)

    def _is_next(self, part: Part) -> bool:
        """Whether the part can begin beside those that run, or its state is known already."""
        names = {each.part.name for each in self._running}
        if names.intersection(part.after):
            return False
        if not names or self._find_state(part) is not None:
            return True
        used = [each.part.cores for each in self._running]
        if part.cores is None or None in used:
            return False
        return sum(n or 0 for n in used) + part.cores <= self._cores

    def _find_state(self, part: Part) -> dict[str, Any] | None:
        """Returns the part's state if it is known without beginning it."""
        earlier = self._known.get(part.name)
        if earlier is not None and earlier["state"] == OK and not part.again:
            return earlier
        reason = part.missing()
        if reason is not None:
            return {"state": NOT_APPLICABLE, "reason": reason}
        if self._remaining < part.least:
            return {"state": NOT_BEGUN, "reason": "out of time"}
        return None

    def _begin(self, part: Part) -> None:
        settled = self._find_state(part)
        if settled is not None:
            self._note(part, settled)
            return
        room = min(part.seconds, max(1.0, self._remaining - part.grace))
        command = [word.replace("{deadline}", f"{room:.0f}") for word in part.command]
        mark = ending.new_mark()
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", **part.environment, ending.MARK: mark}
        with self._log(part).open("wb") as log, self._output(part).open("wb") as output:
            try:
                process = subprocess.Popen(
                    command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL,
                    stdout=output if part.document else log, stderr=log, start_new_session=True,
                )  # fmt: skip
            except OSError as error:
                self._note(part, {"state": FAILED, "reason": f"{command[0]}: {error}"})
                return
        self._say(f"{self._clock()} begun: {part.name}")
        limit = min(part.seconds + part.grace, self._remaining)
        self._running.append(_Running(part, process, mark, time.monotonic(), limit))

    def _reap(self) -> None:
        for each in list(self._running):
            code = each.process.poll()
            late = time.monotonic() - each.began > each.limit
            if code is None and not late:
                continue
            self._running.remove(each)
            gone = ending.end([(each.process, each.mark)])
            if code is None:
                reason = f"killed after {each.limit:.0f} s" + ("" if gone else ", and lives on")
                state = {"state": TIMEOUT, "reason": reason}
            else:
                state = {"state": OK if code == 0 else FAILED, "reason": _describe_exit(code)}
            self._finish(each, state)

    def _finish(self, each: _Running, state: dict[str, Any]) -> None:
        part, output = each.part, self._output(each.part)
        if part.document and state["state"] == OK:
            about = ", ".join(f"{name} {value}" for name, value in self._identity.items())
            heading = f"`python3 {' '.join(part.command[1:])}`, {_format_now()}, {about}\n\n"
            text = heading + output.read_text(errors="replace")
            (self._folder / f"{part.name}.md").write_text(text)
        output.unlink(missing_ok=True)
        self._note(part, {**state, "seconds": round(time.monotonic() - each.began, 1)})
        if state["state"] in BAD:
            tail = self._log(part).read_text(errors="replace").strip().splitlines()[-_SHOWN:]
            self._say("\n".join(f"    {line}" for line in tail))

    def _stop(self) -> None:
        """Ends and notes what runs; notes what waits as not begun."""
        ending.end([(each.process, each.mark) for each in self._running])
        for each in self._running:
            self._finish(each, {"state": STOPPED, "reason": "the run was ended"})
        self._running.clear()
        for part in self._waiting:
            self._note(part, {"state": NOT_BEGUN, "reason": "the run was ended"})
        self._waiting.clear()

    def _note(self, part: Part, state: dict[str, Any]) -> None:
        """Writes the state to the file at once: the run may be cut short."""
        line = state
        if "part" not in line:
            line = {"part": part.name, **state, "when": _format_now(), "of": self._identity}
            self._known[part.name] = line
            _write(self._file, self._known.values())
        else:
            line = {**line, "reason": "in an earlier run"}
        self.states[part.name] = line
        seconds = f", {line['seconds']:.0f} s" if "seconds" in line else ""
        reason = f": {line['reason']}" if line.get("reason") else ""
        self._say(f"{self._clock()} {line['state']}: {part.name}{seconds}{reason}")

    def _clock(self) -> str:
        return f"[{time.monotonic() - self._began:4.0f} s]"

    def _log(self, part: Part) -> Path:
        return self._file.with_name(f"{part.name}.log")

    def _output(self, part: Part) -> Path:
        return self._file.with_name(f"{part.name}.out")


def read(file: Path) -> list[dict[str, Any]]:
    """Reads the lines of an earlier run, without damaged ones."""
    lines = []
    for text in file.read_text(errors="replace").splitlines() if file.exists() else ():
        with suppress(ValueError):
            line = json.loads(text)
            if isinstance(line, dict) and {"part", "state", "of"} <= line.keys():
                lines.append(line)
    return lines


def summarize(states: Mapping[str, Mapping[str, Any]]) -> str:
    """Writes a line for each state, with its parts."""
    by_state: dict[str, list[str]] = {}
    for name, line in states.items():
        by_state.setdefault(line["state"], []).append(name)
    order = (OK, *BAD, NOT_APPLICABLE, NOT_BEGUN)
    return "\n".join(f"{s}: {', '.join(by_state[s])}" for s in order if s in by_state)


def _write(file: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    new = file.with_suffix(".new")
    with new.open("w") as out:
        out.writelines(json.dumps(line) + "\n" for line in lines)
        out.flush()
        os.fsync(out.fileno())
    os.replace(new, file)


def _describe_exit(code: int) -> str | None:
    if code == 0:
        return None
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def _format_now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
