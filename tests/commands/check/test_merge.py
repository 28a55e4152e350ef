"""`fastlora check` finds every kind of fault in the merge ops."""

from __future__ import annotations

import pytest
import torch

from fastlora.backends import torch as reference
from fastlora.backends.merge_lists.operands import flatten_receipts
from fastlora.commands.check.judging import WrongResult
from fastlora.commands.check.merge import MergeSubject, list_merge_cases
from fastlora.commands.check.run import MERGES

CPU = torch.device("cpu")
RIGHT = {op: getattr(reference, op) for op in MERGES}


def subject(dtype: str = "bf16") -> MergeSubject:
    draw = torch.Generator().manual_seed(3)
    return MergeSubject(list_merge_cases(quick=True, gpu=False)[0], dtype, CPU, draw)


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16", "bf16+fp32"])
@pytest.mark.parametrize("op", MERGES)
def test_merge_subject_passes_the_reference(op, dtype):
    assert 0 <= subject(dtype).judge(op, RIGHT) <= 1


def too_much(weights, A, B, scalings, *rest):
    return reference.merge_(weights, A, B, [1.01 * s for s in scalings], *rest)


def not_the_last(weights, A, B, scalings, counts, receipt):
    before = weights[-1].clone()
    made = reference.merge_(weights, A, B, scalings, counts, receipt)
    weights[-1][-1] = before[-1]
    return made


def other_bits_for_good(weights, *args):
    made = reference.merge_(weights, *args)
    if not args[-1]:
        weights[0].view(-1)[-1] *= 1.01
    return made


def one_infinite(weights, *args):
    made = reference.merge_(weights, *args)
    weights[1].view(-1)[-1] = torch.inf
    return made


def one_bit_less(weights, *args):
    reference.unmerge_(weights, *args)
    raw = weights[0].view(torch.int16)
    raw[0, -1] ^= 1


def never_refusing(weights, *args):
    try:
        reference.unmerge_(weights, *args)
    except RuntimeError:
        return


def refusing_too_late(weights, *args):
    try:
        reference.unmerge_(weights, *args)
    except RuntimeError:
        weights[0].view(-1)[-1] += 1
        raise


def no_swap(weights, *args):
    made = reference.swap_(weights, *args)
    reference.unmerge_(weights, *args[5:], flatten_receipts(made))
    reference.merge_(weights, *args[:4], False)
    return made


@pytest.mark.parametrize(
    "op, wrong, says",
    [
        ("merge_", too_much, "times the error of one rounding"),
        ("merge_", not_the_last, "times the error of one rounding"),
        ("merge_", other_bits_for_good, "has other bits"),
        ("merge_", one_infinite, "not finite"),
        ("unmerge_", one_bit_less, "not every bit"),
        ("unmerge_", never_refusing, "an edited weight was unmerged"),
        ("unmerge_", refusing_too_late, "a refused unmerge changed"),
        ("swap_", no_swap, "a swap is not"),
    ],
)
def test_merge_subject_finds_every_kind_of_fault(op, wrong, says):
    functions = RIGHT | {op: wrong}
    with pytest.raises(WrongResult, match=says):
        subject().judge(op, functions)
