"""Linear layers with several adapters on one weight: served from slots, or trained side by side."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as nnf

from fastlora import config as settings
from fastlora import functional as F
from fastlora.config.listing import list_some
from fastlora.inspection.layers import choose_lora_dtype
from fastlora.inspection.wrappers import strip_wrappers, unwrap
from fastlora.modules.init import init_lora
from fastlora.modules.linear import check_drawn
from fastlora.modules.routing import Routing
from fastlora.modules.shared_weight import SharedWeight
from fastlora.ops.invariance import asked
from fastlora.rows.statements import Statement


class MultiLoRALinear(SharedWeight):
    """A frozen linear or ``Conv1D`` and S slots of adapters; each row's id names its slot.

    Made by ``from_linear``. Buffers, not in the state_dict: lora_A (S, R, in_features), lora_B (S,
    out_features, R), scalings (S,) float32, ranks (S,) int32, zero while a slot is free.
    ``routing`` gives the rows' ids where the caller of the model cannot pass them to the layer.
    """

    lora_A: Tensor
    lora_B: Tensor
    scalings: Tensor
    ranks: Tensor
    routing: Callable[[Tensor], F.RowGroups] | None

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        max_adapters: int,
        max_rank: int,
        lora_dtype: torch.dtype | None = None,
    ) -> MultiLoRALinear:
        """A layer around ``linear``'s weight and bias, with S = max_adapters slots of R = max_rank.

        lora_dtype: of the slots; None is the weight's. Raises TypeError for anything that is not a
        plain ``nn.Linear``, TypeError or ValueError for sizes that are not positive integers.
        """
        settings.check_rank("max_adapters", max_adapters)
        settings.check_rank("max_rank", max_rank)
        layer = cls.around(linear)
        S, R, weight = max_adapters, max_rank, layer.weight
        zeros = {
            "device": weight.device,
            "dtype": choose_lora_dtype(weight.dtype, lora_dtype or weight.dtype),
        }
        buffers = {
            "lora_A": torch.zeros(S, R, layer.in_features, **zeros),
            "lora_B": _rank_major(torch.zeros(S, layer.out_features, R, **zeros)),
            "scalings": torch.zeros(S, device=weight.device, dtype=torch.float32),
            "ranks": torch.zeros(S, device=weight.device, dtype=torch.int32),
        }
        for name, buffer in buffers.items():
            layer.register_buffer(name, buffer, persistent=False)
        layer.routing = None
        return layer

    def forward(self, input: Tensor, adapter_ids: Tensor | F.RowGroups | None = None) -> Tensor:
        """input (T, K) with ids (T,), or (B, ..., K) with ids (B,), to (..., N).

        ids: int32 or int64, the slot of each row, -1 = none; by default ``routing``'s, without
        which RuntimeError is raised. Other errors as in ``functional.multi_lora_linear``.
        """
        if adapter_ids is None:
            if self.routing is None:
                raise RuntimeError(
                    "adapter_ids: expected ids or row groups, the layer has no routing"
                )
            adapter_ids = self.routing(input)
        return F.multi_lora_linear(
            input,
            self.matrix,
            self.lora_A,
            self.lora_B,
            adapter_ids,
            self.scalings,
            bias=self.bias,
            ranks=self.ranks,
        )

    @torch.no_grad()
    def set_adapter(self, slot: int, lora_A: Tensor, lora_B: Tensor, scaling: float) -> None:
        """Puts an adapter (r, K), (N, r), r at most the slots' rank, into ``slot``.

        Raises TypeError or ValueError, the slot as it was, for what does not fit.
        """
        self._check_slot(slot)
        settings.check_number("scaling", scaling)
        if abs(scaling) > torch.finfo(torch.float32).max:
            raise ValueError(f"scaling: expected a number that float32 holds, got {scaling}")
        _check_factor("lora_A", lora_A)
        _check_factor("lora_B", lora_B)
        (_, R, K), N = self.lora_A.shape, self.lora_B.shape[1]
        r = lora_A.shape[0] if lora_A.dim() == 2 else -1
        if tuple(lora_A.shape) != (r, K) or r > R:
            raise ValueError(
                f"lora_A: expected shape (r, {K}), r at most {R}, got {tuple(lora_A.shape)}"
            )
        if tuple(lora_B.shape) != (N, r):
            raise ValueError(f"lora_B: expected shape ({N}, {r}), got {tuple(lora_B.shape)}")
        # Copies, made before the slot is emptied: they may be views of it.
        lora_A, lora_B = (t.to(self.lora_A, copy=True) for t in (lora_A, lora_B))
        self.clear_adapter(slot)
        self.lora_A[slot, :r] = lora_A
        self.lora_B[slot, :, :r] = lora_B
        self.scalings[slot] = scaling
        self.ranks[slot] = r

    @torch.no_grad()
    def clear_adapter(self, slot: int) -> None:
        """Frees ``slot``: what it held is zeroed. Raises TypeError or ValueError for no slot."""
        self._check_slot(slot)
        for buffer in (self.ranks, self.scalings, self.lora_A, self.lora_B):
            buffer[slot] = 0

    def _check_slot(self, slot: int) -> None:
        if not isinstance(slot, int) or isinstance(slot, bool):
            raise TypeError(f"slot: expected an int, got {type(slot).__name__}")
        if not 0 <= slot < len(self.scalings):
            raise ValueError(f"slot: expected one of 0 to {len(self.scalings) - 1}, got {slot}")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MultiLoRALinear:
        scalings = self.scalings
        super()._apply(fn, recurse)
        if self.scalings.dtype != scalings.dtype:
            # float32 whatever the weights become.
            self.scalings = scalings.to(self.scalings.device)
        self.lora_B = _rank_major(self.lora_B)
        return self

    def extra_repr(self) -> str:
        S, R = self.lora_A.shape[:2]
        return f"{super().extra_repr()}, max_adapters={S}, max_rank={R}"


def _check_factor(name: str, factor: object) -> None:
    if not isinstance(factor, Tensor) or not factor.is_floating_point():
        kind = factor.dtype if isinstance(factor, Tensor) else type(factor).__name__
        raise TypeError(f"{name}: expected a tensor of floats, got {kind}")
    if factor.is_meta or factor.layout != torch.strided:
        found = f"{factor.layout} on {factor.device}"
        raise TypeError(f"{name}: expected a dense tensor that has values, got {found}")


def _rank_major(lora_B: Tensor) -> Tensor:
    """lora_B (S, N, R) as its kernels read it best: on a GPU a rank's columns lie together."""
    return lora_B.mT.contiguous().mT if lora_B.is_cuda else lora_B.contiguous()


