"""Programs written by torch.export and torch.jit.trace have the model's numbers and gradients."""

from __future__ import annotations

import io
import os
import textwrap

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, export

import fastlora
from fastlora import FastLoRALinear, MultiLoRALinear
from fastlora import functional as F
from tests.support import forks
from tests.support.blocks import batch, block, gradients
from tests.support.helpers import assert_near

ROWS = {0: Dim("rows", min=2)}
strictness = pytest.mark.parametrize("strict", [True, False])


def export_with_dynamic_batch(model: nn.Module, x: Tensor, strict: bool, dynamic: bool = True):
    shapes = (ROWS,) if dynamic else None
    return export(model, (x,), dynamic_shapes=shapes, strict=strict)


def ops_in(program) -> set[str]:
    return {str(n.target) for n in program.graph.nodes if "fastlora" in str(n.target)}


@strictness
def test_exported_program_has_numbers_and_gradients(strict):
    ours = block(lora_bias=True)
    program = export_with_dynamic_batch(ours, batch(), strict)
    assert ops_in(program) == {"fastlora.differentiable_lora_linear.default"}
    for rows in (2, 3, 7):
        x = batch(rows)
        module = program.module()
        want, got = gradients(ours, ours, x), gradients(module, module, x)
        assert_near(module(x), ours(x))
        assert len(want) == len(got) == 19  # of x and six layers' three
        for a, b in zip(got, want, strict=True):
            assert_near(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_exported_program_matches_in_half_dtypes(dtype):
    ours = block(dtype).eval()
    program = export_with_dynamic_batch(ours, batch(dtype=dtype), strict=False)
    x = batch(4, dtype)
    torch.testing.assert_close(program.module()(x), ours(x))


def test_decomposed_program_holds_raw_ops_only():
    ours = block().eval()
    program = export_with_dynamic_batch(ours, batch(), strict=False).run_decompositions()
    assert ops_in(program) == {"fastlora.lora_linear.default"}
    x = batch(5)
    assert_near(program.module()(x), ours(x))
    with fastlora.use_backend("torch"):
        program = export_with_dynamic_batch(ours, batch(), strict=False).run_decompositions()
    assert_near(program.module()(x), ours(x))  # though gradients are on


@strictness
def test_exported_dropout_draws_new_mask_each_call(strict):
    eye, x = torch.eye(64), torch.ones(5, 64)

    class Masked(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.lora_linear(x, 0 * eye, eye, eye, 1.0, dropout_p=0.5, training=True)

    masked = export_with_dynamic_batch(Masked(), x, strict).module()
    x.requires_grad_()
    one, two = masked(x), masked(x)
    assert set(one.unique().tolist()) == {0.0, 2.0}
    assert not torch.equal(one, two)
    assert torch.equal(torch.autograd.grad(one.sum(), x)[0], one)


@pytest.mark.parametrize("state", ["merged", "disabled"])
def test_exported_program_keeps_state_at_export(state):
    ours, x = block().eval(), batch()
    if state == "merged":
        for layer in ours.children():
            if isinstance(layer, FastLoRALinear):
                layer.merge()
    else:
        for layer in ours.children():
            layer.adapter_disabled = True
    program = export_with_dynamic_batch(ours, x, strict=False)
    assert not ops_in(program)
    assert_near(program.module()(x), ours(x))


class InPlace(nn.Module):
    """Onto a base's output, one adapter or, with slots, several."""

    def __init__(self, slots: tuple[int, ...]) -> None:
        super().__init__()
        self.base = nn.Linear(7, 5)
        self.A, self.B = (
            nn.Parameter(torch.randn(*slots, 2, 7)),
            nn.Parameter(torch.randn(*slots, 5, 2)),
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        if self.A.dim() == 2:
            return F.lora_add_(y, x, self.A, self.B, 0.5)
        ids = torch.arange(x.shape[0]) % 3 - 1
        y = F.multi_lora_add_(y, x, self.A, self.B, ids, torch.tensor([0.5, 2.0]))
        return y + F.multi_lora_linear(x, self.base.weight, self.A, self.B, ids, torch.ones(2))


@strictness
@pytest.mark.parametrize("slots", [(), (2,)])
def test_in_place_functions_export_with_gradients(slots, strict):
    ours = InPlace(slots)
    program = export_with_dynamic_batch(ours, torch.randn(4, 7), strict)
    x, module = torch.randn(6, 7), program.module()
    for a, b in zip(gradients(module, module, x), gradients(ours, ours, x), strict=True):
        assert_near(a, b)
    with torch.no_grad():
        assert_near(program.run_decompositions().module()(x), ours(x))


def test_multi_lora_linear_exports_with_adapter_ids():
    served = MultiLoRALinear.from_linear(nn.Linear(7, 5), 3, 2)
    served.set_adapter(1, torch.randn(2, 7), torch.randn(5, 2), 0.5)
    x, ids = torch.randn(4, 7), torch.tensor([1, -1, 1, 0])
    program = export(served, (x, ids), dynamic_shapes=(ROWS, ROWS), strict=False)
    x, ids = torch.randn(5, 7), torch.tensor([-1, 1, 0, 1, 1])
    assert_near(program.module()(x, ids), served(x, ids))


LOADED = """
    import io, sys, torch

    try:
        torch.export.load(sys.argv[1])
    except Exception as error:
        print("refused")
    import fastlora

    x, want = torch.load(sys.argv[2])
    torch.testing.assert_close(torch.export.load(sys.argv[1]).module()(x), want)
    traced = torch.jit.load(sys.argv[3])
    torch.testing.assert_close(traced(x), want)
    print("equal")
"""


@pytest.mark.filterwarnings("ignore:.*jit.(trace|save|load)", "ignore::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec:FutureWarning")
def test_saved_programs_run_in_another_process(tmp_path):
    ours, x = block(lora_bias=True).eval(), batch(4)
    files = [tmp_path / name for name in ("block.pt2", "x.pt", "block.pt")]
    torch.export.save(export_with_dynamic_batch(ours, batch(), strict=False), files[0])
    torch.save((x, ours(x).detach()), files[1])
    torch.jit.save(torch.jit.trace(ours, batch()), files[2])
    done = forks.run(textwrap.dedent(LOADED), *files, env=dict(os.environ))
    assert done.stdout == "refused\nequal\n", done.stderr


@pytest.mark.filterwarnings("ignore:.*jit.(trace|script)", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_traced_model_has_its_numbers(dropout):
    ours = block(lora_dropout=dropout)
    traced = torch.jit.trace(ours, batch(), check_trace=not dropout)
    x = batch(4)
    if dropout:
        assert not torch.equal(traced(x), traced(x))
        return
    assert_near(traced(x), ours(x))
    for a, b in zip(gradients(traced, traced, x), gradients(ours, ours, x), strict=True):
        assert_near(a, b)
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    assert_near(torch.jit.load(file)(x), ours(x))


@pytest.mark.filterwarnings("ignore:.*jit.(trace|script)", "ignore::torch.jit.TracerWarning")
def test_trace_of_slots_and_script_are_refused():
    ours = InPlace((2,))
    with pytest.raises(TypeError, match="num_slots: expected an int"):
        torch.jit.trace(ours, torch.randn(4, 7))
    with pytest.raises((ValueError, RuntimeError)):
        torch.jit.script(block().q)
