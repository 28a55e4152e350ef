"""Layers that take over the weight of the linear in whose place they stand."""

from __future__ import annotations

from typing import TypeVar

from torch import Tensor, nn

from fastlora.inspection.layers import explain_unsupported, get_matrix, is_conv1d
from fastlora.modules.replacement import adopt

_Layer = TypeVar("_Layer", bound="SharedWeight")


class SharedWeight(nn.Linear):
    """A layer around a linear's weight, or a ``Conv1D``'s, which lies transposed."""

    holds_lora = True
    fan_in_fan_out = False

    @property
    def matrix(self) -> Tensor:
        """The weight as (out_features, in_features), the very one or a view of it."""
        return self.weight.t() if self.fan_in_fan_out else self.weight

    @classmethod
    def around(cls: type[_Layer], linear: nn.Module) -> _Layer:
        """Makes a layer in ``linear``'s place; TypeError where it cannot be taken."""
        reason = explain_unsupported(linear)
        if reason is not None:
            raise TypeError(f"linear: {reason}")
        N, K = get_matrix(linear).shape
        layer = cls(K, N, bias=False, device="meta")
        adopt(layer, linear)
        layer.fan_in_fan_out = is_conv1d(linear)
        return layer
