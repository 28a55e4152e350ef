"""What the demo asserts: a sentence, the figures measured for it, and whether they bear it out."""

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
    """Every claim of a demo, in the order in which it was put to the test."""

    made: list[Claim] = field(default_factory=list)

    def check(self, sentence: str, holds: bool, figures: str, *, counts: bool = True) -> None:
        """Writes down whether ``sentence`` holds by ``figures``."""
        self.made.append(Claim(sentence, figures, bool(holds), counts))

    @property
    def failed(self) -> list[Claim]:
        """The claims that count and do not hold."""
        return [claim for claim in self.made if claim.counts and not claim.holds]

    @property
    def exit_code(self) -> int:
        """0 when every claim that counts holds, and there is one; else 1."""
        return int(bool(self.failed) or not any(claim.counts for claim in self.made))
