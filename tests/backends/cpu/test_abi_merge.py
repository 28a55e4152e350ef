"""The C functions that merge, called as C would."""

import ctypes

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastlora.backends import native

if native.unusable() is not None:
    pytest.skip(str(native.unusable()), allow_module_level=True)
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


@many
@given(
    st.sampled_from(SETS), sizes, st.one_of(sizes, st.integers(60, 300)), st.integers(0, 9),
    st.sampled_from([F32, BF16, F16]), st.integers(0, 3), st.integers(1, 4), seeds,
    st.sampled_from(
        ["good", "for good", "not finite", "edited", "positions", "bits", "counts", "checksum"]
    ),
)  # fmt: skip
def test_c_merge_and_unmerge_handle_any_operands(name, N, K, R, dtype, gap, threads, seed, story):
    draw = np.random.default_rng(seed)
    native.use(name)
    weight = Matrix(draw.standard_normal((N, K)), dtype, K + gap)
    A = Matrix(draw.standard_normal((R, K)), F32, K)
    B = Matrix(draw.standard_normal((N, R)) * 0.3, F32, R)
    if story == "not finite" and B.values.size and K:
        B.rows()[draw.integers(N), draw.integers(R)] = np.inf
    arguments = (weight.pointer, weight.ld, 1, A.pointer, B.pointer, N, K, R, dtype, threads)
    handle = ctypes.c_void_p()
    where = None if story == "for good" else ctypes.byref(handle)
    code = LIBRARY.fastlora_merge(*arguments, where)
    if story == "not finite" and B.values.size and K:
        assert code == native.NOT_FINITE
        assert not handle
        assert weight.same()
        return
    assert code == native.OK
    assert weight.only_values_changed()
    if story == "for good":
        again = Matrix(weight.values, dtype, K + gap)
        assert LIBRARY.fastlora_merge(again.pointer, *arguments[1:], ctypes.byref(handle)) == 0
        LIBRARY.fastlora_receipt_free(handle)
        assert again.raw.tobytes() == weight.raw.tobytes()
        return
    tiles = 0 if not N * K else -(-N // (65536 // min(K, 65536)))
    size = LIBRARY.fastlora_receipt_size(handle)
    item = 4 if dtype == F32 else 2
    positions, bits = np.zeros(size, np.uint16), np.zeros(size * item, np.uint8)
    counts, checksums = np.zeros(tiles, np.int32), np.zeros(2, np.int64)
    parts = (positions, bits, counts, checksums)
    assert LIBRARY.fastlora_receipt_read(handle, *(p.ctypes.data for p in parts)) == native.OK
    LIBRARY.fastlora_receipt_free(handle)
    want = weight.values if not R else weight.values + B.get() @ A.get()
    error = np.abs(weight.get() - decoded(encoded(want, dtype), dtype)).max(initial=0)
    assert error <= ROUNDING[dtype] * (np.abs(want).max(initial=0) + 1)

    wrong = True
    if story == "edited" and N * K:
        weight.rows()[draw.integers(N), draw.integers(K)] = 0
    elif story == "positions" and size:
        positions[:] = draw.integers(0, 65536, size)
    elif story == "bits" and size:
        bits[draw.integers(len(bits))] ^= 1
    elif story == "counts" and tiles:
        counts[0] += draw.choice([-(2**30), -1, 1, 2**30])
    elif story == "checksum" and N * K:
        checksums[draw.integers(2)] += 1
    else:
        wrong = False
    merged = weight.raw.tobytes()
    code = LIBRARY.fastlora_unmerge(
        *arguments, positions.ctypes.data, bits.ctypes.data, counts.ctypes.data, size,
        checksums.ctypes.data,
    )  # fmt: skip
    if not wrong:
        assert code == native.OK
        assert weight.same()
    elif code == native.OK:
        # What was changed did not matter: a weight of 0 that was 0, the same positions again.
        assert story in ("edited", "positions")
        assert weight.same()
    else:
        assert weight.raw.tobytes() == merged
