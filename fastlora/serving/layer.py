"""A linear in a served model: its own weight, and a bank's pages for all adapters."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fastlora import functional as F
from fastlora.inspection.layers import get_matrix
from fastlora.modules.routing import Routing
from fastlora.modules.shared_weight import SharedWeight
from fastlora.serving.bank.bank import AdapterBank
from fastlora.serving.bank.layout import Layout

_EXPERT = re.compile(r"(^|\.)experts?(\.|$)")


class ServedLinear(SharedWeight):
    """A frozen linear or ``Conv1D``; each row's slot in the bank names its adapter.

    ``MultiLoRAModel`` makes it and says which adapter each row has: called alone it raises.
    """

    bank: AdapterBank
    routing: Routing
    key: str
    # Its weight has been moved or cast since the bank was made for it.
    moved: bool

    @classmethod
    def serve(
        cls, linear: nn.Module, key: str, bank: AdapterBank, routing: Routing
    ) -> ServedLinear:
        """Makes a layer of ``linear``'s weight and bias; in the bank it is the layer ``key``."""
        layer = cls.around(linear)
        layer.bank, layer.routing, layer.key, layer.moved = bank, routing, key, False
        return layer

    def forward(self, input: Tensor) -> Tensor:
        """Returns (..., out_features) of input (..., in_features), whose rows the routing knows."""
        groups, scales = self.routing.prepare_groups(input, self)
        pages = self.bank.pages(self.key)
        return F.multi_lora_linear(
            input, self.matrix, pages.lora_A, pages.lora_B, groups, pages.scalings,
            bias=self.bias, ranks=pages.ranks, row_scales=scales, page_table=pages.table,
        )  # fmt: skip

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ServedLinear:
        super()._apply(fn, recurse)
        self.moved = True
        return self


def layout_of(linears: dict[str, Any], max_rank: int, dtype: torch.dtype | None) -> Layout:
    """Returns the layout of adapters for these linears; dtype: None means each weight's."""
    shapes = {}
    for name, linear in linears.items():
        N, K = get_matrix(linear).shape
        shapes[name] = (N, K, linear.weight.device, dtype or linear.weight.dtype)
    return Layout(shapes, max_rank)


def check_no_experts(names: Iterable[str]) -> None:
    """Raises ValueError for a mixture's expert, whose rows are not the batch's."""
    experts = [name for name in names if _EXPERT.search(name)]
    if experts:
        raise ValueError(
            f"target_modules: {experts[0]} is an expert: its rows are routed tokens, which "
            "cannot be told apart by adapter; leave experts out with exclude_modules"
        )
