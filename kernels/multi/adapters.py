"""Which adapter a row has, and where that adapter lies: what the multi-adapter kernels share.

A slot's A has a row for each rank, its B too (rank-major, or the strides of the dense form). They
lie in slots of R ranks, or in pages of PAGE ranks that a table (S, pages a slot) names, so that a
slot of rank 8 takes one page where another takes sixteen. A packed projection has ``ends``, where
its slices of columns end; a slot then holds A for each slice, and B's columns are all of them.

Nothing here is known to the host: ids, ranks, scales and pages are read from the device. An id or
a page out of range is none.
"""

import triton
import triton.language as tl

from fastlora.kernels.tile.numerics import dot, narrow


@triton.jit
def slots_of(p_ids, rows, mask, S):
    """The slots of rows [BM]; -1 where a row has none, lies outside or names one out of range."""
    b_ids = tl.load(p_ids + rows, mask=mask, other=-1).to(tl.int32)
    return tl.where((b_ids >= 0) & (b_ids < S), b_ids, -1)


@triton.jit
def ranks_of(p_ranks, slots, R, RANKS: tl.constexpr):
    """How many ranks slots have, tile or scalar: at most R, none for -1."""
    b_ranks = tl.where(slots >= 0, R, 0)
    if RANKS:
        b_given = tl.load(p_ranks + slots, mask=slots >= 0, other=0)
        b_ranks = tl.minimum(tl.maximum(b_given, 0), R).to(tl.int32)
    return b_ranks


@triton.jit
def factors_of(p_scalings, p_row_scales, slots, b_ranks, rows, ROW_SCALES: tl.constexpr):
    """Finds a row's factor of its adapter part [BM]; 0 for rows of none and of no ranks."""
    used = tl.where(b_ranks > 0, slots, -1) >= 0
    b_factors = tl.load(p_scalings + slots, mask=used, other=0.0).to(tl.float32)
    if ROW_SCALES:
        b_factors *= tl.load(p_row_scales + rows, mask=used, other=0.0).to(tl.float32)
    return b_factors


@triton.jit
def next_slot(slots, after, S):
    """The smallest of slots [BM] beyond ``after``, S if there is none."""
    return tl.min(tl.where(slots > after, slots, S))


@triton.jit
def sorted_tile(p_order, p_ids, tile, T, S, BM: tl.constexpr):
    """Sorted rows number ``tile`` [BM], their slots, and which of the tile's adapters each is.

    Rows of one adapter lie side by side once sorted, so a tile holds few. The adapters count from
    0 in ascending order, rows of none first; places past the last row have slot S.
    """
    places = tl.arange(0, BM)
    inside = tile * BM + places < T
    rows = tl.load(p_order + tile * BM + places, mask=inside, other=0).to(tl.int64)
    slots = tl.where(inside, slots_of(p_ids, rows, inside, S), S)
    # In two steps of all pairs, whatever the order: who is the first of its slot, how many of
    # those are smaller.
    same = slots[:, None] == slots[None, :]
    repeated = tl.max((same & (places[:, None] < places[None, :])).to(tl.int32), 0)
    smaller = (slots[:, None] < slots[None, :]).to(tl.int32)
    number = tl.sum(tl.where(repeated[:, None] == 0, smaller, 0), 0)
    return rows, slots, number


@triton.jit
def numbered(slots, number, turn, S):
    """The slot of the tile's adapter number ``turn``, S if there are fewer."""
    return tl.min(tl.where(number == turn, slots, S))


@triton.jit
def places(
    p_table, slots, ranks, mask, pages, s_table, s_slot, s_rank,
    TABLE: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """Where rows of A or B begin, and which of those in mask there are; slots or ranks a scalar."""
    if TABLE:
        o_table = slots.to(tl.int64) * s_table + ranks // PAGE
        b_pages = tl.load(p_table + o_table, mask=mask, other=-1)
        mask = mask & (b_pages >= 0) & (b_pages < pages)
        o_rows = b_pages.to(tl.int64) * s_slot + (ranks % PAGE).to(tl.int64) * s_rank
    else:
        o_rows = slots.to(tl.int64) * s_slot + ranks.to(tl.int64) * s_rank
    return o_rows, mask


@triton.jit
def load_h(p_h, o_h, mask, s_part, PARTS: tl.constexpr):
    """A tile of h in float32: the sum, in order, of the parts that K was split into."""
    b_h = tl.load(p_h + o_h, mask=mask, other=0.0).to(tl.float32)
    for _ in tl.static_range(1, PARTS):
        p_h += s_part
        b_h += tl.load(p_h + o_h, mask=mask, other=0.0)
    return b_h


@triton.jit
def slice_of(tile, ends, BN: tl.constexpr):
    """The slice of a tile of columns: which, where it begins and ends; the tile's first column."""
    which, begin, first, end, tiles, start = 0, 0, tile * BN, ends[0], 0, 0
    for c in tl.static_range(len(ends)):
        here = tile >= tiles
        which = tl.where(here, c, which)
        begin = tl.where(here, start, begin)
        first = tl.where(here, start + (tile - tiles) * BN, first)
        end = tl.where(here, ends[c], end)
        tiles += tl.cdiv(ends[c] - start, BN)
        start = ends[c]
    return which, begin, end, first


@triton.jit
def adapter_steps(
    acc, p_h, p_b, p_table, slots, b_ranks, rows, columns, N, R, S, pages,
    s_h_t, s_b_slot, s_b_r, s_b_n, s_table,
    BR: tl.constexpr, TABLE: tl.constexpr, PAGE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc [BM, BN] plus every row's ``h @ b``, an adapter after the other, in ascending order.

    Other rows' h enters as 0, which leaves their sums as they are unless b is not finite: then 0
    stands in for it, and the adapter's own rows become NaN in that column.
    """
    o_b = columns.to(tl.int64)[None, :] * s_b_n
    o_h = rows.to(tl.int64)[:, None] * s_h_t
    slot = next_slot(slots, -1, S)
    while slot < S:
        mine = slots == slot
        r = tl.max(tl.where(mine, b_ranks, 0))
        for first in tl.range(0, r, BR, num_stages=1):
            ranks = first + tl.arange(0, BR)
            o_rank, m_rank = places(
                p_table, slot, ranks, ranks < r, pages, s_table, s_b_slot, s_b_r, TABLE, PAGE
            )
            # Up to R, whose steps the compiler knows: past r the shrink has written zeros.
            m_h = mine[:, None] & (ranks < R)[None, :]
            m_b = m_rank[:, None] & (columns < N)[None, :]
            b_h = tl.load(p_h + o_h + ranks[None, :], mask=m_h, other=0.0)  # [BM, BR]
            b_b = tl.load(p_b + o_rank[:, None] + o_b, mask=m_b, other=0.0)  # [BR, BN]
            b_b = narrow(b_b, b_h.dtype)
            finite = tl.abs(b_b.to(tl.float32)) < float("inf")
            acc = dot(b_h, tl.where(finite, b_b, 0.0), acc, PRECISION)
            lost = tl.max(tl.where(finite, 0, 1), 0)
            if tl.max(lost) > 0:
                acc = tl.where(mine[:, None] & (lost > 0)[None, :], float("nan"), acc)
        slot = next_slot(slots, slot, S)
    return acc
