"""Adapters of the rows of PEFT's mixed batches, which PEFT infers from their number alone.

PEFT gives ``adapter_names=`` to every layer; here each layer gets the names of the rows that it
sees, even where PEFT computes it, or raises.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from peft.tuners.lora import layer as lora
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from fastlora.modules.routing import Routing
from fastlora.rows.frame import Place
from fastlora.rows.inputs import count_copies
from fastlora.rows.watch import Watch

_WATCH = "_fastlora_watch"
# Modules that PEFT gives names to.
_NAMED: Any = (lora.LoraLayer, AuxiliaryTrainingWrapper)


class Rows(Routing, threading.local):
    """The names of this thread's batch."""

    watched = True
    advice = "exclude the layer from the adapters, or run each adapter's rows by themselves"

    def __init__(self) -> None:
        super().__init__("give adapter_names to the PEFT model")
        self.names: list[str] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return Rows, ()

    def make_count_error(self, names: int, rows: int) -> Exception:
        return ValueError(
            "Length of `adapter_names` should be the same as the number of inputs, but got "
            f"{names} and {rows} respectively."
        )

    def names_for(self, x: Tensor, layer: nn.Module, names: Sequence[str]) -> list[str]:
        """Returns a name for each index of x's first dimension; RuntimeError where unknown."""
        place = self.find_rows(x, layer)
        if place is None:
            return list(names[:1]) * len(x)
        if isinstance(place, Place):
            rows: Any = range(len(names)) if self.frame is None else self.frame.rows
            if place.dim == 0:
                return [names[int(row)] for row in rows for _ in range(place.copies)]
        elif place.size == place.shape[0]:
            each = place.reshape(-1).tolist()
            return [names[int(row)] for row in each * (len(x) if len(each) == 1 else 1)]
        raise self._make_unknown_error(x, layer, "the batch is not its first dimension")


def watch(model: Any) -> None:
    """Follows the rows of ``model``, a ``peft.LoraModel``, from now on."""
    if _WATCH not in vars(model):
        vars(model)[_WATCH] = Watch(model.model, Rows())


def unwatch(model: Any) -> None:
    watching = vars(model).pop(_WATCH, None)
    if watching is not None:
        watching.remove_hooks()


@contextmanager
def name_rows(model: Any, names: Sequence[str], args: Any, kwargs: Any) -> Iterator[None]:
    """Within, the layers of a watched model get the names of their own rows."""
    watching: Watch = vars(model)[_WATCH]
    rows: Rows = watching.routing
    _check(model, names)
    slots = {name: i for i, name in enumerate(dict.fromkeys(names))}
    handles = [
        module.register_forward_pre_hook(_Naming(rows), with_kwargs=True)
        for module in model.modules()
        if isinstance(module, _NAMED)
    ]
    before, rows.names = rows.names, list(names)
    try:
        copies = count_copies(watching.root, kwargs)
        running = rows.run_batch([slots[name] for name in names], len(slots), copies)
        with running, watching.follow_generate(args, kwargs):
            yield
    finally:
        rows.names = before
        for handle in handles:
            handle.remove()


def _check(model: Any, names: Sequence[str]) -> None:
    """ValueError, as PEFT's, for names of no adapter, and in training mode."""
    if model.training:
        raise ValueError("adapter_names: expected a model in eval mode, this one is in training")
    layers = [module for module in model.modules() if isinstance(module, lora.LoraLayer)]
    known = {name for layer in layers for name in (*layer.lora_A, *layer.lora_embedding_A)}
    unknown = sorted({*names} - known - {"__base__"})
    if unknown:
        raise ValueError(f"adapter_names: non-existing adapter(s): {', '.join(unknown)}")


class _Naming:
    """Gives a layer the names of the rows that it sees, of the batch of the thread that runs it."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows

    def __call__(self, layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        x = args[0] if args else next(iter(kwargs.values()), None)
        names = self.rows.names
        if not isinstance(x, Tensor) or names is None or self.rows.slots is None:
            return None
        return args, kwargs | {"adapter_names": self.rows.names_for(x, layer, names)}
