"""A linear layer with slots for adapters that are served: each row's id names its slot."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastlora import config as settings
from fastlora import functional as F
from fastlora.inspection.layers import choose_lora_dtype
from fastlora.modules.shared_weight import SharedWeight


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
        """Makes a layer around ``linear``'s weight and bias, S = max_adapters slots, R = max_rank.

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
            "lora_B": _lay_rank_major(torch.zeros(S, layer.out_features, R, **zeros)),
            "scalings": torch.zeros(S, device=weight.device, dtype=torch.float32),
            "ranks": torch.zeros(S, device=weight.device, dtype=torch.int32),
        }
        for name, buffer in buffers.items():
            layer.register_buffer(name, buffer, persistent=False)
        layer.routing = None
        return layer

    def forward(self, input: Tensor, adapter_ids: Tensor | F.RowGroups | None = None) -> Tensor:
        """Maps input (T, K) with ids (T,), or (B, ..., K) with ids (B,), to (..., N).

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
        self.lora_B = _lay_rank_major(self.lora_B)
        return self

    def extra_repr(self) -> str:
        S, R = self.lora_A.shape[:2]
        return f"{super().extra_repr()}, max_adapters={S}, max_rank={R}"


def _check_factor(name: str, factor: object) -> None:
    if not isinstance(factor, Tensor) or not factor.is_floating_point():
        kind = factor.dtype if isinstance(factor, Tensor) else type(factor).__name__
        raise TypeError(f"{name}: expected a tensor of floats, got {kind}")
    if factor.is_meta or factor.layout != torch.strided:
        storage = f"{factor.layout} on {factor.device}"
        raise TypeError(f"{name}: expected a dense tensor that has values, got {storage}")


def _lay_rank_major(lora_B: Tensor) -> Tensor:
    """Lays lora_B (S, N, R) out as kernels read it best: on a GPU a rank's columns together."""
    return lora_B.mT.contiguous().mT if lora_B.is_cuda else lora_B.contiguous()
