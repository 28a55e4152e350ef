"""Merging of the adapter into the weights, and out again to the last bit."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import fastlora
from fastlora.demo.adapters import SAME_LOGITS, Probe, compute_logits
from fastlora.demo.model import clone
from fastlora.demo.settings import Stage

_AS_INTEGER = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def merge(stage: Stage, domain: str, probe: Probe) -> None:
    """Merges and unmerges the adapter of ``domain``; claims same outputs, then the same bits."""
    stage.screen.chapter(f"Merged and unmerged: {domain}'s adapter")
    stage.screen.announce("merging")
    model = fastlora.load_adapter(clone(stage.base), stage.adapter_folder(domain)).eval()
    before = copy_bits(model)
    fastlora.merge_adapter(model)
    error = probe.error(compute_logits(model, probe.row))
    changed = list_different(before, copy_bits(model))
    fastlora.unmerge_adapter(model)
    still_different = list_different(before, copy_bits(model))
    stage.screen.table(
        ["", "tensors that differ from before", "logits off by"],
        [
            ["merged", str(len(changed)), f"{error:.1e}"],
            [
                "unmerged",
                str(len(still_different)),
                f"{probe.error(compute_logits(model, probe.row)):.1e}",
            ],
        ],
    )
    stage.claims.check(
        "merged, the model gives the same logits",
        error <= SAME_LOGITS and len(changed) > 0,
        f"off by {error:.0e} of the largest, {len(changed)} weights changed",
    )
    stage.claims.check(
        "unmerged, every bit of every tensor is back",
        not still_different,
        f"{len(before) - len(still_different)} of {len(before)} tensors equal",
    )


def copy_bits(model: nn.Module) -> dict[str, Tensor]:
    """Copies all parameters and buffers as integers: no two bit patterns compare equal."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {n: t.detach().clone().view(_AS_INTEGER[t.element_size()]) for n, t in tensors}


def list_different(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    """Lists the tensors that are not the same in both."""
    return [n for n in a.keys() | b.keys() if n not in a or n not in b or not a[n].equal(b[n])]
