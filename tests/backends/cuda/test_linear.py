"""The CUDA kernels for one adapter, on a GPU or on the host, against the oracle."""

import math

import pytest
import torch
from torch import Tensor

import fastlora
from fastlora import functional as F
from fastlora.backends import dropout, native
from fastlora.backends.cuda import call as cuda_call
from fastlora.backends.cuda import linear as cuda_linear
from fastlora.kernels.tile.gpu import arch_of
from fastlora.ops import dispatch
from fastlora.ops.run import Refused, strictly
from tests.support import cuda_host, oracle
from tests.support.cuda_calls import call_kernel
from tests.support.helpers import (
    LAYOUTS,
    assert_accurate,
    contiguous,
    lora_linear,
    misaligned,
    operands,
    same_bits,
    signed,
    transposed,
)
from tests.thinning import skip_where

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
# M, K, N, R: rows of any number, the rest in chunks of 8; several tiles and parts of one.
SHAPES = [(1, 64, 40, 8), (63, 1128, 72, 16), (431, 136, 264, 24), (2049, 24, 136, 64)]
WIDE = [(5, 40, 2056, 16), (300, 72, 2056, 80)]
if cuda_host.SANITIZED:
    SHAPES, WIDE = [(1, 64, 40, 8), (63, 136, 72, 16)], [(70, 40, 264, 16), (70, 40, 264, 80)]
SCALING, SEED = -0.75, 0x1234_5678_9ABC_DEF1
PATHS = ("cuda_one_pass", "cuda_two_pass", "cuda_overlapped")
dtypes = pytest.mark.parametrize(
    "dtype, lora_dtype",
    [(BF16, BF16), (F16, F16), (BF16, F32), (F16, F32)],
    ids=["bf16", "fp16", "bf16+fp32", "fp16+fp32"],
)
pytestmark = pytest.mark.usefixtures("on_cuda_kernels", "memory_holds_nan")


def mask_options(M: int, K: int, p: float, device) -> dict[str, object]:
    if not p:
        return {}
    mask = dropout.keep_mask(M, K, p, torch.tensor(SEED, device=device))
    return {"keep": mask, "keep_scale": dropout.keep_scale(p)}


def assert_right(M, K, N, R, dtype, lora_dtype, p, path, device, tile=None, monkeypatch=None):
    """Output, h and the gradient for x."""
    if tile is not None:
        monkeypatch.setattr(cuda_linear, "tile_of", lambda *_: tile)
    x, weight, bias, A, B, lora_bias = operands(M, K, N, R, dtype, lora_dtype, device)
    seed, keep = torch.tensor(SEED, device=device) if p else None, mask_options(M, K, p, device)
    plain = {"bias": bias, "lora_bias": lora_bias}
    unfused = lora_linear(x, weight, A, B, SCALING, **plain, **keep)
    want = oracle.lora_linear(x, weight, A, B, SCALING, **plain, **keep)
    y, h = call_kernel("lora_linear", x, weight, bias, A, B, lora_bias, SCALING, p, seed, path=path)
    assert_accurate(y, want, unfused, dtype)
    seen = x.double() * keep["keep"] * keep["keep_scale"] if p else x.double()
    assert oracle.relative_error(h, (seen @ A.double().T).cpu()) <= 4 * torch.finfo(dtype).eps
    dy = signed(M, N, dtype=dtype, device=device)
    (dx,) = call_kernel(
        "lora_linear_backward",
        dy,
        x,
        weight,
        A,
        B,
        h,
        SCALING,
        p,
        seed,
        (True, *[False] * 5),
        path=path,
    )
    grads = oracle.lora_linear_grads(dy, x, weight, A, B, SCALING, **keep)
    leaf = x.clone().requires_grad_()
    (other,) = torch.autograd.grad(lora_linear(leaf, weight, A, B, SCALING, **keep), leaf, dy)
    assert_accurate(dx, grads["x"], other, dtype)


def tile_too_large(tile, device) -> str | None:
    fits = tile != cuda_linear.TILE_256 or arch_of(device) not in cuda_call.SMALL
    return None if fits else "this GPU has too little shared memory for the tile"


@pytest.mark.parametrize("M, K, N, R", SHAPES + WIDE)
@pytest.mark.parametrize("tile", [cuda_linear.TILE_64, cuda_linear.TILE_128, cuda_linear.TILE_256])
@skip_where(tile_too_large)
@dtypes
def test_two_pass_matches_oracle_for_many_rows(
    M, K, N, R, dtype, lora_dtype, tile, device, monkeypatch
):
    path = "cuda_overlapped" if arch_of(device) >= 90 else "cuda_two_pass"
    assert_right(M, K, N, R, dtype, lora_dtype, 0.0, path, device, tile, monkeypatch)


