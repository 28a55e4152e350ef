"""Claims of the demo: a sentence, the figures measured for it, and whether they confirm it."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Claim:
    """One sentence with its figures. counts=False: shown, but the exit code ignores it."""

    sentence: str
    figures: str
    holds: bool
    counts: bool = True


@dataclass
class Claims:
    """Claims of a demo, in the order in which they were tested."""

    every: list[Claim] = field(default_factory=list)

    def check(self, sentence: str, holds: bool, figures: str, *, counts: bool = True) -> None:
        """Adds a claim: whether ``sentence`` holds by ``figures``."""
        self.every.append(Claim(sentence, figures, bool(holds), counts))

    @property
    def failed(self) -> list[Claim]:
        """The claims that count and do not hold."""
        return [claim for claim in self.every if claim.counts and not claim.holds]

    @property
    def exit_code(self) -> int:
        """0 when every claim that counts holds, and there is one; else 1."""
        return int(bool(self.failed) or not any(claim.counts for claim in self.every))
