"""Hooks that say when a module begins and ends."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class EnterHook:
    def __init__(self, watch: Any) -> None:
        self.watch = watch

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if torch.compiler.is_compiling():
            return
        routing = self.watch.routing
        if routing.slots is None or routing.per_token or _is_in_backward():
            return
        self.watch.enter(module, args, kwargs)


class LeaveHook:
    def __init__(self, watch: Any) -> None:
        self.watch = watch

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if torch.compiler.is_compiling():
            return
        if self.watch.routing.slots is None or _is_in_backward():
            return
        self.watch.leave(module, output)


def _is_in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1