@pytest.mark.parametrize("M, K, N, R", SHAPES[:2] + WIDE[:1] + [(17, 200, 48, 64), (45, 8, 8, 40)])
@pytest.mark.parametrize("dtype", [BF16, F16])
def test_one_pass_matches_oracle_for_few_rows(M, K, N, R, dtype, device):
    assert_right(M, K, N, R, dtype, dtype, 0.0, "cuda_one_pass", device)


@pytest.mark.parametrize("p", [0.3, 1.0])
@dtypes
def test_dropout_matches_oracle_in_both_directions(p, dtype, lora_dtype, device):
    """The mask is of x in forward, of the LoRA term in the gradient for x."""
    for tile in (cuda_linear.TILE_64, cuda_linear.TILE_128):
        with pytest.MonkeyPatch.context() as patch:
            shape = (150, 136, 88, 16)
            assert_right(*shape, dtype, lora_dtype, p, "cuda_two_pass", device, tile, patch)


@dtypes
def test_gradients_match_oracle_across_backends(dtype, lora_dtype, device):
    """Through autograd: what these kernels do not compute another backend does."""
    x, weight, bias, A, B, lora_bias = operands(40, 64, 48, 16, dtype, lora_dtype, device)
    leaves = [t.requires_grad_() for t in (x, weight, bias, A, B, lora_bias)]
    dy = signed(40, 48, dtype=dtype, device=device)
    plain = {"bias": leaves[2], "lora_bias": leaves[5]}
    args = (leaves[0], leaves[1], leaves[3], leaves[4], SCALING)
    unfused = torch.autograd.grad(lora_linear(*args, **plain), leaves, dy)
    got = torch.autograd.grad(F.lora_linear(*args, **plain), leaves, dy)
    wide = [t.detach().double().requires_grad_() for t in leaves]
    exact = lora_linear(
        wide[0], wide[1], wide[3], wide[4], SCALING, bias=wide[2], lora_bias=wide[5]
    )
    want = torch.autograd.grad(exact, wide, dy.double())
    for a, b, c in zip(got, want, unfused, strict=True):
        assert a.dtype == c.dtype
        assert_accurate(a, b.cpu(), c, dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_refused_layouts_run_on_the_next_backend(layout, device, caplog):
    """Any layout gives the right numbers; what the kernels cannot read they say."""
    dispatch._logged.clear()
    given = [layout(t) for t in operands(9, 40, 48, 8, BF16, BF16, device)]
    x, weight, bias, A, B, _ = given
    y = F.lora_linear(x, weight, A, B, SCALING, bias=bias)
    want = oracle.lora_linear(x, weight, A, B, SCALING, bias=bias)
    assert_accurate(y, want, lora_linear(x, weight, A, B, SCALING, bias=bias), BF16)
    said = "runs on another backend than the CUDA kernels" in caplog.text
    # A slice starts at another address, which may by chance be a good one.
    assert said == (layout is not contiguous)


@pytest.mark.parametrize(
    "M, K, N, R, dtype, reason",
    [
        (3, 65, 8, 8, BF16, "multiples of 8"),
        (3, 64, 9, 8, BF16, "multiples of 8"),
        (3, 64, 8, 3, BF16, "multiples of 8"),
        (3, 64, 8, 8, F32, "not half precision"),
        (0, 64, 8, 8, BF16, "nothing to multiply"),
        (3, 64, 8, 520, BF16, "beyond 512"),
    ],
)
def test_refusal_of_operands_is_logged_with_reason(M, K, N, R, dtype, reason, device, caplog):
    dispatch._logged.clear()
    x, weight, _, A, B, _ = operands(M, K, N, R, dtype, dtype, device)
    y = F.lora_linear(x, weight, A, B, SCALING)
    assert y.shape == (M, N)
    assert reason in caplog.text


def test_strictly_raises_instead_of_another_backend(device):
    """As benchmarks ask, which would else time another backend."""
    x, weight, _, A, B, _ = operands(3, 64, 8, 8, BF16, BF16, device)
    with strictly():
        F.lora_linear(x, weight, A, B, SCALING)
        with pytest.raises(Refused, match="lora_linear: lora_B has sizes"):
            F.lora_linear(x, weight, A[:3], B[:, :3], SCALING)


def test_kernels_read_nothing_around_their_operands(device):
    """Views into NaN, at good addresses: a row's neighbours stay unread."""
    x, weight, bias, A, B, _ = operands(33, 40, 48, 8, BF16, BF16, device)

    def inside(t: Tensor) -> Tensor:
        wide = t.new_full((t.shape[0] + 2, t.shape[1] + 16), math.nan)
        middle = wide[1:-1, 8:-8]
        return middle.copy_(t)

    y, _ = call_kernel("lora_linear",
        inside(x), inside(weight), bias, inside(A), inside(B), None, SCALING, 0.0, None,
    )  # fmt: skip
    plain, _ = call_kernel("lora_linear", x, weight, bias, A, B, None, SCALING, 0.0, None)
    assert same_bits(y, plain)


@pytest.mark.parametrize("path", PATHS)
def test_bits_are_same_in_any_thread_order(path):
    """A missing barrier would show: see the planted one in tests/backends/cuda/test_machine.py."""
    if not native.cuda_on_host():
        pytest.skip("a GPU has an order of its own")
    given = operands(70, 264, 136, 16, BF16, BF16, torch.device("cpu"))
    x, weight, bias, A, B, lora_bias = given

    def run() -> tuple[Tensor, Tensor]:
        return call_kernel(
            "lora_linear", x, weight, bias, A, B, lora_bias, SCALING, 0.0, None, path=path
        )

    first = run()
    for seed in cuda_host.ORDERS:
        with cuda_host.order(native.cuda_functions(), seed):
            assert all(map(same_bits, run(), first))


def test_one_pass_rows_are_the_same_alone(device):
    """In one pass a row's bits follow from itself."""
    x, weight, bias, A, B, _ = operands(50, 264, 72, 16, BF16, BF16, device)

    def run(rows: Tensor) -> Tensor:
        given = (rows, weight, bias, A, B, None, SCALING, 0.0, None)
        return call_kernel("lora_linear", *given, path="cuda_one_pass")[0]

    together = run(x)
    for row in (0, 16, 31, 49):
        assert same_bits(run(x[row : row + 1]), together[row : row + 1])


def test_failed_launch_names_its_kernel(monkeypatch, device):
    """What the library says of a launch that failed is in Python's error."""
    x, weight, _, A, B, _ = operands(3, 64, 8, 8, BF16, BF16, device)
    functions = native.cuda_functions()

    class Failing:
        @staticmethod
        def fastlora_cuda_lora_linear(*_):
            return native.LAUNCH_FAILED

        @staticmethod
        def fastlora_cuda_last_error():
            return b"gemm: too many resources requested for launch"

    monkeypatch.setattr(native, "cuda_functions", lambda: Failing)
    with pytest.raises(RuntimeError, match="gemm: too many resources requested for launch"):
        call_kernel("lora_linear", x, weight, None, A, B, None, 1.0, 0.0, None)
    assert functions is not Failing


def test_c_function_refuses_nonsense_arguments():
    functions = native.cuda_functions()
    nothing = [None] * 3
    code = functions.fastlora_cuda_lora_linear(
        None, 8, *nothing[:2], None, 8, None, 8, None, None, 8, None, 8, None,
        1, 8, 8, 8, 1.0, None, 0, 1.0, 1, 0, 9, 0, 1, 1, None,
    )  # fmt: skip
    assert code == native.BAD_ARGUMENT


@pytest.mark.cuda
def test_cuda_graph_captures_and_replays_lora_linear(device):
    if device.type != "cuda":
        pytest.skip("CUDA graphs need a GPU")
    x, weight, bias, A, B, _ = operands(130, 264, 136, 16, BF16, BF16, device)

    def run() -> Tensor:
        given = (x, weight, bias, A, B, None, SCALING, 0.0, None)
        return call_kernel("lora_linear", *given)[0]

    plain = run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    graph.replay()
    assert same_bits(captured, plain)


def test_lora_linear_compiles_in_one_graph(device):
    x, weight, bias, A, B, _ = operands(9, 40, 48, 8, BF16, BF16, device)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def f(x):
        return F.lora_linear(x, weight, A, B, SCALING, bias=bias)

    assert same_bits(f(x), F.lora_linear(x, weight, A, B, SCALING, bias=bias))
    assert fastlora.backend("lora_linear", device) == "cuda"


def test_chunks_names_unaligned_operands(device):
    x = signed(3, 64, dtype=BF16, device=device)
    assert cuda_call.chunks("x", x) is None
    assert "multiple of 16" in str(cuda_call.chunks("x", misaligned(x)))
    assert "unit stride" in str(cuda_call.chunks("x", transposed(x)))
