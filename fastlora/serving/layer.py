"""A linear in a served model: its own weight, and a bank's pages for all adapters."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from fastlora import functional as F
from fastlora.modules.routing import Routing
from fastlora.modules.shared_weight import SharedWeight
from fastlora.serving.bank.bank import AdapterBank


class ServedLinear(SharedWeight):
    """A frozen linear or ``Conv1D``; each row's slot in the bank names its adapter.

    Made by ``MultiLoRAModel``, which says whose the rows of a batch are: alone it raises.
    """

    bank: AdapterBank
    routing: Routing
    key: str
    # Its weight has been moved or cast since the bank was made for it.
    moved: bool

    @classmethod
    def serving(
        cls, linear: nn.Module, key: str, bank: AdapterBank, routing: Routing
    ) -> ServedLinear:
        """Around ``linear``'s weight and bias; in the bank it is the layer ``key``."""
        layer = cls.around(linear)
        layer.bank, layer.routing, layer.key, layer.moved = bank, routing, key, False
        return layer

    def forward(self, input: Tensor) -> Tensor:
        """input (..., in_features), whose rows the routing knows, to (..., out_features)."""
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
