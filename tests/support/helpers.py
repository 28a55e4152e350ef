"""Unfused torch to compare with, tensors of unusual layouts, and spies on torch ops."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import functional as nnf
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastlora.ops.run import IMPLEMENTATIONS
from tests.support import oracle

# (dtype of x and weight, dtype of the adapters), as ids print them.
DTYPES = {
    "fp64": (torch.float64, torch.float64),
    "fp32": (torch.float32, torch.float32),
    "fp16": (torch.float16, torch.float16),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "fp16+fp32": (torch.float16, torch.float32),
    "bf16+fp32": (torch.bfloat16, torch.float32),
}

# The numerics contract: an error is at most twice that of unfused torch in x's dtype, plus this.
SLACK = {torch.float64: 1e-14, torch.float32: 1e-6, torch.float16: 3e-4, torch.bfloat16: 2e-3}


def assert_accurate(
    got: Tensor, want: Tensor, unfused: Tensor, dtype: torch.dtype, tokens: int = 1 << 30
) -> None:
    """``want`` is the oracle's; ``dtype`` is what the products were taken in.

    ``tokens``: of how many a gradient is the sum, a rounded number each.
    """
    assert got.shape == unfused.shape
    # Of a few numbers unfused torch may by luck have none wrong.
    luck = torch.finfo(dtype).eps if got.numel() < 64 or tokens < 16 else 0.0
    allowed = 2 * max(oracle.relative_error(unfused, want), luck) + SLACK[dtype]
    error = oracle.relative_error(got, want)
    assert error <= allowed, f"relative error {error:.2e}, allowed {allowed:.2e}"


def assert_near(a: Tensor, b: Tensor) -> None:
    """Equal but for the order of float32 sums."""
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    *,
    bias: Tensor | None = None,
    lora_bias: Tensor | None = None,
    keep: Tensor | None = None,
    keep_scale: float = 1.0,
) -> Tensor:
    """The formula in unfused torch, adapters cast to x's dtype."""
    A, B = lora_A.to(x.dtype), lora_B.to(x.dtype)
    seen = x if keep is None else x * keep.to(x.dtype) * keep_scale
    delta = nnf.linear(nnf.linear(seen, A), B, None if lora_bias is None else lora_bias.to(x.dtype))
    return nnf.linear(x, weight, bias) + scaling * delta


def multi_lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    adapter_ids: Tensor,
    scalings: Tensor,
    *,
    bias: Tensor | None = None,
    ranks: Tensor | None = None,
    row_scales: Tensor | None = None,
) -> Tensor:
    """Rows x (T, K), slot after slot, in unfused torch."""
    y = nnf.linear(x, weight, bias)
    for slot in range(lora_A.shape[0]):
        r = lora_A.shape[1] if ranks is None else int(ranks[slot])
        rows = (adapter_ids == slot).nonzero().flatten()
        A, B = lora_A[slot, :r].to(x.dtype), lora_B[slot, :, :r].to(x.dtype)
        delta = x[rows] @ A.T @ B.T * float(scalings[slot])
        if row_scales is not None:
            delta = delta * row_scales[rows, None].to(x.dtype)
        y = y.index_add(0, rows, delta)
    return y


def signed(*shape: int, dtype: torch.dtype, device: torch.device, size: float = 1.0) -> Tensor:
    return (torch.randn(shape, dtype=torch.float64) * size).to(device, dtype)


def operands(M, K, N, R, dtype, lora_dtype, device) -> list[Tensor]:
    """x, weight, bias, lora_A, lora_B, lora_bias."""
    base, own = {"dtype": dtype, "device": device}, {"dtype": lora_dtype, "device": device}
    return [
        signed(M, K, **base),
        signed(N, K, **base),
        signed(N, **base),
        signed(R, K, **own),
        signed(N, R, **own, size=1 / math.sqrt(max(R, 1))),
        signed(N, **own),
    ]


def leaves(tensors: dict[str, Tensor], *names: str) -> dict[str, Tensor]:
    """The tensors as leaves; those of ``names``, or all, require grad."""
    return {n: t.detach().requires_grad_(n in (names or tensors)) for n, t in tensors.items()}


def as_rows(t: Tensor) -> Tensor:
    """(..., K) as rows (M, K); ``view(-1, K)`` cannot where there is nothing."""
    return t.reshape(math.prod(t.shape[:-1]), t.shape[-1])