class TrainingRows(Routing):
    """Whose each row of the batch in training is; only adapters that are present get a slot.

    One thread's at a time: backward runs in threads of its own, which must see it too.
    """

    watched = recomputes = True

    def __init__(self, adapters: Sequence[str]) -> None:
        super().__init__("run the model, and its backward, within fastlora.use_adapters")
        self.adapters = tuple(adapters)
        self.present: tuple[int, ...] = ()
        # The layers that ran in this block; the block's thread, while there is one.
        self.ran: set[int] = set()
        self.owner: int | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy of the model runs no batch.
        return TrainingRows, (self.adapters,)

    @contextmanager
    def named(
        self,
        adapter_names: Sequence[str | None],
        everywhere: Callable[[list[bool]], list[bool]] = list,
        stated: Mapping[int, Statement] | None = None,
    ) -> Iterator[None]:
        """Within, row i of the batch trains ``adapter_names[i]``, or none.

        everywhere: which adapters other processes have rows of, of which we have. stated: whose the
        rows of modules are, by the modules' ids.
        """
        rows = [-1 if name is None else self.index(name) for name in adapter_names]
        if self.owner not in (None, threading.get_ident()):
            raise RuntimeError("use_adapters: another thread is in such a block of this model")
        before = self.present, self.ran, self.owner
        ran: set[int] = set()
        present = everywhere([i in rows for i in range(len(self.adapters))])
        self.present, self.ran = tuple(i for i, here in enumerate(present) if here), ran
        self.owner = threading.get_ident()
        slot = {row: i for i, row in enumerate(self.present)}
        try:
            slots = [slot.get(row, -1) for row in rows]
            with self.running(slots, len(slot), stated=stated):
                yield
                if self.ran is not ran:
                    raise RuntimeError("use_adapters: its blocks were left in another order")
        finally:
            self.present, self.ran, self.owner = before

    def check(self, layer: nn.Module) -> None:
        """Refuses a layer that runs again, in a backward, in a block that is not its forward's."""
        if torch.compiler.is_compiling() or self.slots is None:
            return
        if torch._C._current_graph_task_id() == -1:
            self.ran.add(id(layer))
        elif id(layer) not in self.ran:
            raise RuntimeError(f"these are not the rows of its forward: {self.outside}")

    def index(self, name: object) -> int:
        """Where ``name`` stands among the adapters; ValueError where it does not."""
        if name not in self.adapters:
            known = list_some(self.adapters, 8)
            raise ValueError(f"adapter_names: expected one of {known}, got {name!r}")
        return self.adapters.index(str(name))


