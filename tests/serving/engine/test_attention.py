"""Attention over rows agrees with a float64 loop, with NaN in memory it must not read."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastlora.serving.engine.attention import Piece, Step
from fastlora.serving.engine.cache import LayerSpec, RowCache

CPU = torch.device("cpu")
# Rows and the parts in which their tokens come, a step each; "-" is a step without.
STEPS = [
    [Piece(2, 0, 5)],
    [Piece(2, 5, 6), Piece(0, 0, 3)],
    [Piece(0, 3, 4), Piece(2, 6, 7), Piece(3, 0, 9), Piece(1, 0, 2)],
    [Piece(1, 2, 3), Piece(2, 7, 8), Piece(3, 9, 12)],
    [Piece(row, end, end + 1) for row, end in ((0, 4), (1, 3), (2, 8), (3, 12))],
]
SHAPES = {"as many keys": (4, 4, 8, 8), "shared": (6, 2, 8, 8), "other values": (4, 2, 8, 5)}


def oracle(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
    """q (heads, n, size) of a whole text, one token and head at a time: (n, heads, size)."""
    heads, n, _ = q.shape
    shared = heads // k.shape[0]
    y = torch.empty(n, heads, v.shape[-1], dtype=torch.float64)
    for t in range(n):
        first = 0 if window is None else max(0, t + 1 - window)
        for h in range(heads):
            past = slice(first, t + 1)
            scores = scale * (k[h // shared, past].double() @ q[h, t].double())
            y[t, h] = scores.softmax(0) @ v[h // shared, past].double()
    return y


@pytest.mark.parametrize("window", [None, 1, 4])
@pytest.mark.parametrize("shape", SHAPES)
def test_attend_matches_oracle_for_rows_in_pieces(shape, window):
    heads, kept, size, value_size = SHAPES[shape]
    lengths = [5, 4, 9, 13]
    torch.manual_seed(1)
    q = [torch.randn(heads, n, size) for n in lengths]
    k = [torch.randn(kept, n, size) for n in lengths]
    v = [torch.randn(kept, n, value_size) for n in lengths]
    cache = RowCache(5, 21, {7: LayerSpec(kept, size, value_size, torch.float32, CPU)})
    for keys in cache.layers[7]:
        keys[4] = float("nan")  # a row of somebody else
    got = [torch.empty(n, heads, value_size) for n in lengths]
    for pieces in STEPS:
        singles = sum(p.end - p.start == 1 for p in pieces)
        step = Step(cache, pieces, singles, CPU)
        new = [
            torch.cat([t[p.row][:, p.start : p.end] for p in pieces], 1)[None] for t in (q, k, v)
        ]
        out = step.attend(7, *new, 0.3, window)[0]
        assert step.positions.tolist() == [i for p in pieces for i in range(p.start, p.end)]
        for p, rows in zip(pieces, out.split([p.end - p.start for p in pieces]), strict=True):
            got[p.row][p.start : p.end] = rows
    for row, n in enumerate(lengths):
        want = oracle(q[row], k[row], v[row], 0.3, window)
        assert (got[row] - want).norm() <= 1e-6 * want.norm()
        assert cache._written[row] == n


def test_attend_keeps_nan_within_its_row():
    cache = RowCache(2, 16)
    bad, good = torch.full((1, 2, 6, 4), float("nan")), torch.randn(1, 2, 6, 4)
    Step(cache, [Piece(0, 0, 6)], 0, CPU).attend(0, bad, bad, bad, None, None)
    step = Step(cache, [Piece(1, 0, 6)], 0, CPU)
    want = step.attend(0, good, good, good, None, None)
    assert bool(want.isfinite().all())
    # Beside the bad row.
    both = Step(cache, [Piece(0, 6, 7), Piece(1, 6, 7)], 2, CPU)
    pair = torch.cat([bad[:, :, :1], good[:, :, :1]], 2)
    out = both.attend(0, pair, pair, pair, None, None)[0]
    assert bool(out[0].isnan().all())
    assert bool(out[1].isfinite().all())
    # In its place: shorter than what was there, in a batch with one as long.
    cache.clear(0)
    assert not any(bool(t[0].any()) for t in cache.layers[0])
    again = Step(cache, [Piece(0, 0, 1), Piece(1, 7, 8)], 2, CPU)
    two = torch.cat([good[:, :, :1]] * 2, 2)
    out = again.attend(0, two, two, two, None, None)[0]
    assert bool(out.isfinite().all())
    assert torch.allclose(out[0], good[0, :, 0])


def test_attend_refuses_second_call_of_a_layer():
    step = Step(RowCache(1, 8), [Piece(0, 0, 2)], 0, CPU)
    x = torch.randn(1, 2, 2, 4)
    step.attend(3, x, x, x, None, None)
    with pytest.raises(ValueError, match="layer 3 attends twice a step"):
        step.attend(3, x, x, x, None, None)


def test_row_cache_takes_bytes_of_given_specs():
    kinds = {i: LayerSpec(2, 8, 4, torch.bfloat16, CPU) for i in range(3)}
    cache = RowCache(5, 21, kinds)
    assert cache.specs == kinds
    assert cache.nbytes == 3 * 5 * 2 * 24 * (8 + 4) * 2  # 21 positions lie in 24
    assert [cache.round_up(n) for n in (0, 1, 8, 9, 21)] == [0, 8, 8, 16, 24]
