"""What every kernel shares of arithmetic: products that are right under the interpreter too.

The interpreter computes with numpy, which has no bfloat16: `tl.dot` and sums of bfloat16 tiles are
silently wrong there, and casts to it truncate. Under interpretation operands are therefore widened
to float32, in which products of half-precision numbers are exact and sums are accumulated anyway,
and `narrow` rounds to nearest even by hand, as a GPU's cast does.
"""

import torch
import triton
import triton.language as tl
from triton import knobs

# As it was when the kernels were compiled, not when they are called.
INTERPRETED = tl.constexpr(bool(knobs.runtime.interpret))


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """``acc + a @ b`` for tiles a [BM, BK], b [BK, BN] of one dtype, acc [BM, BN] float32."""
    if INTERPRETED:
        acc = tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    return acc


@triton.jit
def narrow(t, DTYPE: tl.constexpr):
    """A tile in another dtype, rounded to nearest even."""
    if INTERPRETED and tl.bfloat16 == DTYPE:
        t = t.to(tl.float32)
        bits = t.to(tl.uint32, bitcast=True)
        # Without what is cut off: the interpreter's cast makes a number of a denormal's rest.
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        t = tl.where(t == t, rounded.to(tl.float32, bitcast=True), t)
    return t.to(DTYPE)


def precision(dtype: torch.dtype) -> str:
    """How float32 operands enter a tensor core: as torch's own setting for CUDA products says."""
    if dtype != torch.float32:
        return "ieee"  # half-precision operands enter as they are
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def precise(dtype: torch.dtype) -> bool:
    """Whether products of this dtype run without tensor cores."""
    return dtype == torch.float32 and precision(dtype) == "ieee"
