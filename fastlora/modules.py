"""Linear layers with LoRA, to stand where an ``nn.Linear`` stood."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastlora import config as settings
from fastlora import each
from fastlora import functional as F
from fastlora.checks_merge import own_elements
from fastlora.fidelity import Fidelity, measure
from fastlora.receipt import Adapter, MergeReceipt
from fastlora.wrapping import adopt, lora_dtype_for, unsupported, unwrapped

_LORA_NAMES = ("lora_A", "lora_B", "lora_bias")
# FastLoRALinear's attributes that a plain linear does not inherit from it.
_OWN = frozenset(
    {"r", "lora_alpha", "lora_dropout", "use_rslora", "init_lora_weights", "scaling"}
    | {"adapter_disabled", "_receipt", "_fidelity", "untied"}
)
# Elements by which a merge's fidelity is measured: a gain of 0.9 is then known to about 0.01.
_SAMPLE = 1 << 16


class FastLoRALinear(nn.Linear):
    """``x @ weight.T + bias + scaling * ((dropout(x) @ lora_A.T) @ lora_B.T + lora_bias)``.

    A subclass of ``nn.Linear`` whose state_dict holds weight, bias, lora_A (r, in_features), lora_B
    (out_features, r) and, with lora_bias=True, lora_bias (out_features,); a checkpoint of the base
    alone loads with ``strict=True`` and leaves the adapter as it is. scaling = lora_alpha / r, or /
    sqrt(r) with use_rslora. init_lora_weights: True (lora_A Kaiming-uniform, lora_B zero),
    "gaussian" (lora_A normal with standard deviation 1 / r, lora_B zero) or False (lora_B random
    too, for tests). lora_dtype: the adapter's dtype; None is float32 on a half-precision base, the
    base's otherwise.

    Raises TypeError or ValueError naming the argument. Names and defaults are PEFT's.
    """

    holds_lora = True
    bias: nn.Parameter | None
    lora_bias: nn.Parameter | None

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
        settings.check_rank("r", r)
        settings.check_number("lora_alpha", lora_alpha)
        settings.check_dropout(lora_dropout)
        settings.check_init(init_lora_weights)
        super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self.r, self.lora_alpha, self.use_rslora = r, lora_alpha, use_rslora
        self.lora_dropout, self.init_lora_weights = float(lora_dropout), init_lora_weights
        self.scaling = settings.scaling(lora_alpha, r, use_rslora)
        self.adapter_disabled = False
        self._receipt: MergeReceipt | None = None
        self._fidelity: Fidelity | None = None
        # Whose weight its own once was: see merge_adapter(untie=True).
        self.untied: tuple[str, ...] = ()
        self._add_lora(lora_bias, lora_dtype)

    @classmethod
    def from_linear(cls, linear: nn.Linear, r: int = 8, **options: Any) -> FastLoRALinear:
        """A layer around ``linear``'s weight and bias, frozen by it; options as in ``__init__``.

        Hooks, training mode and other attributes of ``linear`` come along. Raises TypeError for
        anything that is not a plain ``nn.Linear`` (see ``unsupported``).
        """
        layer = cls._sharing(linear, r, **options)
        for parameter in (layer.weight, layer.bias):
            if parameter is not None:
                parameter.requires_grad_(False)
        return layer

    @classmethod
    def _sharing(
        cls,
        linear: nn.Linear,
        r: int,
        *,
        lora_bias: bool = False,
        lora_dtype: torch.dtype | None = None,
        **options: Any,
    ) -> FastLoRALinear:
        reason = unsupported(linear)
        if reason is not None:
            raise TypeError(f"linear: {reason}")
        clash = {"bias", "device", "dtype"} & options.keys()
        if clash:
            raise TypeError(f"from_linear takes {', '.join(sorted(clash))} from the linear")
        shape = (linear.in_features, linear.out_features)
        layer = cls(*shape, r, bias=False, device="meta", dtype=linear.weight.dtype, **options)
        adopt(layer, linear)
        layer._add_lora(lora_bias, lora_dtype)
        return layer

    def _add_lora(self, lora_bias: bool, dtype: torch.dtype | None) -> None:
        base = self.weight
        kind = {"device": base.device, "dtype": dtype or lora_dtype_for(base.dtype)}
        self.lora_A = nn.Parameter(torch.empty(self.r, self.in_features, **kind))
        self.lora_B = nn.Parameter(torch.empty(self.out_features, self.r, **kind))
        extra = nn.Parameter(torch.empty(self.out_features, **kind)) if lora_bias else None
        self.register_parameter("lora_bias", extra)
        self.reset_lora_parameters()

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        """The adapter's parameters by name: lora_A, lora_B and, where there is one, lora_bias."""
        found = {name: self._parameters.get(name) for name in _LORA_NAMES}
        return {name: p for name, p in found.items() if isinstance(p, nn.Parameter)}

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if "lora_A" in self._parameters:
            self.reset_lora_parameters()

    @torch.no_grad()
    def reset_lora_parameters(self) -> None:
        """Initialises the adapter as ``init_lora_weights`` says."""
        init_lora(self.lora_A, self.lora_B, self.init_lora_weights)
        if self.lora_bias is not None:
            nn.init.zeros_(self.lora_bias)

    def forward(self, input: Tensor) -> Tensor:
        """input (..., in_features) of the weight's dtype to (..., out_features)."""
        if self._receipt is not None:
            self._refuse_training()
            return F.base_linear(input, self.weight, self.merged_bias())
        if self.adapter_disabled:
            return F.base_linear(input, self.weight, self.bias)
        return F.lora_linear(
            input,
            self.weight,
            self.lora_A,
            self.lora_B,
            self.scaling,
            bias=self.bias,
            lora_bias=self.lora_bias,
            dropout_p=self.lora_dropout,
            training=self.training,
        )

    @property
    def merged(self) -> bool:
        """Whether the adapter is in the weight."""
        return self._receipt is not None

    def merge(self, *, snapshot: bool = False) -> None:
        """Adds the adapter to the weight in place; ``unmerge`` gives every bit back.

        The bias is left alone: a lora_bias is added to it at each call. snapshot: keeps a copy of
        the weight instead of a receipt. Raises RuntimeError when merged already or disabled,
        ValueError when a merged value would not be finite; nothing has changed then.
        """
        self.check_mergeable()
        sample, adapter = self.sampled(), self.adapter
        with each.all_or_none() as done:
            receipt = F.merge_(self.weight, [adapter], snapshot=snapshot)
            done.append(lambda: self._take_out(receipt))
            self._receipt = receipt
            self.measure(sample, adapter)

    def _take_out(self, receipt: MergeReceipt | None) -> None:
        if receipt is not None:
            F.unmerge_(self.weight, receipt)
        self._receipt = None

    def check_mergeable(self) -> None:
        """Raises as ``merge`` does, as far as can be said without computing anything."""
        if self._receipt is not None:
            raise RuntimeError("the layer is merged already")
        if self.adapter_disabled:
            raise RuntimeError("the adapter is disabled: merge it outside of disable_adapter")
        own_elements(self.weight)
        bias = None if self.lora_bias is None else self.merged_bias()
        if bias is not None and not bool(bias.isfinite().all()):
            raise ValueError("lora_bias: the merged bias would have values that are not finite")

    @property
    def adapter(self) -> Adapter:
        """(lora_A, lora_B, scaling)."""
        return self.lora_A, self.lora_B, self.scaling

    @property
    def receipt(self) -> MergeReceipt:
        """What undoes the merge; RuntimeError where there is none."""
        if self._receipt is None:
            raise RuntimeError("the layer is not merged")
        return self._receipt

    @property
    def fidelity(self) -> Fidelity | None:
        """How much of the adapter has arrived in the merged weight, by a sample of it."""
        return self._fidelity if self.merged else None

    def sampled(self) -> Tensor:
        """A copy of some of the weight's elements, to ``measure`` a merge by."""
        return self.weight.detach()[self._some()].clone()

    def measure(self, before: Tensor, adapter: Adapter) -> None:
        """Notes the fidelity of a merge of ``adapter``; before: what ``sampled`` gave."""
        lora_A, lora_B, scaling = adapter
        rows, columns = self._some()
        some = (lora_A.detach()[:, columns], lora_B.detach()[rows], scaling)
        self._fidelity = measure(before, self.weight.detach()[rows, columns], [some])

    def _some(self) -> tuple[slice, slice]:
        """Rows and columns spread over the weight, as many of one as of the other or all."""
        N, K = max(1, self.out_features), max(1, self.in_features)
        side = int(_SAMPLE**0.5)
        rows = min(N, max(side, _SAMPLE // K))
        columns = min(K, _SAMPLE // rows)
        return slice(None, None, -(-N // rows)), slice(None, None, -(-K // max(1, columns)))

    def unmerge(self) -> None:
        """Takes the adapter out of the weight again, exactly, or raises and changes nothing.

        A merged layer that was cast to another dtype cannot be unmerged: the bits are gone.
        """
        F.unmerge_(self.weight, self.receipt)
        self._receipt = None

    def merged_bias(self) -> Tensor | None:
        """The bias with the adapter's own added (out_features,), or None where there is neither."""
        if self.lora_bias is None:
            return self.bias
        own = self.lora_bias * self.scaling
        return (own if self.bias is None else own + self.bias).to(self.weight.dtype)

    def to_linear(self) -> nn.Linear:
        """A plain ``nn.Linear`` around the weight as it is, with ``merged_bias`` if merged."""
        bias = self.merged_bias() if self.merged else self.bias
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        adopt(linear, self, without=_OWN)
        if bias is not None and bias is not self.bias:
            linear.bias = nn.Parameter(bias.detach(), requires_grad=False)
        return linear

    def extra_repr(self) -> str:
        parts = [super().extra_repr(), f"r={self.r}", f"lora_alpha={self.lora_alpha:g}"]
        parts += [f"lora_dropout={self.lora_dropout:g}"] if self.lora_dropout else []
        flags = ("use_rslora", "merged", "adapter_disabled")
        return ", ".join(parts + [f"{flag}=True" for flag in flags if getattr(self, flag)])

    def _refuse_training(self) -> None:
        trained = self.lora_A.requires_grad or self.lora_B.requires_grad
        if trained and self.training and torch.is_grad_enabled():
            raise RuntimeError(
                "the layer is merged, so its adapter would not be trained: unmerge it first, or "
                "call eval() to run it merged"
            )

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        if self._receipt is not None:
            raise RuntimeError(
                f"{prefix.rstrip('.') or 'the layer'} is merged: saved now, its adapter would be "
                "applied twice when loaded; unmerge it first, or save what merge_and_unload returns"
            )
        super()._save_to_state_dict(destination, prefix, keep_vars)

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
        if self._receipt is not None:
            layer = prefix.rstrip(".") or "the layer"
            error_msgs.append(f"{layer} is merged: unmerge it before loading")
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        own = [prefix + name for name in self.adapter_parameters()]
        if not any(key in state_dict for key in own):
            missing_keys[:] = [key for key in missing_keys if key not in own]


@torch.no_grad()
def init_lora(lora_A: Tensor, lora_B: Tensor, how: bool | str) -> None:
    """Draws lora_A (r, K), lora_B (N, r) in place as ``init_lora_weights=how`` says."""
    if how == "gaussian":
        nn.init.normal_(lora_A, std=1 / lora_A.shape[0])
    else:
        nn.init.kaiming_uniform_(lora_A, a=math.sqrt(5))
    if how is False:
        nn.init.kaiming_uniform_(lora_B, a=math.sqrt(5))
    else:
        nn.init.zeros_(lora_B)


def lora_layers(model: nn.Module) -> Iterator[tuple[str, FastLoRALinear]]:
    """(full name, layer) of every FastLoRALinear in ``model``, each once."""
    for name, module in unwrapped(model).named_modules():
        if isinstance(module, FastLoRALinear):
            yield name, module
