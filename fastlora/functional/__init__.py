"""LoRA as functions: argument checks and autograd around one op each.

``y = x @ weight.T + bias + scaling * (dropout(x) @ lora_A.T) @ lora_B.T`` after Hu et al., "LoRA:
Low-Rank Adaptation of Large Language Models" (2021). Shape letters: M or T rows (tokens), K
in_features, N out_features, R rank, S adapter slots. Under autocast x, weight, bias are cast as
``torch.nn.functional.linear`` would cast them; adapters keep their dtype and so do their gradients.
"""

from __future__ import annotations

from torch import fx

from fastlora.functional.linear import base_linear as base_linear
from fastlora.functional.linear import lora_add_, lora_linear
from fastlora.functional.merge import (
    foreach_merge_,
    foreach_swap_,
    foreach_unmerge_,
    merge_,
    swap_,
    unmerge_,
)
from fastlora.functional.merge_stack import MergeStack
from fastlora.functional.multi import multi_lora_add_, multi_lora_linear
from fastlora.functional.prepared import PreparedAdd
from fastlora.functional.receipt import MergeReceipt
from fastlora.functional.row_groups import RowGroups, group_rows

# Leaves of torch.fx.symbolic_trace, whose proxies have no shapes to check.
for _name in ("lora_linear", "lora_add_", "multi_lora_linear", "multi_lora_add_", "base_linear"):
    fx.wrap(_name)

__all__ = [
    "MergeReceipt",
    "MergeStack",
    "PreparedAdd",
    "RowGroups",
    "foreach_merge_",
    "foreach_swap_",
    "foreach_unmerge_",
    "group_rows",
    "lora_add_",
    "lora_linear",
    "merge_",
    "multi_lora_add_",
    "multi_lora_linear",
    "swap_",
    "unmerge_",
]
