"""Patched layers around unusual bases and inputs match PEFT."""

from __future__ import annotations

import pytest
import torch
from torch import nn

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")


import fastlora  # noqa: E402
from tests.support.models import assert_agree, quiet  # noqa: E402
from tests.support.patched import (  # noqa: E402
    Doubling,
    assert_same,
    config,
    count_forwards,
    fill_adapters,
    inputs,
    inputs_of_ones,
    pair,
    run,
)

pytestmark = quiet
LIN0, LIN1 = "base_model.model.lin0", "base_model.model.lin1"


class Kept(nn.Linear):
    """Gives out what it keeps: whoever writes into it changes what comes next."""

    def forward(self, input):
        if not hasattr(self, "kept"):
            self.kept = super().forward(input).detach()
        return self.kept


class Squashed(nn.Linear):
    """Its backward needs its output as it was."""

    def forward(self, input):
        return torch.sigmoid(super().forward(input))


def parametrized(model):
    torch.nn.utils.parametrizations.weight_norm(model.lin0.base_layer)
    return "torch.nn.utils.parametrize.ParametrizedLinear"


def subclassed(kind):
    def change(model):
        model.lin0.base_layer.__class__ = kind
        return f"{kind.__module__}.{kind.__name__}"

    return change


# With an adapter a row PEFT itself writes into what Kept keeps.
ROWS = ["other", "__base__", "default"]


BASES = {"kept": Kept, "squashed": Squashed, "doubling": Doubling}


@pytest.mark.parametrize(
    "base, names",
    [(base, None) for base in [*BASES, "parametrized"]]
    + [(base, ROWS) for base in ["squashed", "doubling", "parametrized"]],
)
def test_patched_layer_adds_onto_output_of_custom_base(base, names, monkeypatch):
    odd = subclassed(BASES[base]) if base in BASES else parametrized
    plain, patched = pair("mlp", lora_bias=names is None)
    for model in (plain, patched):
        kind = odd(model.base_model.model)
        if names:
            model.add_adapter("other", config("mlp", r=3))
        fill_adapters(model).eval()
    assert fastlora.report(patched).around == {LIN0: f"its base is a {kind}"}
    said = f"added onto the base's own output: {LIN0}: its base is a {kind}"
    assert said in str(fastlora.report(patched))
    assert fastlora.patch_peft(patched, strict=True).replaced == {LIN0: 5, LIN1: 5}
    x = inputs("mlp", rows=3)
    more = {} if names is None else {"adapter_names": names}

    def act(model):
        out = run(model, x, **more)
        out.square().sum().backward()
        return [out, run(model, x, **more)]

    with count_forwards(monkeypatch) as counts:
        assert_same(plain, patched, act)
    assert counts["one" if names is None else "many"] == 4


def test_patched_layer_matches_peft_when_base_changes_dtype():
    """Its input's, that is: as a quantized layer that computes in half precision has it."""

    class Narrow(nn.Linear):
        def forward(self, input):
            return super().forward(input).bfloat16()

    plain, patched = pair("mlp", target_modules=["head"])
    for model in (plain, patched):
        model.base_model.model.head.base_layer.__class__ = Narrow
    got, want = (run(m, {"x": torch.ones(3, 11)}) for m in (patched, plain))
    assert_agree(got, want)


def test_report_names_weights_that_are_shards():
    """As ZeRO-3 leaves parameters: the report says so, torch refuses the product."""
    patched = pair("mlp")[1]
    patched.base_model.model.lin0.base_layer.weight.data = torch.empty(0)
    reason = "its base_layer has a weight of shape (0,), a shard?"
    assert fastlora.report(patched).skipped == {LIN0: reason}
    with pytest.raises(RuntimeError):
        run(patched, inputs_of_ones())
    patched = pair("mlp")[1]
    patched.base_model.model.lin0.lora_B["default"].weight.data = torch.empty(0)
    assert "lora_B of adapter 'default' has a weight of shape (0,)" in str(fastlora.report(patched))
    with pytest.raises(RuntimeError):
        run(patched, inputs_of_ones())


def replica(module):
    """As ``nn.DataParallel`` makes them on each GPU: tensors beside ``_parameters``."""
    made = module._replicate_for_data_parallel()
    for name, child in module._modules.items():
        made._modules[name] = None if child is None else replica(child)
    for name, parameter in module._parameters.items():
        if parameter is None:
            made._parameters[name] = None
        else:
            setattr(made, name, parameter.clone())
    return made


@pytest.mark.parametrize("names", [None, ["other", "__base__", "default"]])
def test_data_parallel_replicas_match_peft(names, monkeypatch):
    plain, patched = pair("mlp")
    x, more = inputs("mlp", rows=3), {} if names is None else {"adapter_names": names}
    for model in (plain, patched):
        model.add_adapter("other", config("mlp", r=3))
        fill_adapters(model).eval()

    def act(model):
        made = replica(model.base_model.model.lin0)
        assert not list(made.parameters())
        out = made(x["x"], **more)
        out.square().sum().backward()
        return [out]

    with count_forwards(monkeypatch) as counts:
        assert_same(plain, patched, act)
    assert counts["one" if names is None else "many"] == 1


def complex_numbers(layer):
    for parameter in layer.parameters():
        parameter.data = parameter.data.to(torch.complex64)
    return torch.randn(3, 11, dtype=torch.complex64)


def sparse_base(layer):
    base = layer.base_layer
    base.weight = nn.Parameter(base.weight.detach().to_sparse_csr(), requires_grad=False)
    return torch.randn(3, 11)


def sparse_input(layer):
    return torch.randn(3, 11).to_sparse()


def nested_input(layer):
    return torch.nested.nested_tensor([torch.randn(2, 11), torch.randn(3, 11)])


def factors_of_two_dtypes(layer):
    layer.lora_B["default"].bfloat16()
    return torch.randn(3, 11)


@pytest.mark.filterwarnings("ignore:.*(Sparse CSR|PyTorch API of nested tensors)")
@pytest.mark.parametrize(
    "odd", [complex_numbers, sparse_base, sparse_input, nested_input, factors_of_two_dtypes]
)
def test_patched_layer_leaves_odd_tensors_to_peft(odd):
    found = []
    for model in pair("mlp"):
        torch.manual_seed(4)
        layer = model.base_model.model.lin0
        x = odd(layer)
        half = odd is factors_of_two_dtypes
        with torch.autocast("cpu", torch.bfloat16, enabled=half), torch.no_grad():
            y = layer(x)
        found.append(torch.cat(y.unbind()) if y.is_nested else y)
    assert torch.equal(*found)
