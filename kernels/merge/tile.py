"""What merging does to a tile: its bits as numbers and back, its delta, its checksum.

Weights are read and written as raw integers, so that the bits that go back are those that came,
those of a NaN included.
"""

import triton
import triton.language as tl

from fastlora.kernels.tile.numerics import INTERPRETED, dot, narrow

# Rows and columns of a tile: a position in it fits 16 bits.
TILE_N, TILE_K = tl.constexpr(128), tl.constexpr(64)
# Bits, without the sign, from which on a float32 is no finite number.
INFINITE = tl.constexpr(0x7F800000)
# Ranks of a step of the product.
STEP = tl.constexpr(16)
# Up to this rank a product is a chain of multiplications and additions: padded to a step it would
# cost a tensor core as much, with less of float32's precision.
FEW = tl.constexpr(4)
# Elements of a receipt that a program writes back at a time.
ENTRIES = tl.constexpr(1024)
# Columns of the tables of weights and adapters.
WEIGHT = tl.constexpr(13)
ADAPTER = tl.constexpr(5)


@triton.jit
def pointers(
    weight, n, k, RAW: tl.constexpr, INNER: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """To rows n and columns k of the weight in this row of the table; INNER: its unit stride's.

    Computed anew wherever they are wanted, which reading the table as volatile makes the compiler
    do: kept, they would take a quarter of the registers.
    """
    p_w = tl.load(weight, volatile=True).to(tl.pointer_type(RAW))
    s_n, s_k = tl.load(weight + 1, volatile=True), tl.load(weight + 2, volatile=True)
    if INNER == 1:
        s_k = 1
        if ALIGNED:
            s_n = s_n // 8 * 8
    if INNER == 0:
        s_n = 1
        if ALIGNED:
            s_k = s_k // 8 * 8
    p_tile = p_w + n[:, None] * s_n + k[None, :] * s_k
    if ALIGNED:
        p_tile = tl.multiple_of(p_tile, (1, 16) if INNER == 1 else (16, 1))
    return p_tile


@triton.jit
def wide(raw, DTYPE: tl.constexpr):
    """The float32 number of raw bits."""
    if tl.bfloat16 == DTYPE:
        number = (raw.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        number = raw.to(DTYPE, bitcast=True).to(tl.float32)
    return number


@triton.jit
def rounded(t, DTYPE: tl.constexpr):
    """float32 numbers rounded once to what DTYPE has, still as float32."""
    if tl.float32 == DTYPE:
        number = t
    elif tl.bfloat16 == DTYPE and not INTERPRETED:
        # Two at a time, and back: the compiler converts one by one, at an eighth of the rate.
        number = tl.inline_asm_elementwise(
            "{ .reg .b32 both; cvt.rn.bf16x2.f32 both, $3, $2; shl.b32 $0, both, 16; "
            "and.b32 $1, both, 0xffff0000; }",
            "=r,=r,r,r", [t], dtype=tl.float32, is_pure=True, pack=2,
        )  # fmt: skip
    else:
        number = narrow(t, DTYPE).to(tl.float32)
    return number


@triton.jit
def raw_of(t, DTYPE: tl.constexpr, RAW: tl.constexpr):
    """The bits of numbers that DTYPE has."""
    if tl.bfloat16 == DTYPE:
        raw = (t.to(tl.int32, bitcast=True) >> 16).to(RAW)
    else:
        raw = t.to(DTYPE).to(RAW, bitcast=True)
    return raw


@triton.jit
def differs(t, raw, DTYPE: tl.constexpr, RAW: tl.constexpr):
    """Whether numbers that DTYPE has are others than those of raw bits, to the bit."""
    if tl.float16 == DTYPE:
        # In float32 a signalling NaN would be another one.
        other = raw_of(t, DTYPE, RAW) != raw
    else:
        other = t.to(tl.int32, bitcast=True) != wide(raw, DTYPE).to(tl.int32, bitcast=True)
    return other


@triton.jit
def delta(
    adapters, scales, first, count, n, k, N, K,
    LORA: tl.constexpr, PRECISION: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """d = sum of scale * B @ A of ``count`` adapters for rows n [TILE_N] and columns k [TILE_K].

    float32, in bits that the same kernel always gives: fixed steps in the order of the ranks, no
    contraction. Half-precision factors enter tensor cores as they are, float32 ones in three
    products of tf32 numbers.
    """
    total = tl.zeros([TILE_N, TILE_K], tl.float32)
    o_r = tl.arange(0, STEP)
    m_n, m_k = n < N, k < K
    for i in range(first, first + count):
        p = adapters + i * ADAPTER
        p_a = tl.load(p).to(tl.pointer_type(LORA))
        lda = tl.load(p + 1)
        p_b = tl.load(p + 2).to(tl.pointer_type(LORA))
        ldb = tl.load(p + 3)
        R = tl.load(p + 4).to(tl.int32)
        if ALIGNED:
            lda, ldb, R = lda // 8 * 8, ldb // 8 * 8, R // 8 * 8
        acc = tl.zeros([TILE_N, TILE_K], tl.float32)
        if R <= FEW:
            for r in range(R):
                b_a = tl.load(p_a + r * lda + k, mask=m_k, other=0.0).to(tl.float32)  # [TILE_K]
                b_b = tl.load(p_b + n * ldb + r, mask=m_n, other=0.0).to(tl.float32)  # [TILE_N]
                acc += b_b[:, None] * b_a[None, :]
        else:
            for r in range(0, R, STEP):
                m_r = r + o_r < R
                p_ra = p_a + (r + o_r)[:, None] * lda + k[None, :]
                p_rb = p_b + n[:, None] * ldb + (r + o_r)[None, :]
                if ALIGNED:
                    p_ra, p_rb = tl.multiple_of(p_ra, (1, 16)), tl.multiple_of(p_rb, (1, 16))
                b_a = tl.load(p_ra, mask=m_r[:, None] & m_k[None, :], other=0.0)  # [STEP, TILE_K]
                b_b = tl.load(p_rb, mask=m_n[:, None] & m_r[None, :], other=0.0)  # [TILE_N, STEP]
                acc = dot(b_b, b_a, acc, PRECISION)
        total += tl.load(scales + i) * acc
    return total


@triton.jit
def checksum(raw):
    """Sums a tile of bits, 0 where it ends: one changed element or two swapped ones change it.

    Rows modulo 2^32, by keys that are odd so that no difference vanishes; rows together modulo
    2^64.
    """
    if raw.dtype == tl.int16:
        words = raw.to(tl.uint32) & 0xFFFF
    else:
        # Else differences in the highest bits would vanish where keys differ by an even number.
        words = raw.to(tl.uint32, bitcast=True) * 0x9E3779B1
        words = words ^ (words >> 15)
    # 2^32 over the golden ratio.
    keys = (tl.arange(0, TILE_K).to(tl.uint32) * 2 + 1) * 0x9E3779B1
    modulo_keys = tl.broadcast_to(keys[None, :], [TILE_N, TILE_K])
    rows = tl.sum(words * modulo_keys, 1).to(tl.uint32)  # [TILE_N]
    places = tl.arange(0, TILE_N).to(tl.int64) * 2 + 1
    return tl.sum(rows.to(tl.int64) * places, 0)


@triton.jit
def magnitude(t):
    """Takes float32 numbers' bits without the sign: in order as they are, NaN last."""
    return t.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def packed(position, raw, PACK: tl.constexpr, RAW: tl.constexpr):
    """A place in a tile above the bits of what stands there: one store."""
    BITS: tl.constexpr = RAW.primitive_bitwidth
    return (position << BITS) | (raw.to(PACK) & ((1 << BITS) - 1))


@triton.jit
def put_back(
    weight, at, count, first_n, first_k, N, K,
    RAW: tl.constexpr, PACK: tl.constexpr, POOLED: tl.constexpr,
):  # fmt: skip
    """Writes the elements of a receipt from ``at`` on to where they stood in a tile of the weight.

    A receipt has positions and bits apart, a pool holds them packed. Positions that no tile has
    are passed over: an edited receipt writes nowhere else, and its checksum refuses it.
    """
    p_w = tl.load(weight).to(tl.pointer_type(RAW))
    s_n, s_k = tl.load(weight + 1), tl.load(weight + 2)
    for e in range(0, count, ENTRIES):
        o_e = e + tl.arange(0, ENTRIES)
        m_e = o_e < count
        if POOLED:
            p_pool = tl.load(weight + 11).to(tl.pointer_type(PACK)) + at
            b_pool = tl.load(p_pool + o_e, mask=m_e, other=0)
            position, b_e = (b_pool >> RAW.primitive_bitwidth).to(tl.int32), b_pool.to(RAW)
        else:
            p_positions = tl.load(weight + 11).to(tl.pointer_type(tl.int16)) + at
            p_bits = tl.load(weight + 12).to(tl.pointer_type(RAW)) + at
            position = tl.load(p_positions + o_e, mask=m_e, other=0).to(tl.int32) & 0xFFFF
            b_e = tl.load(p_bits + o_e, mask=m_e, other=0)
        n, k = first_n + position // TILE_K, first_k + position % TILE_K
        m_e = m_e & (position < TILE_N * TILE_K) & (n < N) & (k < K)
        tl.store(p_w + n * s_n + k * s_k, b_e, mask=m_e)
