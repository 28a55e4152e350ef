"""A frame that follows what happens within it, and the hooks that say when it begins and ends."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fastlora.rows.eagerly import Eagerly
from fastlora.rows.frame import Frame, Place
from fastlora.rows.tracing import Trace


class Opened(Frame):
    """A frame of its own, whose trace begins and ends with it."""

    def __init__(
        self,
        watch: Any,
        module: object,
        rows: tuple[int, ...],
        trace: Trace | None,
        found: dict[int, Place] | None = None,
        keep: Any = None,
        once: bool = False,
    ) -> None:
        super().__init__(watch, module, rows, trace, found)
        self._keep, self.once = keep, once
        self._eagerly = Eagerly()
        if not self.plain:
            self._eagerly.begin()
        if trace is not None:
            trace.open()

    def close(self, output: Any = None) -> None:
        self._eagerly.end()
        trace, self.trace = self.trace, None
        if trace is None:
            return
        trace.close()
        if output is None:
            return
        alike = self.usual and not trace.by_value
        if alike and self._keep:
            self.watch.keep(self._keep, self.found)
        alike = alike and (bool(self._keep) or self.watch.goes_alike())
        self.watch.proved(alike and all(place == (0, 1) for place in self.found.values()))


class Opening:
    def __init__(self, watch: Any) -> None:
        self.watch = watch

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if torch.compiler.is_compiling():
            return
        routing = self.watch.routing
        if routing.slots is None or routing.per_token or _in_backward():
            return
        self.watch.enter(module, args, kwargs)


class Closing:
    def __init__(self, watch: Any) -> None:
        self.watch = watch

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if torch.compiler.is_compiling():
            return
        if self.watch.routing.slots is None or _in_backward():
            return
        self.watch.leave(module, output)


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1