class TrainableMultiLoRALinear(SharedWeight):
    """A frozen linear and several adapters in training; a batch's rows each belong to one.

    Parameters: lora_A and lora_B, (r, in_features) and (out_features, r) for each adapter under its
    name, in which "." is "%2E". Those that no row of a batch uses take no part in it: their
    gradients stay None. ``routing``, which all layers of a model share, says whose each row is.
    Arithmetic as ``FastLoRALinear``'s; dropout is torch's own and draws a mask of x.
    """

    bias: nn.Parameter | None
    lora_A: nn.ParameterDict
    lora_B: nn.ParameterDict
    routing: TrainingRows
    r: int
    lora_alpha: float
    lora_dropout: float
    scaling: float
    adapter_disabled: bool

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        routing: TrainingRows,
        r: int = 8,
        *,
        lora_alpha: float = 8,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        init_lora_weights: bool | str = True,
        lora_dtype: torch.dtype | None = None,
    ) -> TrainableMultiLoRALinear:
        """Shares ``linear``'s weight; ``routing`` names the adapters, each has its own draw.

        Options and errors as FastLoRALinear's.
        """
        settings.check_layer(r, lora_alpha, lora_dropout)
        check_drawn(init_lora_weights)
        layer = cls.around(linear)
        layer.r, layer.lora_alpha, layer.lora_dropout = r, lora_alpha, float(lora_dropout)
        layer.scaling = settings.compute_scaling(lora_alpha, r, use_rslora)
        layer.adapter_disabled = False
        layer.routing = routing
        base = layer.matrix
        kind = {"device": base.device, "dtype": choose_lora_dtype(base.dtype, lora_dtype)}
        N, K = base.shape
        keys = [_key(name) for name in routing.adapters]
        layer.lora_A = nn.ParameterDict({key: torch.empty(r, K, **kind) for key in keys})
        layer.lora_B = nn.ParameterDict({key: torch.empty(N, r, **kind) for key in keys})
        for key in keys:
            init_lora(layer.lora_A[key], layer.lora_B[key], init_lora_weights)
        return layer

    def forward(self, input: Tensor) -> Tensor:
        """input (..., in_features), whose rows the routing knows, to (..., out_features)."""
        if self.adapter_disabled:
            return F.base_linear(input, self.matrix, self.bias)
        self.routing.check(self)
        rows = self.routing.whose(input, self)
        present = [_key(self.routing.adapters[i]) for i in self.routing.present]
        # Invariant, rows of none have the bits that they have beside others: by the same op.
        if not present and not asked():
            return F.base_linear(input, self.matrix, self.bias)
        groups = self.routing.groups_of(rows, input)
        lora_A, lora_B = _stacked(self.lora_A, present), _stacked(self.lora_B, present)
        scalings = input.new_full((len(present),), self.scaling, dtype=torch.float32)
        factors = (lora_A, lora_B, groups, scalings)
        if not (self.training and self.lora_dropout):
            return F.multi_lora_linear(input, self.matrix, *factors, bias=self.bias)
        y = F.base_linear(input, self.matrix, self.bias)
        return F.multi_lora_add_(y, nnf.dropout(input, self.lora_dropout), *factors)

    def adapter_parameters(self, name: str) -> dict[str, nn.Parameter]:
        """One adapter's parameters: lora_A, lora_B."""
        return {"lora_A": self.lora_A[_key(name)], "lora_B": self.lora_B[_key(name)]}

    def extra_repr(self) -> str:
        parts = [super().extra_repr(), f"adapters={len(self.lora_A)}", f"r={self.r}"]
        return ", ".join([*parts, f"lora_alpha={self.lora_alpha:g}"])


def _stacked(parameters: nn.ParameterDict, keys: list[str]) -> Tensor:
    """Those of ``keys`` (len(keys), ...), which may be none."""
    if not keys:
        return next(iter(parameters.values()))[None][:0]
    return torch.stack([parameters[key] for key in keys])


def _key(name: str) -> str:
    """An adapter's name as a parameter's, which has no dots; "%" is in no adapter's name."""
    return name.replace(".", "%2E")


def trained_layers(model: nn.Module) -> Iterator[tuple[str, TrainableMultiLoRALinear]]:
    """(full name, layer) of every TrainableMultiLoRALinear in ``model``, each once."""
    for name, module in unwrap(model).named_modules():
        if isinstance(module, TrainableMultiLoRALinear):
            yield strip_wrappers(name), module
