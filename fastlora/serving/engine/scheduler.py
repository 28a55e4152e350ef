"""Which requests are in the batch, and which tokens a step has."""

from __future__ import annotations

from collections.abc import Iterator

from fastlora.serving.engine.job import Job
from fastlora.serving.engine.runner import Chunk


class Scheduler:
    """Rows for ``max_rows`` jobs; the others wait, and those whose adapter is there come first.

    step_tokens: how many tokens a step has. Every job that writes has one of them, even where those
    are more; prompts share the others, or one token, in the order in which they came. So long
    prompts are read in parts, and no job that writes waits for more than such a step.
    """

    def __init__(self, max_rows: int, step_tokens: int) -> None:
        self.step_tokens = step_tokens
        self.waiting: list[Job] = []
        self.running: list[Job] = []
        self._free = set(range(max_rows))

    def __iter__(self) -> Iterator[Job]:
        """Yields all jobs: first those that run, then those that wait."""
        yield from (*self.running, *self.waiting)

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to do before something comes."""
        return not self.running and not any(job.lease.done() for job in self.waiting)

    def admit(self) -> None:
        """Gives free rows, the lowest first, to jobs that wait and whose adapter is there."""
        for job in [job for job in self.waiting if job.lease.done()][: len(self._free)]:
            self.waiting.remove(job)
            job.row = min(self._free)
            self._free.remove(job.row)
            self.running.append(job)

    def leave(self, job: Job) -> int | None:
        """Takes a job out; returns the row that it had."""
        if job.row is None:
            self.waiting.remove(job)
            return None
        self.running.remove(job)
        self._free.add(job.row)
        return job.row

    def plan(self) -> list[tuple[Job, Chunk]]:
        """Plans the next step: chunks of one token first, in the order of their rows."""
        writing = [job for job in self.running if job.due == 1]
        room = max(self.step_tokens - len(writing), 1)
        plan = [(job, job.next_chunk(1)) for job in writing]
        for job in self.running:
            if room and job.due > 1:
                plan.append((job, job.next_chunk(min(job.due, room))))
                room -= len(plan[-1][1].tokens)
        return sorted(plan, key=lambda pair: (len(pair[1].tokens) > 1, pair[1].row))
