"""torch.compile of whole models: no graph breaks, no needless recompiling, eager numbers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from torch._dynamo.utils import counters
from torch.func import functional_call, grad, jacrev, jvp, vmap
from torch.utils.checkpoint import checkpoint

import fastlora
from fastlora import LoRAConfig, MultiLoRAModel
from fastlora import functional as F
from tests.support.blocks import (
    Block,
    adapters_by_name,
    batch,
    block,
    gradients,
    randomise_adapters,
)
from tests.support.helpers import assert_near

NAMES = ["anna", "ben", "carl"]
# Each layer takes its part of a second to compile, each time.
FEW = {"r": 4, "target_modules": ["up", "down"]}


@pytest.fixture(autouse=True)
def _reset_compiler() -> Iterator[None]:
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def compile_whole(f: Callable, backend: str = "aot_eager", **options) -> Callable:
    return torch.compile(f, fullgraph=True, backend=backend, **options)


def count_graphs() -> int:
    return counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_training_follows_eager_training(dtype):
    """Three steps of both, with eager's masks."""
    ours = block(dtype, lora_dropout=0.4, lora_bias=True)
    twin, data = copy.deepcopy(ours), [batch(dtype=dtype) for _ in range(3)]
    losses = []
    for model, run in ((ours, ours), (twin, compile_whole(twin))):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
        torch.manual_seed(5)
        for x in data:
            loss = run(x).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
    # A half rounds in another order: 2**-7 of each of a dozen products.
    tolerance = 0.05 if dtype == torch.bfloat16 else 1e-4
    torch.testing.assert_close(losses[:3], losses[3:], rtol=tolerance, atol=tolerance)
    assert abs(losses[2] - losses[0]) > 0
    assert count_graphs() == 1


def test_new_sizes_and_weights_do_not_recompile():
    ours = block(**FEW)
    run = compile_whole(ours)

    def agree(rows: int) -> int:
        x = batch(rows)
        assert_near(run(x), ours(x))
        return count_graphs()

    assert agree(2) == 1
    assert [agree(rows) for rows in (3, 4, 7, 2)] == [2] * 4  # the second one for any batch
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.mul_(1.1)
    assert agree(5) == 2
    ours.eval()
    assert agree(5) == 3
    ours.train()
    assert agree(3) == 3
    for scaling in (0.25, 0.5):  # a number of the module's: one graph for each
        before, ours.up.scaling = count_graphs(), scaling
        assert agree(3) == before + 1


def test_batch_marked_dynamic_is_compiled_once():
    ours = block(lora_dropout=0.5, **FEW)
    run = compile_whole(ours)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rows in (2, 3, 7, 4):
            x = batch(rows)
            torch._dynamo.mark_dynamic(x, 0)
            run(x).sum().backward()
    assert count_graphs() == 1


def test_compiled_model_follows_every_adapter_state():
    ours, x = block(lora_bias=True, **FEW).eval(), batch()
    run = compile_whole(ours)
    plain = ours(x).detach()
    assert_near(run(x), plain)
    with fastlora.disable_adapter(ours):
        base = run(x)
        assert_near(base, ours(x))
    assert not torch.allclose(base, plain, atol=0.1)
    fastlora.merge_adapter(ours)
    assert_near(run(x), plain)
    fastlora.unmerge_adapter(ours)
    assert_near(run(x), plain)
    with torch.no_grad():
        assert_near(run(x), plain)


@pytest.mark.parametrize("inside", [False, True])
def test_compiled_model_follows_autocast(inside):
    ours, x = block(**FEW), batch()

    def cast(x):
        with torch.autocast("cpu", torch.bfloat16):
            return ours.up(x), ours(x)

    run = compile_whole(cast if inside else lambda x: (ours.up(x), ours(x)))
    if inside:
        got = run(x)
    else:
        with torch.autocast("cpu", torch.bfloat16):
            got = run(x)
    want = cast(x)
    assert got[0].dtype == torch.bfloat16
    # bfloat16's rounding, in another order.
    torch.testing.assert_close(got, want, rtol=2**-6, atol=2**-5)
    got[1].sum().backward()
    assert {p.grad.dtype for p in ours.parameters() if p.grad is not None} == {torch.float32}


def test_compiled_checkpointed_model_has_eager_gradients():
    ours, x = block(lora_dropout=0.5, **FEW), batch()
    run = compile_whole(lambda x: checkpoint(ours, x, use_reentrant=False))
    for got, want in zip(gradients(ours, run, x), gradients(ours, ours, x), strict=True):
        assert_near(got, want)


def test_inductor_recomputes_the_same_mask():
    """Its own generator, and a forward that runs again in backward."""
    eye = torch.eye(64)

    def masked(x):
        return F.lora_linear(x.sin(), 0 * eye, eye, eye.clone(), 1.0, dropout_p=0.5, training=True)

    run = compile_whole(lambda x: checkpoint(masked, x, use_reentrant=False), "inductor")
    seen = []
    for _ in range(3):
        x = torch.full((32, 64), torch.pi / 2, dtype=torch.float32).sub(1).requires_grad_()
        y = run(x)
        y.sum().backward()
        torch.testing.assert_close(x.grad, (y != 0) * 2 * x.cos())
        seen.append(y.detach() != 0)
    share = torch.stack(seen).float().mean().item()
    assert abs(share - 0.5) < 5 * 0.5 / (3 * 32 * 64) ** 0.5  # five standard errors
    assert not torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[1], seen[2])


