"""Adapters on a base quantized by bitsandbytes run on fastlora."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")
bnb = pytest.importorskip("bitsandbytes")

import fastlora  # noqa: E402
from tests.support.models import assert_agree, quiet  # noqa: E402
from tests.support.patched import assert_same, count_forwards, fill_adapters  # noqa: E402

pytestmark = quiet


class Quantized(nn.Module):
    is_loaded_in_4bit = is_loaded_in_8bit = True  # what a quantizing loader of transformers notes

    def __init__(self) -> None:
        super().__init__()
        four = {"compute_dtype": torch.bfloat16, "quant_type": "nf4"}
        self.four = bnb.nn.Linear4bit(64, 128, **four)
        self.eight = bnb.nn.Linear8bitLt(128, 32, has_fp16_weights=False)
        self.head = nn.Linear(32, 8)

    def forward(self, x):
        return self.head(self.eight(self.four(x)).to(self.head.weight.dtype))


def pair():
    settings = peft.LoraConfig(r=4, target_modules=["four", "eight", "head"])
    torch.manual_seed(1)
    plain = fill_adapters(peft.get_peft_model(Quantized().to("cpu"), settings))
    patched = copy.deepcopy(plain)
    # Packed, as in eval forwards on some CPUs, it rounds its numbers: see
    # tests/integrations/peft/test_packing.py.
    plain.base_model.model.four.base_layer.support_avx512bf16_for_cpu = False
    found = fastlora.patch_peft(patched, strict=True)
    assert len(found.replaced) == 3
    around = {name.rpartition(".")[2]: why for name, why in found.around.items()}
    assert around == {
        "four": "its base is a bitsandbytes.nn.modules.Linear4bit",
        "eight": "its base is a bitsandbytes.nn.modules.Linear8bitLt",
    }
    return plain, patched


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantized_base_matches_peft_in_forward_and_backward(dtype, monkeypatch):
    plain, patched = pair()
    x = torch.randn(5, 64, dtype=dtype)

    def act(model):
        model.zero_grad()
        own = x.clone().requires_grad_()
        y = model(own)
        y.square().sum().backward()
        return [y.to(dtype), own.grad]

    with count_forwards(monkeypatch) as counts:
        got, want = act(patched), act(plain)
    assert counts["one"] == 3
    for a, b in zip(got, want, strict=True):
        assert_agree(a, b)
    for p, q in zip(patched.parameters(), plain.parameters(), strict=True):
        if q.grad is not None:
            assert_agree(p.grad.to(dtype), q.grad.to(dtype))


def test_quantized_base_matches_peft_with_adapter_per_row(monkeypatch):
    plain, patched = pair()
    rows = ["default", "__base__", "other"]
    for model in (plain, patched):
        model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["four", "head"]))
        fill_adapters(model).eval()
    x = torch.randn(3, 64)
    with count_forwards(monkeypatch) as counts, torch.no_grad():
        assert_agree(patched(x, adapter_names=rows), plain(x, adapter_names=rows))
    assert counts["many"] == 3


def test_quantized_base_merges_as_in_peft():
    plain, patched = pair()
    x = torch.randn(3, 64)

    def act(model):
        model.merge_adapter()
        found = [model(x)]
        model.unmerge_adapter()
        return [*found, model(x)]

    assert_same(plain.eval(), patched.eval(), act)


def test_quantized_base_keeps_repr_and_unpatches():
    plain, patched = pair()
    assert repr(plain) == repr(patched)
    fastlora.unpatch_peft(patched)
    assert [type(m) for m in patched.modules()] == [type(m) for m in plain.modules()]
