"""The interpreter that tests quicken computes what Triton's own does."""

import pytest
import torch

import fastlora
from fastlora import functional as F
from tests.support.adapters_in_batches import Batch
from tests.support.helpers import same_bits

pytest.importorskip("triton", reason="triton is not installed")

import triton.language as tl
from triton.runtime import interpreter

from fastlora.backends.triton import multi
from tests.support.interpreter import wrapped

if torch.cuda.is_available():
    pytest.skip("no kernel is interpreted where there is a GPU", allow_module_level=True)


def compute(b: Batch) -> list[torch.Tensor]:
    """Gathers, products, sums over K, and the generator of dropout's masks."""
    dy = b.x.new_ones(9, 20)
    found = []
    for path in ("decode", "prefill", "library"):
        y, h = multi.multi_lora_linear(b.x, b.weight, b.bias, b.adapters, b.routing, path=path)
        given = (dy, b.x, b.weight, b.adapters, h, b.routing, [True] * 5, path)
        found += [y, h, *multi.multi_lora_linear_backward(*given)]
    torch.manual_seed(3)
    given = (b.x, b.weight, b.A[0], b.B[0], 2.0)
    with fastlora.use_backend("triton"):
        found.append(F.lora_linear(*given, dropout_p=0.5, training=True))
    return [t for t in found if t is not None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quickened_interpreter_gives_same_bits(dtype, monkeypatch):
    b = Batch.draw(9, 24, 20, 5, 3, dtype, dtype, torch.device("cpu"))
    before = {module: dict(vars(module)) for module in (tl, tl.math)}
    quick = compute(b)
    # A launch takes out of triton.language what it put there.
    assert before == {module: dict(vars(module)) for module in before}
    assert wrapped
    for owner, name in wrapped:
        monkeypatch.setattr(owner, name, getattr(owner, name).__wrapped__)
    options = interpreter.InterpreterOptions()
    monkeypatch.setattr(interpreter.interpreter_builder, "options", options)
    assert all(same_bits(a, b) for a, b in zip(quick, compute(b), strict=True))
