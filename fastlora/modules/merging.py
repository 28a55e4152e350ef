"""Of a layer with LoRA: its adapter into the weight and out again."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fastlora import functional as F
from fastlora.backends.merge_lists.undo import all_or_none
from fastlora.functional.checks.merge import own_elements
from fastlora.functional.fidelity import Fidelity, measure
from fastlora.functional.receipt import Adapter, MergeReceipt

# Elements by which a merge's fidelity is measured: a gain of 0.9 is then known to about 0.01.
_SAMPLE = 1 << 16
_Self = TypeVar("_Self", bound="Mergeable")


class Mergeable(nn.Module):
    """A layer whose ``matrix`` (out_features, in_features) its adapter can be merged into."""

    fan_in_fan_out: bool
    in_features: int
    out_features: int
    scaling: float
    weight: nn.Parameter
    bias: nn.Parameter | None
    lora_A: nn.Parameter
    lora_B: nn.Parameter
    lora_bias: nn.Parameter | None
    adapter_disabled: bool
    _receipt: MergeReceipt | None
    _fidelity: Fidelity | None

    @property
    def matrix(self) -> Tensor:
        """The weight as (out_features, in_features), the very one or a view of it."""
        return self.weight

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
        with all_or_none() as undo:
            receipt = F.merge_(self.matrix, [adapter], snapshot=snapshot)
            undo.push(self._take_out, receipt)
            self._receipt = receipt
            self.measure(sample, adapter)

    def _take_out(self, receipt: MergeReceipt | None) -> None:
        if receipt is not None:
            F.unmerge_(self.matrix, receipt)
        self._receipt = None

    def check_mergeable(self) -> None:
        """Raises as ``merge`` does, as far as can be said without computing anything."""
        if self._receipt is not None:
            raise RuntimeError("the layer is merged already")
        if self.adapter_disabled:
            raise RuntimeError("the adapter is disabled: merge it outside of disable_adapter")
        self.check_stored()
        own_elements(self.matrix)
        bias = None if self.lora_bias is None else self.merged_bias()
        if bias is not None and not bool(bias.isfinite().all()):
            raise ValueError("lora_bias: the merged bias would have values that are not finite")

    def check_stored(self) -> None:
        """RuntimeError where there is no weight that keeps what is merged into it."""
        if "weight" not in self._parameters:
            raise RuntimeError(
                "weight: expected a parameter, but it is computed (parametrized, weight_norm, "
                "pruned?): make that permanent before merging or unmerging"
            )
        if self.weight.is_meta:
            raise RuntimeError(
                "weight: expected values, but it is on the meta device (offloaded?): load it first"
            )

    @property
    def adapter(self) -> Adapter:
        """(lora_A, lora_B, scaling)."""
        return self.lora_A, self.lora_B, self.scaling

    @property
    def receipt(self) -> MergeReceipt | None:
        """What undoes the merge, where there is one."""
        return self._receipt

    def needed_receipt(self) -> MergeReceipt:
        """What undoes the merge; RuntimeError where there is none, or it cannot be undone now."""
        if self._receipt is None:
            raise RuntimeError("the layer is not merged")
        self.check_stored()
        return self._receipt

    @property
    def fidelity(self) -> Fidelity | None:
        """How much of the adapter has arrived in the merged weight, by a sample of it."""
        return self._fidelity if self.merged else None

    def sampled(self) -> Tensor:
        """A copy of some of the weight's elements, to ``measure`` a merge by."""
        return self.matrix.detach()[self._some()].clone()

    def measure(self, before: Tensor, adapter: Adapter) -> None:
        """Notes the fidelity of a merge of ``adapter``; before: what ``sampled`` gave."""
        lora_A, lora_B, scaling = adapter
        rows, columns = self._some()
        some = (lora_A.detach()[:, columns], lora_B.detach()[rows], scaling)
        self._fidelity = measure(before, self.matrix.detach()[rows, columns], [some])

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
        F.unmerge_(self.matrix, self.needed_receipt())
        self._receipt = None

    def merged_bias(self) -> Tensor | None:
        """The bias with the adapter's own added (out_features,), or None where there is neither."""
        if self.lora_bias is None:
            return self.bias
        own = self.lora_bias * self.scaling
        return (own if self.bias is None else own + self.bias).to(self.weight.dtype)

    def __copy__(self: _Self) -> _Self:
        if self._receipt is not None:
            raise RuntimeError(
                "the layer is merged: a shallow copy shares its weight and would not know when it "
                "is unmerged; use copy.deepcopy, or unmerge it first"
            )
        twin = object.__new__(type(self))
        vars(twin).update(vars(self))
        return twin

    def _refuse_training(self) -> None:
        trains = self.training and torch.is_grad_enabled()
        if trains and (self.lora_A.requires_grad or self.lora_B.requires_grad):
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
