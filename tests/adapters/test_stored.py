"""Copies in files compared with the base: which rows differ, in any dtypes."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from fastlora.adapters import stored
from fastlora.adapters.stored import OwnRows, Stored, find_differing_rows, have_same_rows

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64


def keep_in_file(tmp_path, copy: Tensor, name: str = "x") -> Stored:
    save_file({name: copy.contiguous()}, tmp_path / f"{name}.safetensors")
    return Stored(tmp_path / f"{name}.safetensors", name)


def compare_with_base(tmp_path, copy: Tensor, base: Tensor) -> OwnRows | None:
    return find_differing_rows(keep_in_file(tmp_path, copy), lambda start, stop: base[start:stop])


@pytest.mark.parametrize("base", [F32, BF16, F16, F64])
@pytest.mark.parametrize("copy", [F32, BF16, F16, F64])
@pytest.mark.parametrize("shape", [(13, 5), (13,)])
def test_copy_of_any_dtype_equals_base(tmp_path, monkeypatch, base, copy, shape):
    """Upcast, cast down, or trained in a half and upcast; but not once a number has moved."""
    monkeypatch.setattr(stored, "_CHUNK", 8 * 5 * 3)  # five parts, the last one short
    W = torch.randn(shape, dtype=F64).to(base)
    for between in (copy, BF16, F16):
        held = W.to(between).to(copy)
        assert compare_with_base(tmp_path, held, W) is None
        for row in (0, 7, 12):
            moved = held.clone()
            moved[row] = moved[row] * 1.125
            found = compare_with_base(tmp_path, moved, W)
            assert found is not None
            assert found.indices.tolist() == [row]
            assert torch.equal(found.values, moved[[row]])
            assert (found.of, found.added) == (13, row == 12)


def test_rows_differ_when_their_bits_do(tmp_path):
    W = torch.tensor([[0.0, 1.0], [float("nan"), 2.0], [3.0, 4.0]])
    assert compare_with_base(tmp_path, W, W) is None
    found = compare_with_base(
        tmp_path, torch.tensor([[-0.0, 1.0], [float("nan"), 2.0], [3.0, 5.0]]), W
    )
    assert found is not None
    assert found.indices.tolist() == [0, 2]


def test_difference_rounded_away_in_base_is_ignored(tmp_path):
    """As loading it into the base would leave it; the other way round there is no excuse."""
    W = torch.randn(4, 6).to(BF16)
    nudged = W.float() * (1 + 2**-12)
    assert compare_with_base(tmp_path, nudged, W) is None
    assert compare_with_base(tmp_path, W.float(), nudged) is None  # rounded to bfloat16 it is that
    assert compare_with_base(tmp_path, W.float() * (1 + 2**-6), W) is not None


def test_rows_missing_in_base_count_as_added(tmp_path):
    W = torch.randn(4, 6)
    more = torch.cat([W, torch.randn(2, 6)])
    found = compare_with_base(tmp_path, more, W)
    assert found is not None
    assert found.indices.tolist() == [4, 5]
    assert found.added
    assert compare_with_base(tmp_path, W[:3], W) is None
    assert not have_same_rows(keep_in_file(tmp_path, more, "a"), keep_in_file(tmp_path, W, "b"))
    assert have_same_rows(keep_in_file(tmp_path, W, "a"), keep_in_file(tmp_path, W.to(BF16), "b"))
    assert not have_same_rows(
        keep_in_file(tmp_path, W, "a"), keep_in_file(tmp_path, W * 1.125, "b")
    )
    everything = compare_with_base(tmp_path, W + 1, W)
    assert everything is not None
    assert not everything.added
