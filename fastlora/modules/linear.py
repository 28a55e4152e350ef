"""``nn.Linear`` with LoRA."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fastlora.modules.layer import AdapterOptions, LoRALayer


class FastLoRALinear(LoRALayer, nn.Linear):
    """``x @ weight.T + bias + scaling * ((dropout(x) @ lora_A.T) @ lora_B.T + lora_bias)``.

    A subclass of ``nn.Linear``. Its state_dict holds weight, bias, lora_A (r, in_features), lora_B
    (out_features, r) and, with lora_bias=True, lora_bias (out_features,). A checkpoint of the base
    alone loads with ``strict=True`` and leaves the adapter as it is.

    - scaling: lora_alpha / r, or / sqrt(r) with use_rslora
    - init_lora_weights: True (lora_A Kaiming-uniform, lora_B zero), "gaussian" (lora_A normal with
      standard deviation 1 / r, lora_B zero), "orthogonal" (B @ A is zero), False (lora_B random
      too, for tests), or in ``from_linear`` one that splits its weight, see ``LoRAConfig``
    - lora_dtype: the adapter's dtype; None is float32 on a half-precision base, else the base's

    Raises TypeError or ValueError naming the argument. Names and defaults are PEFT's.
    """

    weight: nn.Parameter  # pyright: ignore[reportIncompatibleVariableOverride]
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int = 8,
        lora_alpha: float = 8,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        lora_bias: bool = False,
        init_lora_weights: bool | str = True,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        lora_dtype: torch.dtype | None = None,
    ) -> None:
        options = AdapterOptions(
            r, lora_alpha, lora_dropout, use_rslora, lora_bias, init_lora_weights, lora_dtype
        ).check()
        super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self._set_up(options)

    @classmethod
    def from_linear(cls, linear: nn.Linear, r: int = 8, **options: Any) -> FastLoRALinear:
        """Makes a layer around ``linear``'s weight and bias, frozen by it; options of ``__init__``.

        Hooks, training mode and other attributes of ``linear`` come along. An init that splits the
        weight ("pissa", "olora") changes it in place, for all that share it.

        Raises TypeError, with the reason, for anything that is not a plain ``nn.Linear``: a
        subclass (quantised layers are such), a parametrised weight, another dtype than float16 to
        float64, a layer with LoRA.
        """
        return cls._share_frozen(linear, r, **options)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if "lora_A" in self._parameters:
            self.reset_lora_parameters()

    @classmethod
    def _explain_misfit(cls, linear: nn.Module) -> str | None:
        return None if isinstance(linear, nn.Linear) else "it is for FastLoRAConv1D.from_conv1d"

    @classmethod
    def _make_like(cls, linear: nn.Module, r: int, **options: Any) -> FastLoRALinear:
        assert isinstance(linear, nn.Linear)
        return cls(linear.in_features, linear.out_features, r, bias=False, **options)

    def _make_plain(self) -> nn.Linear:
        return nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
