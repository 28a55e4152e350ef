"""Linear layers with one adapter: what they share, whichever way their weight lies."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from fastlora import config as settings
from fastlora import functional as F
from fastlora.backends.merge_lists.undo import all_or_none
from fastlora.inspection.layers import choose_lora_dtype, explain_unsupported
from fastlora.inspection.wrappers import strip_wrappers, unwrap
from fastlora.modules import dtensor_linear
from fastlora.modules import init as initial
from fastlora.modules.merging import Mergeable
from fastlora.modules.replacement import adopt

_LORA_NAMES = ("lora_A", "lora_B", "lora_bias")

# FastLoRALinear's attributes that a plain linear does not inherit from it.
_OWN = frozenset(
    {"r", "lora_alpha", "lora_dropout", "use_rslora", "init_lora_weights", "scaling"}
    | {"adapter_disabled", "_receipt", "_fidelity", "untied", "in_features", "out_features"}
    | {"_fastlora_bypassed"}
)

_Layer = TypeVar("_Layer", bound="LoRALayer")

# What a DTensor is not.
_PLAIN = (nn.Parameter, Tensor)


class AdapterOptions(NamedTuple):
    """Options of a new layer's adapter, as the constructors take them."""

    r: int
    lora_alpha: float
    lora_dropout: float
    use_rslora: bool
    lora_bias: bool
    init_lora_weights: bool | str
    lora_dtype: torch.dtype | None

    def check(self) -> AdapterOptions:
        """Raises TypeError or ValueError naming the option that does not fit."""
        settings.check_layer(self.r, self.lora_alpha, self.lora_dropout)
        check_drawn(self.init_lora_weights)
        return self


