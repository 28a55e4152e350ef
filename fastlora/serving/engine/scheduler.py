"""Who is in the batch, and whose tokens a step has."""

from __future__ import annotations

from collections.abc import Iterator

from fastlora.serving.engine.job import Job
from fastlora.serving.engine.runner import Chunk


class Scheduler:
    """Rows for ``max_rows`` jobs; the others wait, those first whose adapter is there.

    step_tokens: how many tokens a step has. Every job that writes has one of them, even where those
    are more; prompts share the rest, or one token, in the order in which they came, so that long
    ones are read in parts and nobody who writes waits for more than such a step.
    """

    def __init__(self, max_rows: int, step_tokens: int) -> None:
        self.step_tokens = step_tokens
        self.waiting: list[Job] = []
        self.running: list[Job] = []
        self._free = set(range(max_rows))

    def __iter__(self) -> Iterator[Job]:
        """All jobs, in the order in which they came to where they are."""
        yield from (*self.running, *self.waiting)

    @property
    def idle(self) -> bool:
        """Whether nothing can be done before something comes."""
        return not self.running and not any(job.lent.done() for job in self.waiting)

    def admit(self) -> None:
        """Gives free rows, the lowest first, to those that wait and could run."""
        for job in [job for job in self.waiting if job.lent.done()][: len(self._free)]:
            self.waiting.remove(job)
            job.row = min(self._free)
            self._free.remove(job.row)
            self.running.append(job)

    def leave(self, job: Job) -> int | None:
        """Takes a job out; the row that it had."""
        if job.row is None:
            self.waiting.remove(job)
            return None
        self.running.remove(job)
        self._free.add(job.row)
        return job.row

    def plan(self) -> list[tuple[Job, Chunk]]:
        """The next step, chunks of one token first, in the order of their rows."""
        writing = [job for job in self.running if job.due == 1]
        left = max(self.step_tokens - len(writing), 1)
        plan = [(job, job.chunk(1)) for job in writing]
        for job in self.running:
            if left and job.due > 1:
                plan.append((job, job.chunk(min(job.due, left))))
                left -= len(plan[-1][1].tokens)
        return sorted(plan, key=lambda pair: (len(pair[1].tokens) > 1, pair[1].row))
