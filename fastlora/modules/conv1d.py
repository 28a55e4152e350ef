"""``Conv1D`` of transformers (GPT-2) with LoRA: a linear layer whose weight lies transposed."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor, nn

from fastlora.inspection.layers import get_matrix, is_conv1d
from fastlora.modules.layer import AdapterOptions, LoRALayer


class FastLoRAConv1D(LoRALayer):
    """``FastLoRALinear`` for a weight (nx, nf): ``x @ weight + bias + scaling * …``.

    Stands where transformers' ``Conv1D(nf, nx)`` stood: its attributes and state_dict (weight
    (nx, nf), bias (nf,)) with lora_A (r, nx), lora_B (nf, r) and, if asked for, lora_bias (nf,). It
    is no instance of that class, which need not be installed. Arguments, their meaning and errors
    as ``FastLoRALinear``'s. The kernels read the weight where it lies; on ``cpu`` few rows, which
    go through a kernel of one pass else, take torch's product and the adapter's kernel.
    """

    fan_in_fan_out = True

    def __init__(
        self,
        nf: int,
        nx: int,
        r: int = 8,
        lora_alpha: float = 8,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        lora_bias: bool = False,
        init_lora_weights: bool | str = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        lora_dtype: torch.dtype | None = None,
    ) -> None:
        options = AdapterOptions(
            r, lora_alpha, lora_dropout, use_rslora, lora_bias, init_lora_weights, lora_dtype
        ).check()
        super().__init__()
        self.nf, self.nx = self.out_features, self.in_features = nf, nx
        self.weight = nn.Parameter(torch.empty(nx, nf, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(nf, device=device, dtype=dtype))
        self.reset_parameters()
        self._set_up(options)

    @classmethod
    def from_conv1d(cls, conv1d: nn.Module, r: int = 8, **options: Any) -> FastLoRAConv1D:
        """Makes a layer around a ``Conv1D``'s weight and bias, frozen by it; as ``from_linear``."""
        return cls._share_frozen(conv1d, r, **options)

    @property
    def matrix(self) -> Tensor:
        """The weight as (out_features, in_features), a view of it."""
        return self.weight.t()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.02)
        if self.bias is not None:
            nn.init.zeros_(self.bias)
        if "lora_A" in self._parameters:
            self.reset_lora_parameters()

    def extra_repr(self) -> str:
        return f"nf={self.nf}, nx={self.nx}" + super().extra_repr()

    @classmethod
    def _explain_misfit(cls, linear: nn.Module) -> str | None:
        return None if is_conv1d(linear) else "it is for FastLoRALinear.from_linear"

    @classmethod
    def _make_like(cls, linear: nn.Module, r: int, **options: Any) -> FastLoRAConv1D:
        nf, nx = get_matrix(linear).shape
        return cls(nf, nx, r, **options)

    def _make_plain(self) -> nn.Module:
        kind = importlib.import_module("transformers.pytorch_utils").Conv1D
        with torch.device("meta"):
            return kind(self.nf, self.nx)
