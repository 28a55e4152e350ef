"""Scalings, several adapters and dropout of a patched PEFT model: numbers of the unpatched one."""

from __future__ import annotations

import pytest
import torch

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")
from peft.helpers import disable_input_dtype_casting, rescale_adapter_scale  # noqa: E402
from peft.utils import hotswap  # noqa: E402

from tests.support.models import assert_agree, error, quiet  # noqa: E402
from tests.support.patched import (  # noqa: E402
    assert_same,
    config,
    count_forwards,
    fill_adapters,
    inputs,
    pair,
    peft_model,
    run,
    train_adapters,
)

pytestmark = quiet


def test_changed_adapter_scales_match_peft():
    given = inputs("mlp")

    def act(model):
        layer = model.base_model.model.lin0
        layer.set_scale("default", 3)
        found = [run(model, given)]
        layer.scale_layer(0.5)
        found.append(run(model, given))
        with rescale_adapter_scale(model, 2.5):
            found.append(run(model, given))
        layer.unscale_layer()
        return [*found, run(model, given)]

    assert_same(*pair("mlp"), act)


@pytest.mark.parametrize("kind", ["mlp", "gpt2"])
def test_hot_swapped_adapters_match_peft(kind, tmp_path):
    """In place, into scalings that are tensors and ranks that are padded."""
    given = inputs(kind)
    for name, r in (("same", 5), ("smaller", 3), ("larger", 8)):
        other = peft_model(kind, r=r, lora_alpha=3)
        with torch.no_grad():
            for p in other.parameters():
                p.mul_(1.5)
        other.save_pretrained(tmp_path / name)

    def act(model):
        hotswap.prepare_model_for_compiled_hotswap(model, target_rank=8, config=model.peft_config)
        found = [run(model, given)]
        for name in ("same", "smaller", "larger"):
            hotswap.hotswap_adapter(model, tmp_path / name, adapter_name="default")
            found.append(run(model, given))
        return found

    plain, patched = pair(kind)
    assert_same(plain, patched, act)
    scalings = [m.scaling["default"] for m in patched.modules() if hasattr(m, "lora_A")]
    assert all(isinstance(scaling, torch.Tensor) for scaling in scalings)
    plain, patched = pair(kind)
    for model in (plain, patched):
        hotswap.hotswap_adapter(model, tmp_path / "same", adapter_name="default")
    assert_same(plain, patched, lambda m: [run(m, given)])


def test_training_with_scaling_tensors_matches_peft():
    given = inputs("mlp")
    plain, patched = pair("mlp", lora_bias=True)
    for model in (plain, patched):
        hotswap.prepare_model_for_compiled_hotswap(model)
    assert_same(plain, patched, lambda m: train_adapters(m, given))


def test_adapters_that_cancel_are_summed_in_float32():
    """As PEFT, which sums in float32: rounded one by one, large parts would leave much behind."""
    plain, patched = pair("mlp", torch.bfloat16)
    exact = peft_model("mlp", torch.float64)
    for model in (plain, patched, exact):
        model.add_adapter("other", config("mlp"))
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "lora_B.default" in name:
                    p.mul_(100)
                    other = model.get_parameter(name.replace("default", "other"))
                    other.copy_(-p)
                    A = name.replace("lora_B", "lora_A")
                    model.get_parameter(A.replace("default", "other")).copy_(model.get_parameter(A))
        model.base_model.set_adapter(["default", "other"])
        model.eval()
    x = torch.randn(5, 11).bfloat16()
    with torch.no_grad():
        want = run(exact, {"x": x.double()})
        errors = [error(run(m, {"x": x}), want) for m in (patched, plain)]
    assert errors[0] <= 2 * errors[1] + 2e-3  # the house's bound for bfloat16


@pytest.mark.parametrize("how", ["linear", "cat", "svd"])
def test_weighted_adapters_match_peft(how):
    given = inputs("mlp")

    def act(model):
        model.add_adapter("other", config("mlp", r=5, lora_alpha=3))
        fill_adapters(model).eval()
        model.add_weighted_adapter(["default", "other"], [0.7, -0.4], "sum", combination_type=how)
        model.set_adapter("sum")
        return [run(model, given)]

    assert_same(*pair("mlp"), act)


def test_disabled_input_casting_matches_peft(monkeypatch):
    given = inputs("mlp")
    plain, patched = pair("mlp")
    with count_forwards(monkeypatch) as counts, disable_input_dtype_casting(patched):
        assert_agree(run(patched, given), run(plain, given))
    assert counts["one"] == 2
    plain, patched = pair("mlp", torch.bfloat16)  # float32 adapters, whose input PEFT casts
    for model in (plain, patched):
        with disable_input_dtype_casting(model), pytest.raises(RuntimeError, match="dtype"):
            run(model, inputs("mlp", dtype=torch.bfloat16))


def test_dropout_has_rate_and_mean_of_peft(monkeypatch):
    """Masks are drawn otherwise: as many zeros, as large a mean, none in eval mode."""
    plain, patched = pair("mlp", lora_dropout=0.4, target_modules=["lin0"])
    x = torch.randn(1, 11).expand(4000, 11).contiguous()
    base, want = plain.base_model.model.lin0.base_layer(x), plain.base_model.model.lin0(x)
    found = {}
    with count_forwards(monkeypatch) as counts, torch.no_grad():
        for name, model in (("plain", plain), ("patched", patched)):
            layer = model.base_model.model.lin0
            assert_agree(layer(x), want)
            found[name] = layer.train()(x) - base
            assert len(found[name].unique(dim=0)) > 1000
    assert counts["one"] == 2
    spread = found["plain"].std(0) / len(x) ** 0.5
    assert bool(((found["plain"].mean(0) - found["patched"].mean(0)).abs() < 6 * spread).all())
    ratio = found["patched"].std(0) / found["plain"].std(0)
    assert bool(((ratio - 1).abs() < 0.1).all())


def test_changed_dropout_rate_takes_effect():
    plain, patched = pair("mlp", lora_dropout=0.1)
    given = inputs("mlp")
    for model in (plain, patched):
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 1.0
        model.train()
    assert_same(plain, patched, lambda m: [run(m, given)])  # nothing of the adapters is left
