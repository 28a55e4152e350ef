"""A linear layer with several adapters that are trained side by side."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as nnf

from fastlora import config as settings
from fastlora import functional as F
from fastlora.inspection.layers import choose_lora_dtype
from fastlora.inspection.wrappers import strip_wrappers, unwrap
from fastlora.modules.init import init_lora
from fastlora.modules.layer import check_drawn
from fastlora.modules.shared_weight import SharedWeight
from fastlora.modules.training_rows import TrainingRows
from fastlora.ops.invariance import asked


class TrainableMultiLoRALinear(SharedWeight):
    """A frozen linear and several adapters in training; a batch's rows each belong to one.

    Parameters: lora_A and lora_B, (r, in_features) and (out_features, r) for each adapter under its
    name, in which "." is "%2E". Adapters without rows in a batch take no part in it: their
    gradients stay None. ``routing``, shared by all layers of a model, says which row is whose.
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
        keys = [_make_key(name) for name in routing.adapters]
        layer.lora_A = nn.ParameterDict({key: torch.empty(r, K, **kind) for key in keys})
        layer.lora_B = nn.ParameterDict({key: torch.empty(N, r, **kind) for key in keys})
        for key in keys:
            init_lora(layer.lora_A[key], layer.lora_B[key], init_lora_weights)
        return layer

    def forward(self, input: Tensor) -> Tensor:
        """Maps input (..., in_features), whose rows the routing knows, to (..., out_features)."""
        if self.adapter_disabled:
            return F.base_linear(input, self.matrix, self.bias)
        self.routing.check(self)
        rows = self.routing.find_rows(input, self)
        present = [_make_key(self.routing.adapters[i]) for i in self.routing.present]
        # Invariant, rows of none have the bits that they have beside others: by the same op.
        if not present and not asked():
            return F.base_linear(input, self.matrix, self.bias)
        groups = self.routing.make_groups(rows, input)
        lora_A, lora_B = _stack(self.lora_A, present), _stack(self.lora_B, present)
        scalings = input.new_full((len(present),), self.scaling, dtype=torch.float32)
        factors = (lora_A, lora_B, groups, scalings)
        if not (self.training and self.lora_dropout):
            return F.multi_lora_linear(input, self.matrix, *factors, bias=self.bias)
        y = F.base_linear(input, self.matrix, self.bias)
        return F.multi_lora_add_(y, nnf.dropout(input, self.lora_dropout), *factors)

    def adapter_parameters(self, name: str) -> dict[str, nn.Parameter]:
        """Returns one adapter's parameters: lora_A, lora_B."""
        return {"lora_A": self.lora_A[_make_key(name)], "lora_B": self.lora_B[_make_key(name)]}

    def extra_repr(self) -> str:
        parts = [super().extra_repr(), f"adapters={len(self.lora_A)}", f"r={self.r}"]
        return ", ".join([*parts, f"lora_alpha={self.lora_alpha:g}"])


def _stack(parameters: nn.ParameterDict, keys: list[str]) -> Tensor:
    """Stacks the parameters of ``keys`` (len(keys), ...), which may be none."""
    if not keys:
        return next(iter(parameters.values()))[None][:0]
    return torch.stack([parameters[key] for key in keys])


def _make_key(name: str) -> str:
    """Turns an adapter's name into a parameter's, without dots; "%" is in no adapter's name."""
    return name.replace(".", "%2E")


def find_trained_layers(model: nn.Module) -> Iterator[tuple[str, TrainableMultiLoRALinear]]:
    """Yields (full name, layer) of every TrainableMultiLoRALinear in ``model``, each once."""
    for name, module in unwrap(model).named_modules():
        if isinstance(module, TrainableMultiLoRALinear):
            yield strip_wrappers(name), module