def test_compiled_model_trains_several_adapters():
    config = LoRAConfig(**FEW)
    ours = randomise_adapters(fastlora.replace_linear(Block(), config, adapter_names=NAMES))
    run = compile_whole(ours)

    def agree(*rows: str | None) -> int:
        x, found = batch(len(rows)), []
        with fastlora.use_adapters(ours, rows):
            for f in (run, ours, run):  # the third one finds the rows grouped
                y = f(x)
                grads = torch.autograd.grad(y.square().sum(), present(rows))
                found.append([y, *grads])
        for got, want in zip(found[0] + found[2], found[1] * 2, strict=True):
            assert_near(got, want)
        return count_graphs()

    def present(rows) -> list[torch.Tensor]:
        names = sorted({row for row in rows if row})
        return [p for n in names for p in fastlora.adapter_parameters(ours, n)]

    assert agree("anna", "ben", None) == 0  # looked at first, and not compiled
    agree("anna", "ben", None)
    once = agree("ben", "anna", "anna", None)  # for any batch by now
    assert agree("ben", "ben", "ben", "anna", None) == once
    assert agree("anna", "ben") == once
    assert agree("carl", "ben", "ben") > once  # a graph for each set of adapters


def test_compiled_graph_sorts_rows_once():
    sorts = []

    def backend(graph, _inputs):
        sorts.extend(n for n in graph.graph.nodes if "group_rows" in str(n.target))
        return graph

    ours = fastlora.replace_linear(Block(), LoRAConfig(**FEW), adapter_names=NAMES)
    run = compile_whole(ours, backend)
    for count in (0, 1):  # a model's first batch runs as it was written: its rows are followed
        with fastlora.use_adapters(ours, ["anna", "ben", None]):
            run(batch())
        assert len(sorts) == count


def test_compiled_server_runs_its_adapters(tmp_path):
    config = LoRAConfig(**FEW)
    base = Block().eval()
    for name in NAMES:
        own = randomise_adapters(fastlora.replace_linear(copy.deepcopy(base), config))
        fastlora.save_adapter(own, tmp_path / name)
    server = MultiLoRAModel(base, 2, 8, FEW["target_modules"])
    for name in NAMES[:2]:
        server.load_adapter(tmp_path / name, name)
    eager, run = server.model, compile_whole(server.model)

    def agree(*rows: str | None) -> int:
        x, found = batch(len(rows)), []
        for server.model in (eager, run):  # what is not known yet is not compiled
            found.append(server(x, adapter_names=rows))
        assert_near(*found)
        return count_graphs()

    agree("anna", "ben", None)
    once = agree("ben", None, None, "anna")
    assert agree("ben", "ben", "ben", "anna", None) == once
    server.unload_adapter("anna")
    server.load_adapter(tmp_path / "carl", "carl")
    assert agree("carl", "ben", None) == once


def under_func() -> dict[str, Callable]:
    ours, x = block().q, batch()
    plain = adapters_by_name(ours)

    def loss(parameters, x):
        return functional_call(ours, parameters, (x,)).square().sum()

    return {
        "grad": lambda: grad(loss)(plain, x),
        "per sample": lambda: vmap(grad(loss), (None, 0))(plain, x),
        "vmap": lambda: {"y": vmap(ours)(x)},
        "jacrev": lambda: jacrev(loss)(plain, x),
    }


@pytest.mark.parametrize("transform", ["grad", "per sample", "vmap", "jacrev"])
def test_torch_func_within_compile_is_refused(transform):
    """torch would leave out what autograd.Function says: gradients of zero, without a word."""
    with pytest.raises(torch._dynamo.exc.Unsupported, match="run it eagerly"):
        compile_whole(under_func()[transform])()


def test_torch_func_breaks_graph_with_right_gradients():
    run = under_func()["grad"]
    got, want = torch.compile(run, backend="aot_eager")(), run()
    for name, gradient in want.items():
        assert_near(got[name], gradient)


def test_compiled_function_runs_under_torch_func():
    ours, x = block().q, batch()
    run = torch.compile(
        lambda A, x: functional_call(ours, {"lora_A": A}, (x,)), backend="aot_eager"
    )

    def loss(f):
        return lambda A: f(A, x).square().sum()

    A = ours.lora_A.detach()
    eager = grad(loss(lambda A, x: functional_call(ours, {"lora_A": A}, (x,))))(A)
    assert_near(grad(loss(run))(A), eager)
    with pytest.raises(NotImplementedError, match="jvp"):
        jvp(loss(run), (A,), (A,))


def test_llama_compiles_and_trains_as_eager():
    pytest.importorskip("transformers")
    from tests.support.models import llama, randomise_lora, tokens

    config = LoRAConfig(r=4, lora_dropout=0.1, target_modules="all-linear")
    ours = randomise_lora(fastlora.replace_linear(llama(num_hidden_layers=1), config)).train()
    run, ids = compile_whole(ours), tokens(3, 6)
    found = []
    for model in (ours, run):
        torch.manual_seed(7)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        layer = ours.model.layers[0].mlp.up_proj
        found.append([loss, layer.lora_A.grad.clone(), layer.lora_B.grad.clone()])
        ours.zero_grad()
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)
    program = torch.export.export(ours.eval(), (), {"input_ids": ids, "use_cache": False})
    got = program.module()(input_ids=ids, use_cache=False).logits
    assert_near(got, ours(input_ids=ids).logits)
