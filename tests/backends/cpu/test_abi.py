"""The C functions, called as C would: any sizes, strides, types and nonsense."""

# Right results, nothing outside the operands touched, and nothing at all where a call is refused.
# Buffers lie between guards, or, where AddressSanitizer watches, end where the operand ends.

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastlora.backends import native
from tests.support.c_matrices import (
    BF16,
    F16,
    F32,
    LIBRARY,
    ROUNDING,
    SETS,
    Matrix,
    decoded,
    encoded,
    many,
    seeds,
    sizes,
)

if native.unusable() is not None:
    pytest.skip(str(native.unusable()), allow_module_level=True)


@pytest.fixture(scope="module", autouse=True)
def _as_before() -> Iterator[None]:
    before = native.instruction_set()
    yield
    native.use(before)


@many
@given(
    st.sampled_from(SETS), sizes, sizes, sizes, st.integers(0, 20), st.integers(0, 4),
    st.sampled_from([F32, BF16, F16]), st.booleans(), st.booleans(), st.booleans(),
    st.integers(0, 3), st.integers(1, 4), st.sampled_from([0, 0, 1, 4, 5]), seeds,
)  # fmt: skip
def test_c_multi_linear_is_right_for_any_operands(
    name, M, K, N, R, S, dtype, wide, whole, optional, gap, threads, page, seed
):
    """Slots that are dense, or in pages where ``page`` is not 0."""
    draw = np.random.default_rng(seed)
    lora = F32 if wide else dtype
    native.use(name)
    R = R // page * page if page else R

    def matrix(rows: int, columns: int, of: int, size: float = 1.0) -> Matrix:
        return Matrix(draw.standard_normal((rows, columns)) * size, of, columns + gap)

    x, y, h = matrix(M, K, dtype), matrix(M, N, dtype), matrix(M, R, dtype)
    whole = whole and N * K > 0
    weight, bias = matrix(N, K, dtype), matrix(1, N, dtype)
    size = max(R, 1) ** -0.5
    A, B = matrix(S * R, K, lora), matrix(S * N, R, lora, size)
    distances = (R * A.ld, A.ld), (N * B.ld, B.ld)
    table = np.zeros((S, 1), np.int32)
    pages = draw.integers(0, 6)
    if page:
        A, B = matrix(pages * page, K, lora), matrix(pages * page, N, lora, size)
        distances = (page * A.ld, A.ld), (page * B.ld, B.ld)
        table = draw.integers(-1, pages + 1, (S, R // page + gap)).astype(np.int32)
    ids = draw.integers(-1, S, M)
    order = np.argsort(ids, kind="stable").astype(np.int64)
    starts = np.searchsorted(ids[order], np.arange(S + 1)).astype(np.int64)
    scalings = draw.standard_normal(max(S, 1)).astype(np.float32)
    ranks = draw.integers(-1, R + 2, max(S, 1)).astype(np.int32)
    scales = draw.standard_normal(max(M, 1)).astype(np.float32)
    code = LIBRARY.fastlora_multi_lora_linear(
        y.pointer, y.ld, h.pointer, h.ld, x.pointer, x.ld,
        weight.pointer if whole else None, weight.ld, bias.pointer if whole and optional else None,
        A.pointer, *distances[0], B.pointer, *distances[1],
        order.ctypes.data, starts.ctypes.data, scalings.ctypes.data,
        ranks.ctypes.data if optional else None, scales.ctypes.data if optional else None,
        M, K, N, R, S, table.ctypes.data, table.shape[1], pages, page, dtype, lora, threads,
    )  # fmt: skip
    assert code == native.OK
    assert all(t.same() for t in (x, weight, bias, A, B))
    assert y.only_values_changed()
    assert h.same() if page else h.only_values_changed()
    before = decoded(encoded(y.values, dtype), dtype)
    want = x.get() @ weight.get().T + (bias.get() if optional else 0) if whole else before
    want = np.array(np.broadcast_to(want, (M, N)))
    for i, slot in enumerate(ids):
        if slot >= 0:
            r = min(max(ranks[slot], 0), R) if optional else R
            left = A.get()[slot * R : slot * R + r]
            right = B.get()[slot * N : (slot + 1) * N, :r].T
            if page:
                numbers = [(table[slot, k // page], k % page) for k in range(r)]
                at = [p * page + k for p, k in numbers if 0 <= p < pages]
                left, right = A.get()[at], B.get()[at]
            part = (left @ x.get()[i]) @ right
            want[i] += part * scalings[slot] * (scales[i] if optional else 1)
    scale = np.abs(want).max(initial=1.0) + np.sqrt(K + 1) * np.abs(scalings).max()
    assert np.abs(y.get() - want).max(initial=0) <= ROUNDING[dtype] * scale * 4


TABLE = np.zeros((2, 2), np.int32)


def assert_refused(**changes: object) -> None:
    """A good call with something wrong in it writes nothing."""
    draw = np.random.default_rng(7)
    M, K, N, R, S = 3, 8, 9, 2, 2
    t = {n: Matrix(draw.standard_normal(s), F32, s[1]) for n, s in {
        "y": (M, N), "h": (M, R), "x": (M, K), "w": (N, K), "a": (S * R, K), "b": (S * N, R)
    }.items()}  # fmt: skip
    given = {
        "y": t["y"].pointer, "ldy": N, "h": t["h"].pointer, "ldh": R, "x": t["x"].pointer, "ldx": K,
        "w": t["w"].pointer, "ldw": K, "bias": None, "a": t["a"].pointer, "lda_slot": R * K,
        "lda": K, "b": t["b"].pointer, "ldb_slot": N * R, "ldb": R,
        "order": np.array([0, 1, 2], np.int64), "starts": np.array([0, 2, 3], np.int64),
        "scalings": np.array([1, 1], np.float32), "ranks": None, "row_scales": None,
        "M": M, "K": K, "N": N, "R": R, "S": S, "table": None, "table_ld": 1, "pages": 0, "page": 0,
        "x_dtype": F32, "lora_dtype": F32, "threads": 1,
    }  # fmt: skip
    assert changes.keys() <= given.keys()
    given |= changes
    args = [v.ctypes.data if isinstance(v, np.ndarray) else v for v in given.values()]
    code = LIBRARY.fastlora_multi_lora_linear(*args)
    assert code == (native.OK if not changes else code)
    assert bool(changes) == (code != native.OK)
    if changes:
        assert all(matrix.same() for matrix in t.values())


@pytest.mark.parametrize(
    "changes",
    [
        {},
        *({size: -1} for size in ("M", "K", "N", "R", "S")),
        {"K": 2**62},
        *({name: None} for name in ("y", "h", "x", "a", "b", "starts", "scalings")),
        {"ldy": 8},
        {"ldh": 1},
        {"order": np.array([0, 1, 3], np.int64)},
        {"order": np.array([0, -1, 2], np.int64)},
        {"starts": np.array([0, 2, 4], np.int64)},
        {"starts": np.array([0, 2, 2], np.int64)},
        {"starts": np.array([2, 0, 3], np.int64)},
        {"starts": np.array([-1, 2, 3], np.int64)},
        {"scalings": np.array([1, np.nan], np.float32)},
        {"page": 2},
        {"page": -1, "table": TABLE},
        {"page": 3, "table": TABLE},
        {"page": 1, "pages": -1, "table": TABLE},
        {"page": 1, "pages": 1, "table": TABLE, "a": None},
        {"page": 1, "pages": 1, "table": TABLE, "b": None},
        {"x_dtype": 3},
        {"x_dtype": F32, "lora_dtype": BF16},
        {"lora_dtype": -1},
        {"threads": 0},
    ],
    ids=lambda changes: ",".join(changes) or "none",
)
def test_c_functions_refuse_nonsense_and_write_nothing(changes):
    assert_refused(**changes)


@many
@given(
    st.sampled_from(SETS), sizes, sizes, sizes, st.sampled_from([F32, BF16, F16]), st.booleans(),
    st.booleans(), st.integers(0, 3), st.integers(1, 4), seeds,
)  # fmt: skip
def test_c_gradient_is_right_for_any_operands(
    name, M, R, C, dtype, wide, transposed, gap, threads, seed
):
    draw = np.random.default_rng(seed)
    native.use(name)
    left = Matrix(draw.standard_normal((M, R)), dtype, R + gap)
    right = Matrix(draw.standard_normal((M, C)), dtype, C + gap)
    shape = (C, R) if transposed else (R, C)
    out = Matrix(np.full(shape, 7.0), F32 if wide else dtype, shape[1] + gap)
    strides = (1, out.ld) if transposed else (out.ld, 1)
    code = LIBRARY.fastlora_gradient(
        out.pointer, *strides, left.pointer, left.ld, right.pointer, right.ld, M, R, C, 0.5,
        dtype, out.dtype, threads,
    )  # fmt: skip
    assert code == native.OK
    assert left.same()
    assert right.same()
    assert out.only_values_changed()
    want = 0.5 * left.get().T @ right.get()
    error = np.abs(out.get() - (want.T if transposed else want)).max(initial=0)
    assert error <= ROUNDING[out.dtype] * (np.abs(want).max(initial=0) + 1)


def kept_by_definition(M: int, K: int, first_row: int, seed: int, threshold: int) -> np.ndarray:
    """The mask, a counter at a time, as its definition says."""
    keep = np.zeros((M, K), bool)
    for m in range(M):
        for group in range(-(-K // 8)):
            c, k = [group, first_row + m, 0, 0], [seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF]
            for _ in range(7):
                p, q = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
                c = [q >> 32 ^ c[1] ^ k[0], q & 0xFFFFFFFF, p >> 32 ^ c[3] ^ k[1], p & 0xFFFFFFFF]
                k = [k[0] + 0x9E3779B9 & 0xFFFFFFFF, k[1] + 0xBB67AE85 & 0xFFFFFFFF]
            lanes = [half for word in c for half in (word & 0xFFFF, word >> 16)]
            for i, lane in enumerate(lanes[: K - 8 * group]):
                keep[m, 8 * group + i] = lane >= threshold
    return keep


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from(SETS), st.integers(0, 5), st.one_of(sizes, st.integers(120, 300)),
    st.integers(0, 2**32 - 6), st.integers(-(2**63), 2**63 - 1),
    st.sampled_from([0, 1, 6554, 32768, 65535, 65536]), st.booleans(),
    st.sampled_from([F32, BF16, F16]), st.integers(0, 3), st.integers(1, 4), seeds,
)  # fmt: skip
def test_c_dropout_is_right_for_any_operands(
    name, M, K, first_row, key, threshold, add, dtype, gap, threads, seed
):
    draw = np.random.default_rng(seed)
    native.use(name)
    x = Matrix(draw.standard_normal((M, K)), dtype, K + gap)
    out = Matrix(draw.standard_normal((M, K)), dtype, K + 2 * gap)
    before = out.get().copy()
    code = LIBRARY.fastlora_dropout(
        out.pointer, out.ld, x.pointer, x.ld, M, K, first_row, key, threshold, 1.5, add, dtype,
        threads,
    )  # fmt: skip
    assert code == native.OK
    assert x.same()
    assert out.only_values_changed()
    keep = kept_by_definition(M, K, first_row, key, threshold)
    if not add:
        assert np.array_equal(out.get() != 0, keep & (x.get() != 0))
    want = 1.5 * keep * x.get() + (before if add else 0)
    assert np.abs(out.get() - want).max(initial=0) <= ROUNDING[dtype] * 8
    bad = {"threshold": 65537, "M": -1, "threads": 0, "dtype": 3, "first_row": -1}
    given_values = {"M": M, "first_row": first_row, "threshold": threshold}
    for argument, value in bad.items():
        v = given_values | {"dtype": dtype, "threads": threads, argument: value}
        code = LIBRARY.fastlora_dropout(
            out.pointer, out.ld, x.pointer, x.ld, v["M"], K, v["first_row"], key, v["threshold"],
            1.5, add, v["dtype"], v["threads"],
        )  # fmt: skip
        assert code == native.BAD_ARGUMENT
