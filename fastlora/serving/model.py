"""``MultiLoRAModel``: one base model, many adapters, any mix of them in one batch."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastlora import adapter_files as files
from fastlora.checkpoint import adapter_shapes
from fastlora.config import LoRAConfig, check_rank
from fastlora.injection import swap
from fastlora.multi_modules import MultiLoRALinear
from fastlora.routing import Routing
from fastlora.targets import plan
from fastlora.wrapping import is_linear, unwrapped

BASE = "__base__"
_BATCH_INPUTS = ("input_ids", "inputs_embeds", "inputs")
_EXPERT = re.compile(r"(^|\.)experts?(\.|$)")


class MultiLoRAModel(nn.Module):
    """A model whose linears hold ``max_adapters`` slots of rank ``max_rank``, allocated up front.

    model: any batch-first torch model, changed in place: the linears that target_modules names (as
    in ``LoRAConfig``) become ``MultiLoRALinear`` around the same weights. lora_dtype: of the slots,
    default the weights'. Inference only: calls run without gradients.

    Raises ValueError, the model unchanged, when nothing matches or a named layer cannot serve:
    besides what ``replace_linear`` refuses, experts of a mixture, whose rows are not the batch's.
    """

    def __init__(
        self,
        model: nn.Module,
        max_adapters: int = 8,
        max_rank: int = 16,
        target_modules: str | Sequence[str] = "all-linear",
        *,
        exclude_modules: str | Sequence[str] | None = None,
        lora_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_rank("max_adapters", max_adapters)
        check_rank("max_rank", max_rank)
        names = [
            n if isinstance(n, str) or n is None else tuple(n)
            for n in (target_modules, exclude_modules)
        ]
        chosen = plan(model, LoRAConfig(target_modules=names[0], exclude_modules=names[1]))
        experts = [name for name in chosen.linears if _EXPERT.search(name)]
        if experts:
            raise ValueError(
                f"target_modules: {experts[0]} is an expert: its rows are routed tokens, which "
                "cannot be told apart by adapter; leave experts out with exclude_modules"
            )
        self.max_adapters, self.max_rank = max_adapters, max_rank
        self._slots: dict[str, int] = {}
        self._batch = _Batch("call the MultiLoRAModel, not the model in it")
        layers = {
            name: MultiLoRALinear.from_linear(linear, max_adapters, max_rank, lora_dtype)
            for name, (linear, _) in chosen.linears.items()
        }
        for name, layer in layers.items():
            layer.routing = self._batch.groups_for
            swap(model, chosen.linears[name][1], layer)
        self.model = model
        self.skipped = chosen.skipped
        self._layers = layers

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the loaded adapters."""
        return tuple(self._slots)

    def load_adapter(self, directory: str | os.PathLike[str], adapter_name: str) -> None:
        """Loads PEFT's files from ``directory`` into a slot; a name loaded already is replaced.

        Raises ValueError or FileNotFoundError, nothing changed, as ``fastlora.load_adapter`` does,
        and for a rank above max_rank, a layer that is not served, lora_bias and trained biases,
        modules_to_save, or an init_lora_weights that has split the base's weights;
        RuntimeError when every slot is taken.
        """
        files.check_name(adapter_name)
        if adapter_name == BASE:
            raise ValueError(f"adapter_name: {BASE!r} means the base model")
        config = files.read_config(directory)
        targeted = self._targeted(config)
        tensors = files.read_tensors(
            directory,
            {
                key: shape
                for name, layer in self._layers.items()
                if name in targeted
                for key, shape in adapter_shapes(name, layer.matrix, config).items()
            },
        )
        slot = self._slots.get(adapter_name)
        if slot is None:
            slot = self._free_slot()
        for name, layer in self._layers.items():
            if name in targeted:
                A, B = tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"]
                layer.set_adapter(slot, A, B, config.scaling_of(name))
            else:
                layer.clear_adapter(slot)
        self._slots[adapter_name] = slot

    def unload_adapter(self, adapter_name: str) -> None:
        """Frees the adapter's slot and zeroes it; ValueError when the name is not loaded."""
        slot = self._slot(adapter_name)
        del self._slots[adapter_name]
        for layer in self._layers.values():
            layer.clear_adapter(slot)

    @torch.no_grad()
    def forward(self, *args: Any, adapter_names: Sequence[str | None], **kwargs: Any) -> Any:
        """``model(*args, **kwargs)``, row i through ``adapter_names[i]``, without gradients.

        None and ``"__base__"`` name the base model. The batch is the first dimension of
        ``input_ids``, ``inputs_embeds`` or ``inputs``, else of the first tensor.

        Raises TypeError when the names are no list, ValueError for an unknown one, or when they are
        not one a row of the batch.
        """
        with self._routed(adapter_names, args, kwargs):
            return self.model(*args, **kwargs)

    @torch.no_grad()
    def generate(self, *args: Any, adapter_names: Sequence[str | None], **kwargs: Any) -> Any:
        """``model.generate(*args, **kwargs)`` with an adapter a row, beams and samples included.

        Rows, names and errors as in ``forward``; beams and returned sequences are their row's.
        """
        generation = kwargs.get("generation_config") or getattr(
            unwrapped(self.model), "generation_config", None
        )
        copies = [
            kwargs.get(name) or getattr(generation, name, None) or 1
            for name in ("num_beams", "num_return_sequences")
        ]
        with self._routed(adapter_names, args, kwargs, max(copies)):
            return self.model.generate(*args, **kwargs)  # pyright: ignore[reportCallIssue]

    @contextmanager
    def _routed(
        self,
        adapter_names: Sequence[str | None],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        copies: int = 1,
    ) -> Iterator[None]:
        if isinstance(adapter_names, str) or not isinstance(adapter_names, Sequence):
            raise TypeError(
                f"adapter_names: expected a list with a name a row, got {adapter_names!r}"
            )
        rows = _batch_size(args, kwargs)
        if len(adapter_names) != rows:
            raise ValueError(f"adapter_names: expected {rows}, one a row, got {len(adapter_names)}")
        slots = [-1 if name in (None, BASE) else self._slot(name) for name in adapter_names]
        with self._batch.running(slots, self.max_adapters, copies):
            yield

    def _slot(self, name: object) -> int:
        if not isinstance(name, str) or name not in self._slots:
            loaded = ", ".join(self._slots) or "none"
            raise ValueError(f"adapter_names: no adapter {name!r} is loaded (loaded: {loaded})")
        return self._slots[name]

    def _free_slot(self) -> int:
        taken = set(self._slots.values())
        free = [slot for slot in range(self.max_adapters) if slot not in taken]
        if not free:
            raise RuntimeError(f"all {self.max_adapters} adapter slots are taken: unload one first")
        return free[0]

    def _targeted(self, config: LoRAConfig) -> set[str]:
        """The served layers that an adapter is for, checked against its config."""
        config.check_plain("of adapters served beside each other none")
        layers = self._layers.keys()
        linears = {n for n, m in unwrapped(self.model).named_modules() if is_linear(m)}
        named = {name for name in linears if config.names(name)}
        if config.all_linear:
            named &= layers
        if not named or not named <= layers:
            found = ", ".join(sorted(named - layers)[:4]) or "no layer at all"
            raise ValueError(
                f"target_modules: the adapter is for {found}, which is not served here"
            )
        for name in named:
            if config.rank_of(name) > self.max_rank:
                raise ValueError(
                    f"{name}: expected a rank of at most {self.max_rank}, got "
                    f"{config.rank_of(name)}"
                )
        return named


class _Batch(Routing, threading.local):
    """The batch that this thread is running."""

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy of the model runs no batch; thread-local state cannot be copied anyway.
        return _Batch, (self.outside,)


def _batch_size(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    named = [kwargs[name] for name in _BATCH_INPUTS if isinstance(kwargs.get(name), Tensor)]
    for value in (*named, *args, *kwargs.values()):
        if isinstance(value, Tensor) and value.dim():
            return value.shape[0]
    raise ValueError("inputs: expected a tensor whose first dimension is the batch")