def contiguous(t: Tensor) -> Tensor:
    return t.clone()


def strided(t: Tensor) -> Tensor:
    """Every second element of rows twice as long; NaN lies between."""
    apart = t.new_full((*t.shape[:-1], 2 * t.shape[-1]), float("nan"))
    apart[..., ::2] = t
    return apart[..., ::2]


def transposed(t: Tensor) -> Tensor:
    return t.transpose(0, -1).contiguous().transpose(0, -1)


def misaligned(t: Tensor) -> Tensor:
    """Contiguous, but starting one element past an aligned address."""
    shifted = t.new_empty(t.numel() + 1)[1:]
    return shifted.copy_(t.flatten()).view(t.shape)


def sliced(t: Tensor) -> Tensor:
    """The middle of a larger tensor of NaN."""
    wide = t.new_full([size + 4 for size in t.shape], float("nan"))
    middle = wide[tuple(slice(2, -2) for _ in t.shape)]
    return middle.copy_(t)


LAYOUTS = [contiguous, strided, transposed, misaligned, sliced]


def bits(t: Tensor) -> Tensor:
    """The raw bits, so that NaN equals itself and 0 differs from -0."""
    if not t.is_floating_point():
        return t.clone()
    return (
        t.detach().contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[t.itemsize])
    )


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(bits(a), bits(b))


@contextmanager
def unchanged(*tensors: object) -> Iterator[None]:
    """Every bit of the tensors is as before at the end, also when an error is on its way."""
    given = [t for t in _tensors(tensors) if not t.is_meta]
    before = [bits(t).clone() for t in given]
    try:
        yield
    finally:
        assert all(torch.equal(bits(t), old) for t, old in zip(given, before, strict=True))


_GEMMS = {"mm", "addmm", "addmm_", "linear", "matmul"}


class Spy(TorchDispatchMode):
    """Sees every torch op, those inside fastlora's ops included: fresh tensors and GEMMs."""

    def __init__(self) -> None:
        super().__init__()
        self.fresh: list[tuple[int, torch.dtype]] = []
        self.gemms = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fastlora":
            return run_inside(self, func, args)
        result = func(*args, **(kwargs or {}))
        self.gemms += func.overloadpacket.__name__ in _GEMMS
        given = {_storage(t) for t in _tensors((args, kwargs))}
        self.fresh += [(t.numel(), t.dtype) for t in _tensors(result) if _storage(t) not in given]
        return result

    def sizes(self, *dtypes: torch.dtype) -> list[int]:
        """Elements of the fresh tensors (of these dtypes), largest first."""
        wanted = (size for size, dtype in self.fresh if not dtypes or dtype in dtypes)
        return sorted(wanted, reverse=True)


class Interrupt(TorchDispatchMode):
    """Ctrl-C, or another error, at the count-th call of a torch op, inside fastlora's ops too.

    weight: counts calls onto it alone.
    """

    def __init__(
        self,
        op: str,
        count: int,
        weight: Tensor | None = None,
        error: BaseException | type[BaseException] = KeyboardInterrupt,
    ) -> None:
        super().__init__()
        self.error = error
        self.op, self.left = op, count
        self.storage = None if weight is None else weight.untyped_storage().data_ptr()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fastlora":
            return run_inside(self, func, args)
        if func.overloadpacket.__name__ == self.op and (
            self.storage in (None, args[0].untyped_storage().data_ptr())
        ):
            self.left -= 1
            if self.left == 0:
                raise self.error
        return func(*args, **(kwargs or {}))


def run_inside(mode: TorchDispatchMode, func, args) -> object:
    """What an op of fastlora's gives, ``mode`` seeing the ops it consists of."""
    with mode:
        return IMPLEMENTATIONS[func._schema.name.split("::")[1]](*args)


def _tensors(tree: object) -> list[Tensor]:
    return [t for t in tree_leaves(tree) if isinstance(t, Tensor)]


def _storage(t: Tensor) -> int:
    return t.untyped_storage()._cdata


class Wrapped(Tensor):
    """A tensor subclass of its own form, as quantizers have."""

    @staticmethod
    def __new__(cls, inner):
        return Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner):
        self.inner = inner

    def __tensor_flatten__(self):
        return ["inner"], None

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = [a.inner if isinstance(a, cls) else a for a in args]
        return cls(func(*given, **kwargs)) if "detach" in str(func) else func(*given, **kwargs)
