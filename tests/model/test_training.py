"""Several adapters trained in one batch match each adapter trained alone."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from torch.nn import functional as nnf

import fastlora
from fastlora import LoRAConfig, MultiLoRAModel
from fastlora.modules.trained import find_trained_layers
from tests.support.helpers import same_bits
from tests.support.models import assert_agree, bert, error, llama, logits, tokens
from tests.support.trained_models import (
    CONFIG,
    NAMES,
    losses_of_rows,
    model_of_one_adapter,
    model_of_several_adapters,
    per_adapter,
)

pytestmark = pytest.mark.filterwarnings(
    "ignore:.(is_gradient_checkpointing|gradient_checkpointing_enable). is deprecated"
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_joint_training_gives_each_adapter_its_gradients(dtype):
    rows = ["ben", "anna", None, "c.d-e", "anna", "ben", "anna"]
    ids = tokens(len(rows), 9)
    model = model_of_several_adapters(llama(dtype=dtype)).train()
    with fastlora.use_adapters(model, rows):
        sum(per_adapter(losses_of_rows(model, ids), rows).values()).backward()
    for name in ("anna", "ben", "c.d-e"):
        single = model_of_one_adapter(model, name, llama(dtype=dtype)).train()
        losses_of_rows(
            single, ids[[i for i, row in enumerate(rows) if row == name]]
        ).mean().backward()
        want = fastlora.adapter_state_dict(single)
        got = fastlora.adapter_state_dict(model, name)
        for key, parameter in want.items():
            # Two layers of half-precision rounding in another order; float32 is near exact.
            assert error(got[key].grad, parameter.grad) < (0.1 if dtype == torch.bfloat16 else 1e-4)
    # Who had no row takes no part: an optimizer leaves it alone.
    assert all(p.grad is None for p in fastlora.adapter_parameters(model, "dora"))
    assert all(p.grad is None for n, p in model.named_parameters() if "lora_" not in n)


def test_four_joint_adapters_match_four_single_runs():
    model = model_of_several_adapters().train()
    singles = {name: model_of_one_adapter(model, name).train() for name in NAMES}
    data = {name: tokens(2, 12) for name in NAMES}
    rows = [name for name in NAMES for _ in range(2)]
    batch = torch.cat(list(data.values()))

    def optimizer(parameters: Any) -> torch.optim.Optimizer:
        trained = [p for p in parameters if p.requires_grad]
        return torch.optim.AdamW(trained, lr=3e-3, weight_decay=0.1)

    joint = optimizer(model.parameters())
    apart = {name: optimizer(single.parameters()) for name, single in singles.items()}
    first: dict[str, float] = {}
    for _ in range(12):
        with fastlora.use_adapters(model, rows):
            mine = per_adapter(losses_of_rows(model, batch), rows)
            sum(mine.values()).backward()
        joint.step()
        joint.zero_grad()
        for name, single in singles.items():
            loss = losses_of_rows(single, data[name]).mean()
            loss.backward()
            apart[name].step()
            apart[name].zero_grad()
            # Adam divides by what may be tiny: differences of rounding grow from step to step.
            torch.testing.assert_close(mine[name], loss, rtol=1e-3, atol=0)
            first.setdefault(name, loss.item())
    assert all(mine[name].item() < 0.9 * first[name] for name in NAMES)


def test_rows_without_adapter_match_the_base():
    model, ids = model_of_several_adapters(), tokens(3, 6)
    base = logits(llama(), ids)
    with fastlora.use_adapters(model, [None, "ben", None]):
        mixed = logits(model, ids)
    with fastlora.use_adapters(model, [None] * 3):
        assert same_bits(logits(model, ids), base)
    with fastlora.disable_adapter(model):
        assert same_bits(logits(model, ids), base)
    assert_agree(mixed[[0, 2]], base[[0, 2]])
    assert_agree(mixed[1:2], logits(model_of_one_adapter(model, "ben"), ids[1:2]), base[1:2])


def test_jointly_trained_adapters_load_in_peft(tmp_path):
    model, ids = model_of_several_adapters(), tokens(2, 6)
    base = logits(llama(), ids)
    for name in NAMES:
        fastlora.save_adapter(model, tmp_path / name, adapter_name=name)
    for name in NAMES:
        with fastlora.use_adapters(model, [name] * 2):
            want = logits(model, ids)
        theirs = peft.PeftModel.from_pretrained(llama(), tmp_path / name)
        assert_agree(logits(theirs, ids), want, base)
    other = model_of_several_adapters(
        config=LoRAConfig(r=4, lora_alpha=12, target_modules="all-linear")
    )
    fastlora.load_adapter(other, tmp_path / "ben", adapter_name="dora", is_trainable=True)
    with fastlora.use_adapters(other, ["dora"] * 2):
        got = logits(other, ids)
    with fastlora.use_adapters(model, ["ben"] * 2):
        assert_agree(got, logits(model, ids), base)
    server = MultiLoRAModel(llama(), max_rank=4)
    server.load_adapter(tmp_path / "anna", "anna")
    with fastlora.use_adapters(model, ["anna", None]):
        assert_agree(server(ids, adapter_names=["anna", None]).logits, logits(model, ids), base)


def test_dropout_affects_only_rows_with_adapters():
    config = LoRAConfig(r=4, lora_dropout=0.5, target_modules="all-linear")
    model, ids = model_of_several_adapters(config=config), tokens(4, 8)
    base, rows = logits(llama(), ids), ["anna", None, "ben", "anna"]
    with fastlora.use_adapters(model, rows):
        still = logits(model, ids)
        assert same_bits(logits(model, ids), still)
        model.train()
        one, two = logits(model, ids), logits(model, ids)
    assert error(one[0], two[0]) > 0.01
    assert_agree(one[1], base[1])
    layer = next(layer for _, layer in find_trained_layers(model))
    layer.lora_dropout = 1.0
    x = torch.randn(2, 3, layer.in_features)
    with fastlora.use_adapters(model, ["anna", "ben"]):
        torch.testing.assert_close(layer(x), nnf.linear(x, layer.weight, layer.bias))


def test_report_counts_jointly_trained_adapters():
    model = model_of_several_adapters()
    report = fastlora.report(model)
    assert set(report.replaced.values()) == {4}
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    assert all("lora_" in name for name in names)
    assert report.trainable == 4 * fastlora.report(model_of_one_adapter(model, "ben")).trainable
    with pytest.raises(ValueError, match="already"):
        fastlora.replace_linear(model, CONFIG)


def test_state_dict_matches_adapters_by_name():
    model, other, ids = model_of_several_adapters(), llama(), tokens(2, 5)
    fastlora.replace_linear(other, CONFIG, adapter_names=[*reversed(NAMES)])
    other.load_state_dict(model.state_dict())
    with fastlora.use_adapters(model, ["ben", "c.d-e"]):
        want = logits(model, ids)
    with fastlora.use_adapters(other, ["ben", "c.d-e"]):
        assert same_bits(logits(other, ids), want)
    strangers = fastlora.replace_linear(llama(), CONFIG, adapter_names=["ben", "eve"])
    with pytest.raises(RuntimeError, match=r"lora_A\.eve"):
        strangers.load_state_dict(model.state_dict())


def test_bert_trains_several_adapters_in_one_batch():
    model, ids = model_of_several_adapters(bert()), tokens(3, 7)
    rows = ["dora", "ben", "dora"]
    with fastlora.use_adapters(model, rows):
        got = model(input_ids=ids).logits
    assert_agree(
        got[[0, 2]].detach(), logits(model_of_one_adapter(model, "dora", bert()), ids[[0, 2]])
    )
