"""A patched PEFT model under torch.compile: one graph, the same numbers, no recompiling."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

from peft.utils import hotswap  # noqa: E402

import fastlora  # noqa: E402
from tests.support.models import assert_agree, quiet  # noqa: E402
from tests.support.patched import config, fill_adapters, inputs, pair, peft_model, run  # noqa: E402

pytestmark = [quiet, pytest.mark.filterwarnings("ignore:.*isinstance.*:DeprecationWarning")]


# To compile a layer takes a second: of a Llama two are compiled into one graph.
ONE_LAYER = {"gpt2": {"layers": 1}, "bert": {"num_hidden_layers": 1}}


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def compile_whole(model, backend="aot_eager", **options):
    return torch.compile(model, backend=backend, fullgraph=True, **options)


@pytest.mark.parametrize(
    "kind, backend",
    [(kind, "aot_eager") for kind in ("mlp", "llama", "gpt2", "bert")] + [("mlp", "inductor")],
)
def test_patched_model_compiles_to_one_graph(kind, backend):
    plain, patched = pair(kind, sizes=ONE_LAYER.get(kind, {}))
    given = inputs(kind)
    found, wanted = run(compile_whole(patched, backend), given), run(plain, given)
    assert_agree(found, wanted)
    for out in (found, wanted):
        out.square().mean().backward()
    for p, q in zip(patched.parameters(), plain.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        if q.grad is not None:
            assert_agree(p.grad, q.grad)


def test_compiled_model_takes_other_batches_without_recompiling():
    patched = pair("llama", sizes={"num_hidden_layers": 1})[1]
    with torch.no_grad():
        one = compile_whole(patched, dynamic=True)
        run(one, inputs("llama", rows=3))
        with torch._dynamo.config.patch(error_on_recompile=True):
            for rows in (2, 5, 9):
                given = inputs("llama", rows=rows)
                assert_agree(run(one, given), run(patched, given))


def test_compiled_model_follows_changes_of_adapters():
    given = inputs("mlp")
    plain, patched = pair("mlp")
    one = compile_whole(patched)

    def assert_alike():
        with torch.no_grad():
            assert_agree(run(one, given), run(plain, given))

    assert_alike()
    for model in (plain, patched):
        model.add_adapter("other", config("mlp", r=3, target_modules=["lin1", "head"]))
        fill_adapters(model).eval()
        model.set_adapter("other")
    assert_alike()
    for model in (plain, patched):
        model.base_model.set_adapter(["default", "other"])
    assert_alike()
    for model in (plain, patched):
        model.base_model.disable_adapter_layers()
    assert_alike()
    for model in (plain, patched):
        model.base_model.enable_adapter_layers()
        model.merge_adapter()
    assert_alike()
    for model in (plain, patched):
        model.unmerge_adapter()
        model.delete_adapter("other")
    assert_alike()
    fastlora.unpatch_peft(patched)
    assert_alike()


def test_compiled_model_is_hot_swapped_without_recompiling(tmp_path):
    given = inputs("mlp")
    for name, r in (("smaller", 3), ("larger", 8)):
        peft_model("mlp", r=r, lora_alpha=r * 3).save_pretrained(tmp_path / name)
    plain, patched = pair("mlp")
    for model in (plain, patched):
        hotswap.prepare_model_for_compiled_hotswap(model, target_rank=8)
    one = compile_whole(patched)
    with torch.no_grad():
        before = run(one, given)
        with torch._dynamo.config.patch(error_on_recompile=True):
            for name in ("smaller", "larger"):
                for model in (plain, patched):
                    hotswap.hotswap_adapter(model, tmp_path / name, adapter_name="default")
                after = run(one, given)
                assert_agree(after, run(plain, given), before)


def test_compiled_layer_matches_peft_with_adapter_per_row():
    """PEFT passes the names on by hooks that it sets around the call: compile what is inside."""
    given = inputs("mlp", rows=3)
    plain, patched = pair("mlp")
    for model in (plain, patched):
        model.add_adapter("other", config("mlp", r=3))
        fill_adapters(model).eval()
    layer, own = patched.base_model.model.lin0, plain.base_model.model.lin0
    rows = ["other", "__base__", "default"]
    with torch.no_grad():
        one = compile_whole(layer)
        assert_agree(one(given["x"], adapter_names=rows), own(given["x"], adapter_names=rows))
        assert_agree(layer(given["x"], adapter_names=rows), own(given["x"], adapter_names=rows))


def test_patched_model_exports_with_dynamic_batch():
    given = inputs("mlp", rows=3)
    patched = pair("mlp")[1]
    batch = torch.export.Dim("batch", min=2)
    shapes = ({0: batch},)
    program = torch.export.export(patched.base_model.model, (given["x"],), dynamic_shapes=shapes)
    assert "fastlora.differentiable_lora_linear" in str(program.graph)
    for rows in (2, 7):
        x = inputs("mlp", rows=rows)["x"]
        assert_agree(program.module()(x), patched.base_model.model(x))


def test_patched_model_per_sample_gradients_match_loop():
    """vmap of grad through functional_call, against a loop."""
    plain, patched = pair("mlp")
    x = inputs("mlp", rows=4)["x"]

    def gradients(model):
        inner = copy.deepcopy(model).base_model.model
        trained = {n: p.detach() for n, p in inner.named_parameters() if "lora_" in n}

        def loss(parameters, row):
            return torch.func.functional_call(inner, parameters, (row[None],)).square().sum()

        return torch.func.vmap(torch.func.grad(loss), (None, 0))(trained, x)

    found, wanted = gradients(patched), gradients(plain)
    assert found.keys() == wanted.keys()
    for name, want in wanted.items():
        assert_agree(found[name], want)
