"""Merging of PEFT's LoRA linear that can be undone to the last bit."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from peft.tuners.lora import layer as lora
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from fastlora import functional as F
from fastlora.config.listing import list_some
from fastlora.inspection.plain_tensors import explain_unreadable, is_plain
from fastlora.integrations.peft.parts import explain_unknown, read_adapter, read_product
from fastlora.modules.dtensors import is_dtensor


class Merged(NamedTuple):
    """Receipt of a layer's weight; if its bias changed too, the bias before and after."""

    receipt: F.MergeReceipt
    bias: tuple[Tensor, Tensor] | None


class Merging(lora.Linear):
    """``peft.tuners.lora.Linear`` that merges in place and keeps a receipt of each adapter."""

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merges as PEFT does, but refuses what is not finite, with ``safe_merge`` or without."""
        self._merge(safe_merge, adapter_names)

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """Returns the base layer; what is merged into it stays, without a receipt."""
        if merge:
            self._merge(safe_merge, adapter_names, receipt=False)
        return self.get_base_layer()

    def unmerge(self) -> None:
        """Takes the adapters out, last first; to the bit, if the weight is as merging left it."""
        if not self.merged:
            super().unmerge()
        while self.merged:
            *others, name = self.merged_adapters
            if not self._unmerge_one(name):
                self.merged_adapters = [name]
                try:
                    super().unmerge()
                finally:  # what is merged still stays so by name where PEFT raises
                    self.merged_adapters = others
            self.merged_adapters = others

    def _merge(
        self, safe_merge: bool, adapter_names: list[str] | None, receipt: bool = True
    ) -> None:
        for name in check_adapters_to_merge(self, adapter_names):
            if name in self.lora_A and not self._merge_one(name, receipt):
                _refuse_wrapped(name, self.base_layer)
                super().merge(safe_merge, [name])

    def _merge_one(self, name: str, receipt: bool) -> bool:
        """Merges an adapter, if it is one that fastlora knows."""
        base = read_product(self.base_layer)
        if isinstance(base, str) or base.weight.is_meta or explain_unknown(self, name) is not None:
            return False
        A, B, lora_bias, scaling, _ = read_adapter(self, name)
        bias, biases = base.bias, None
        if lora_bias is not None:
            if bias is None:
                return False
            before = bias.detach().clone()
            after = (before + lora_bias.detach() * scaling).to(before.dtype)
            if not bool(after.isfinite().all()):
                raise ValueError(f"adapter {name!r}: the merged bias would not be finite")
            biases = before, after
        try:
            weight_receipt = F.merge_(base.weight, [(A, B, scaling)], receipt=receipt)
        except ValueError as error:
            raise ValueError(f"adapter {name!r}: {error}") from None
        if bias is not None and biases is not None:
            bias.data.copy_(biases[1])
        if weight_receipt is not None:
            vars(self).setdefault("_receipts", {})[name] = Merged(weight_receipt, biases)
        self.merged_adapters.append(name)
        return True

    def _unmerge_one(self, name: str) -> bool:
        """Unmerges an adapter by its receipt; False where there is none or it does not fit."""
        receipts: dict[str, Merged] = vars(self).get("_receipts", {})
        merged = receipts.get(name)
        if merged is None:
            return False
        base = read_product(self.base_layer)
        try:
            if isinstance(base, str):
                raise RuntimeError(base)
            bias = base.bias
            if merged.bias and (bias is None or not merged.bias[1].equal(bias)):
                raise RuntimeError("the bias was edited")
            F.unmerge_(base.weight, merged.receipt)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, TypeError, ValueError) as error:
            del receipts[name]
            warnings.warn(
                f"adapter {name!r} is subtracted, as PEFT does, which rounds: {error}", stacklevel=3
            )
            return False
        if bias is not None and merged.bias is not None:
            bias.data.copy_(merged.bias[0])
        del receipts[name]
        return True


def warn_of_lost_merges(layers: Mapping[str, Any]) -> None:
    """Warns, of layers that PEFT merges, by name where it loses the adapter.

    PEFT 0.21.2 assigns to ``weight.data``, which optimum-quanto 0.2.7's tensors do not take in.
    """
    lost = [
        name
        for name, layer in layers.items()
        if _is_from_quanto(getattr(layer.get_base_layer(), "weight", None))
    ]
    if lost:
        warnings.warn(
            "PEFT's merging leaves the adapter out of weights of optimum-quanto: "
            f"{list_some(lost)} stay as they are and count as merged; keep the adapter beside them",
            stacklevel=5,
        )


def _is_from_quanto(weight: object) -> bool:
    return type(weight).__module__.startswith("optimum.quanto.")


def _refuse_wrapped(name: str, base: nn.Module) -> None:
    """Raises TypeError for a weight quantized since the patch, of which PEFT would write a copy."""
    weight = base._parameters.get("weight")
    if weight is None or is_plain(weight) or is_dtensor(weight):
        return
    raise TypeError(
        f"adapter {name!r}: its base's weight is {explain_unreadable(weight)}: what is added to it "
        "may be lost; merge before quantizing, or keep the adapter beside it"
    )