class LoRALayer(Mergeable, ABC):
    """A linear layer with LoRA, whichever way its weight lies."""

    holds_lora = True
    fan_in_fan_out = False
    r: int
    lora_alpha: float
    lora_dropout: float
    use_rslora: bool
    init_lora_weights: bool | str
    untied: tuple[str, ...]

    def _set_up(self, options: AdapterOptions) -> None:
        self.r, self.lora_alpha, self.use_rslora = options.r, options.lora_alpha, options.use_rslora
        self.lora_dropout = float(options.lora_dropout)
        self.init_lora_weights = options.init_lora_weights
        self.scaling = settings.compute_scaling(self.lora_alpha, self.r, self.use_rslora)
        self.adapter_disabled = False
        self._receipt = None
        self._fidelity = None
        # Layers that its weight was tied with: see merge_adapter(untie=True).
        self.untied = ()
        self._add_lora(options.lora_bias, options.lora_dtype)

    @classmethod
    def _share(
        cls: type[_Layer],
        linear: nn.Module,
        r: int,
        *,
        lora_bias: bool = False,
        lora_dtype: torch.dtype | None = None,
        init_lora_weights: bool | str = True,
        **options: Any,
    ) -> _Layer:
        """Makes a layer around ``linear``'s weight, before an init that splits it changes it."""
        reason = explain_unsupported(linear) or cls._explain_misfit(linear)
        if reason is not None:
            raise TypeError(f"linear: {reason}")
        clash = {"bias", "device", "dtype"} & options.keys()
        if clash:
            raise TypeError(f"{', '.join(sorted(clash))}: it is the given layer's, got another")
        settings.check_init(init_lora_weights)
        layer = cls._make_like(linear, r, device="meta", dtype=linear.weight.dtype, **options)
        adopt(layer, linear)
        layer.init_lora_weights = init_lora_weights
        layer._add_lora(lora_bias, lora_dtype)
        return layer

    @classmethod
    def _share_frozen(cls: type[_Layer], linear: nn.Module, r: int, **options: Any) -> _Layer:
        layer = cls._share(linear, r, **options)
        init = layer.init_lora_weights
        if settings.has_split_base(init):
            with all_or_none() as undo:
                initial.split_bases({"": layer}, str(init), undo)
        for parameter in (layer.weight, layer.bias):
            if parameter is not None:
                parameter.requires_grad_(False)
        return layer

    def _add_lora(self, lora_bias: bool, dtype: torch.dtype | None) -> None:
        base = self.weight
        kind = {"device": base.device, "dtype": choose_lora_dtype(base.dtype, dtype)}
        self.lora_A = nn.Parameter(torch.empty(self.r, self.in_features, **kind))
        self.lora_B = nn.Parameter(torch.empty(self.out_features, self.r, **kind))
        extra = nn.Parameter(torch.empty(self.out_features, **kind)) if lora_bias else None
        self.register_parameter("lora_bias", extra)
        if not settings.has_split_base(self.init_lora_weights):
            self.reset_lora_parameters()

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        """Returns the adapter's parameters by name: lora_A, lora_B and any lora_bias.

        Raises RuntimeError where one is no parameter but computed at each call.
        """
        computed = [name for name in _LORA_NAMES if name not in self._parameters]
        if computed:
            raise RuntimeError(
                f"{computed[0]}: expected a parameter, but it is computed (parametrized, "
                "weight_norm?): make that permanent first"
            )
        return self._find_parameters()

    def _find_parameters(self) -> dict[str, nn.Parameter]:
        parameters = {name: self._parameters.get(name) for name in _LORA_NAMES}
        return {name: p for name, p in parameters.items() if isinstance(p, nn.Parameter)}

    @torch.no_grad()
    def reset_lora_parameters(self) -> None:
        """Initialises the adapter as ``init_lora_weights`` says."""
        if settings.has_split_base(self.init_lora_weights):
            raise RuntimeError(
                f"init_lora_weights: {self.init_lora_weights!r} has split the base's weight, which "
                "cannot be done again: load the base, and make the layer from it"
            )
        initial.init_lora(self.lora_A, self.lora_B, self.init_lora_weights)
        if self.lora_bias is not None:
            nn.init.zeros_(self.lora_bias)

    def forward(self, input: Tensor) -> Tensor:
        """Maps input (..., in_features) of the weight's dtype to (..., out_features)."""
        if self._receipt is not None:
            self._refuse_training()
            return F.base_linear(input, self.matrix, self.merged_bias())
        if self.adapter_disabled:
            return F.base_linear(input, self.matrix, self.bias)
        matrix = self.matrix
        return (F if type(matrix) in _PLAIN else dtensor_linear).lora_linear(
            input,
            matrix,
            self.lora_A,
            self.lora_B,
            self.scaling,
            bias=self.bias,
            lora_bias=self.lora_bias,
            dropout_p=self.lora_dropout,
            training=self.training,
        )

    def to_linear(self) -> nn.Module:
        """Makes the plain layer around the weight as it is, with ``merged_bias`` if merged."""
        bias = self.merged_bias() if self.merged else self.bias
        linear = self._make_plain()
        adopt(linear, self, without=_OWN)
        if bias is not None and bias is not self.bias:
            linear.bias = nn.Parameter(bias.detach(), requires_grad=False)
        return linear

    def extra_repr(self) -> str:
        parts = [super().extra_repr(), f"r={self.r}", f"lora_alpha={self.lora_alpha:g}"]
        parts += [f"lora_dropout={self.lora_dropout:g}"] if self.lora_dropout else []
        flags = ("use_rslora", "merged", "adapter_disabled")
        return ", ".join(parts + [f"{flag}=True" for flag in flags if getattr(self, flag)])

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        adapter_keys = [prefix + name for name in self._find_parameters()]
        is_base_alone = not any(key in state_dict for key in adapter_keys)
        if (
            is_base_alone
            and prefix + "weight" in state_dict
            and settings.has_split_base(self.init_lora_weights)
        ):
            error_msgs.append(
                f"{prefix}weight: the adapter holds a part of the base (init_lora_weights="
                f"{self.init_lora_weights!r}), which a base without adapters would count twice"
            )
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if is_base_alone:
            missing_keys[:] = [key for key in missing_keys if key not in adapter_keys]

    @classmethod
    @abstractmethod
    def _explain_misfit(cls, linear: nn.Module) -> str | None:
        """Says why this class is not for ``linear``, which can have LoRA."""

    @classmethod
    @abstractmethod
    def _make_like(cls: type[_Layer], linear: nn.Module, r: int, **options: Any) -> _Layer:
        """Makes a layer of ``linear``'s shape."""

    @abstractmethod
    def _make_plain(self) -> nn.Module:
        """Makes the layer without LoRA, and without memory."""


def check_drawn(init_lora_weights: object) -> None:
    """Raises where an init needs a weight that is there already."""
    settings.check_init(init_lora_weights)
    if settings.has_split_base(init_lora_weights):
        raise ValueError(
            f"init_lora_weights: {init_lora_weights!r} splits a weight that is there: use "
            "replace_linear, or make the layer from another"
        )


def find_lora_layers(model: nn.Module) -> Iterator[tuple[str, LoRALayer]]:
    """Yields (full name, layer) of every FastLoRALinear and FastLoRAConv1D, each once."""
    for name, module in unwrap(model).named_modules():
        if isinstance(module, LoRALayer):
            yield strip_wrappers(name), module
