"""A frame that follows what happens from when it is opened to when it is closed."""

from __future__ import annotations

from typing import Any

from fastlora.rows.eager_stance import EagerStance
from fastlora.rows.frame import Frame, Place
from fastlora.rows.tracing import Trace


class OuterFrame(Frame):
    """A frame that no other is around: its trace begins and ends with it."""

    def __init__(
        self,
        watch: Any,
        module: object,
        rows: tuple[int, ...],
        trace: Trace | None,
        places: dict[int, Place] | None = None,
        keep: Any = None,
        once: bool = False,
    ) -> None:
        super().__init__(watch, module, rows, trace, places)
        self._keep, self.once = keep, once
        self._eager_stance = EagerStance()
        if not self.plain:
            self._eager_stance.begin()
        if trace is not None:
            trace.open()

    def close(self, output: Any = None) -> None:
        self._eager_stance.end()
        trace, self.trace = self.trace, None
        if trace is None:
            return
        trace.close()
        if output is None:
            return
        is_repeatable = self.is_repeatable and not trace.by_value
        if is_repeatable and self._keep:
            self.watch.verdicts.keep(self._keep, self.places)
        is_repeatable = is_repeatable and (
            bool(self._keep) or self.watch.verdicts.are_alike_when_compiled()
        )
        self.watch.note_first(
            is_repeatable and all(place == (0, 1) for place in self.places.values())
        )
