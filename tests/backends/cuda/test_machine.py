"""The GPU emulated on the host: instructions follow NVIDIA's manual, and mistakes show."""

# The layouts here are written from the figures of the PTX ISA manual, "Matrix Fragments for
# mma.m16n8k16 with floating point type" and "ldmatrix", once more.

import ctypes
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support import cuda_host

HERE = Path(__file__).parents[2] / "support"
RANDOM = np.random.default_rng(7)


@pytest.fixture(scope="module")
def machine() -> ctypes.CDLL:
    sources = [HERE / "machine.cu", cuda_host.CUDA / "library.cu"]
    library = cuda_host.compiled("libmachine.so", sources)
    if library is None:
        pytest.skip("no g++ here, or not Linux")
    loaded = ctypes.CDLL(str(library))
    loaded.fastlora_cuda_last_error.restype = ctypes.c_char_p
    return loaded


def run(machine, name: str, given: np.ndarray | None, out: np.ndarray, which: int = 0) -> int:
    def pointer(a: np.ndarray | None):
        return None if a is None else a.ctypes.data_as(ctypes.c_void_p)

    return getattr(machine, f"try_{name}")(pointer(given), pointer(out), which, None)


def chunks(count: int) -> np.ndarray:
    """Words at an address of 16 bytes."""
    raw = np.zeros(count * 4 + 4, np.uint32)
    return raw[(-(raw.ctypes.data // 4)) % 4 :][: count * 4].reshape(count, 4)


@pytest.mark.parametrize("transposed", [0, 1])
def test_ldmatrix_gives_lanes_their_matrix_parts(machine, transposed):
    given = RANDOM.integers(0, 1 << 16, (4, 8, 8)).astype(np.uint16)
    out = np.zeros((32, 4, 2), np.uint16)
    assert run(machine, "read_matrices", given, out, transposed) == 0
    seen = given.transpose(0, 2, 1) if transposed else given
    for lane in range(32):
        row, column = lane // 4, lane % 4 * 2
        for j in range(4):
            assert (out[lane, j] == seen[j, row, column : column + 2]).all()


@pytest.mark.parametrize("bfloat16", [0, 1])
def test_mma_matches_product_in_float(machine, bfloat16):
    dtype = torch.bfloat16 if bfloat16 else torch.float16
    a, b = (torch.randn(*shape).to(dtype) for shape in ((16, 16), (16, 8)))
    c = torch.randn(16, 8)
    raw_a, raw_b = (t.view(torch.int16).numpy().astype(np.uint16) for t in (a, b))
    given = np.zeros((32, 10), np.uint32)
    for lane in range(32):
        group, within = lane // 4, lane % 4
        for i in range(8):
            row = group if i < 2 or 4 <= i < 6 else group + 8
            column = within * 2 + (i & 1) + (8 if i >= 4 else 0)
            given[lane, i // 2] |= np.uint32(raw_a[row, column]) << np.uint32(16 * (i & 1))
        for i in range(4):
            row = within * 2 + (i & 1) + (8 if i >= 2 else 0)
            given[lane, 4 + i // 2] |= np.uint32(raw_b[row, group]) << np.uint32(16 * (i & 1))
        for i in range(4):
            row, column = group + (8 if i >= 2 else 0), within * 2 + (i & 1)
            given[lane, 6 + i] = c[row, column : column + 1].numpy().view(np.uint32)[0]
    out = np.zeros((32, 4), np.float32)
    assert run(machine, "multiply_once", given, out, bfloat16) == 0
    want = (a.double() @ b.double() + c.double()).numpy()
    for lane in range(32):
        for i in range(4):
            row, column = lane // 4 + (8 if i >= 2 else 0), lane % 4 * 2 + (i & 1)
            assert out[lane, i] == pytest.approx(want[row, column], rel=1e-6, abs=1e-6)


def test_prefix_sums_are_right_in_any_order(machine):
    given = RANDOM.integers(-99, 99, 128).astype(np.int32)
    for seed in range(6):
        out = np.zeros(128, np.int32)
        with cuda_host.order(machine, seed):
            assert run(machine, "prefix_sums", given, out) == 0
        assert (out == np.cumsum(given)).all()


def test_missing_barrier_changes_results_across_orders(machine):
    """Another order of the threads, other results: what the kernels' own tests look for."""
    given = RANDOM.integers(1, 99, 128).astype(np.int32)
    seen = set()
    for seed in range(6):
        out = np.zeros(128, np.int32)
        with cuda_host.order(machine, seed):
            assert run(machine, "prefix_sums", given, out, 1) == 0
        seen.add(out.tobytes())
    assert len(seen) > 1


def test_cp_async_arrives_only_after_wait(machine):
    given, out = chunks(32), chunks(32)
    given[:] = RANDOM.integers(0, 1 << 31, (32, 4))
    assert run(machine, "copy_through", given, out) == 0
    assert (out[:16] == given[:16]).all()
    assert not out[16:].any()
    # Who does not wait reads NaN.
    assert run(machine, "copy_through", given, out, 1) == 0
    assert (out == 0xFFFFFFFF).all()


def test_cp_async_refuses_unaligned_address(machine):
    raw, out = chunks(33).reshape(-1), chunks(32)
    assert run(machine, "copy_through", raw[1:], out) == 6
    assert b"copy_through: cp.async" in machine.fastlora_cuda_last_error()


def test_dependent_launch_without_wait_runs_early(machine):
    out = np.full(32, -1, np.int32)
    assert run(machine, "side_by_side", None, out) == 0
    assert (out == np.arange(32) + 1).all()
    # The second launch has begun before the first: without a wait it loses.
    assert run(machine, "side_by_side", None, out, 1) == 0
    assert (out == np.arange(32)).all()


@pytest.mark.parametrize("which, reason", [(0, b"32 of 64 threads"), (1, b"lanes of a warp")])
def test_kernel_that_would_hang_is_an_error(machine, which, reason):
    out = np.zeros(64, np.int32)
    assert run(machine, "stuck", None, out, which) == 6
    assert reason in machine.fastlora_cuda_last_error()
    # And the next launch is not troubled by it.
    test_prefix_sums_are_right_in_any_order(machine)


def test_conversions_have_the_bits_of_torch(machine):
    special = [0.0, -0.0, 1.0, 65504.0, 65519.9, 65520.0, 1e-8, 6e-8, 3e-5, 6.1e-5, float("inf")]
    drawn = torch.randn(4000) * torch.logspace(-12, 12, 4000)
    halves = (torch.randn(500).bfloat16().float() * (1 + 2**-9), torch.randn(500) * 2**-24)
    given = torch.cat((torch.tensor(special), drawn, *halves)).float()
    out = np.zeros((len(given), 4), np.uint32)
    assert run(machine, "convert", given.numpy(), out, len(given)) == 0
    for column, dtype in enumerate((torch.bfloat16, torch.float16)):
        want = given.to(dtype)
        raw = want.view(torch.int16).numpy().astype(np.uint16)
        other = (-given).to(dtype).view(torch.int16).numpy().astype(np.uint16)
        assert (out[:, column] & 0xFFFF == raw).all()
        assert (out[:, column] >> 16 == other).all()
        assert (out[:, 2 + column] == want.float().numpy().view(np.uint32)).all()
    nan = np.array([np.nan], np.float32)
    assert run(machine, "convert", nan, out[:1], 1) == 0
    assert out[0, 0] == out[0, 1] == 0x7FFF7FFF
