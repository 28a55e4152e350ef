"""Several adapters trained on one base in one batch: each as if it were alone."""

from __future__ import annotations

import copy
import io
import threading
from collections.abc import Sequence
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as nnf

import fastlora
from fastlora import LoRAConfig, MultiLoRAModel
from fastlora.inject import training_rows
from fastlora.multi_modules import TrainableMultiLoRALinear, trained_layers
from tests.helpers import same_bits
from tests.models import (
    assert_agree,
    bert,
    error,
    llama,
    logits,
    randomise_lora,
    tokens,
    untouched,
)

NAMES = ("anna", "ben", "c.d-e", "dora")
CONFIG = LoRAConfig(r=4, lora_alpha=12, target_modules="all-linear")
pytestmark = pytest.mark.filterwarnings(
    "ignore:.(is_gradient_checkpointing|gradient_checkpointing_enable). is deprecated"
)


def together(base: nn.Module | None = None, config: LoRAConfig = CONFIG) -> nn.Module:
    model = fastlora.replace_linear(base or llama(), config, adapter_names=NAMES)
    return randomise_lora(model)


def alone(model: nn.Module, name: str, base: nn.Module | None = None) -> nn.Module:
    """A model with the one adapter, of the same values."""
    single = fastlora.replace_linear(base or llama(), training_config(model))
    values = fastlora.adapter_state_dict(model, name)
    with torch.no_grad():
        for key, parameter in fastlora.adapter_state_dict(single).items():
            parameter.copy_(values[key])
    return single


def training_config(model: nn.Module) -> LoRAConfig:
    return fastlora.inject.injection(model).config


def losses(model: nn.Module, ids: Tensor) -> Tensor:
    """Of each row its tokens' mean."""
    out = model(input_ids=ids).logits.float()
    each = nnf.cross_entropy(out[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return each.view(len(ids), -1).mean(1)


def per_adapter(loss: Tensor, names: Sequence[str | None]) -> dict[str, Tensor]:
    return {
        name: loss[[i for i, other in enumerate(names) if other == name]].mean()
        for name in dict.fromkeys(names)
        if name is not None
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_gets_the_gradients_that_it_would_get_alone(dtype):
    rows = ["ben", "anna", None, "c.d-e", "anna", "ben", "anna"]
    ids = tokens(len(rows), 9)
    model = together(llama(dtype=dtype)).train()
    with fastlora.use_adapters(model, rows):
        sum(per_adapter(losses(model, ids), rows).values()).backward()
    for name in ("anna", "ben", "c.d-e"):
        single = alone(model, name, llama(dtype=dtype)).train()
        losses(single, ids[[i for i, row in enumerate(rows) if row == name]]).mean().backward()
        want = fastlora.adapter_state_dict(single)
        got = fastlora.adapter_state_dict(model, name)
        for key, parameter in want.items():
            # Two layers of half-precision rounding in another order; float32 is near exact.
            assert error(got[key].grad, parameter.grad) < (0.1 if dtype == torch.bfloat16 else 1e-4)
    # Who had no row takes no part: an optimizer leaves it alone.
    assert all(p.grad is None for p in fastlora.adapter_parameters(model, "dora"))
    assert all(p.grad is None for n, p in model.named_parameters() if "lora_" not in n)


def test_four_at_once_reach_the_losses_of_four_runs():
    model = together().train()
    singles = {name: alone(model, name).train() for name in NAMES}
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
            mine = per_adapter(losses(model, batch), rows)
            sum(mine.values()).backward()
        joint.step()
        joint.zero_grad()
        for name, single in singles.items():
            loss = losses(single, data[name]).mean()
            loss.backward()
            apart[name].step()
            apart[name].zero_grad()
            # Adam divides by what may be tiny: differences of rounding grow from step to step.
            torch.testing.assert_close(mine[name], loss, rtol=1e-3, atol=0)
            first.setdefault(name, loss.item())
    assert all(mine[name].item() < 0.9 * first[name] for name in NAMES)


def test_rows_of_none_are_the_base_s():
    model, ids = together(), tokens(3, 6)
    base = logits(llama(), ids)
    with fastlora.use_adapters(model, [None, "ben", None]):
        mixed = logits(model, ids)
    with fastlora.use_adapters(model, [None] * 3):
        assert same_bits(logits(model, ids), base)
    with fastlora.disable_adapter(model):
        assert same_bits(logits(model, ids), base)
    assert_agree(mixed[[0, 2]], base[[0, 2]])
    assert_agree(mixed[1:2], logits(alone(model, "ben"), ids[1:2]), base[1:2])


def test_saved_adapters_are_peft_s_and_load_again(tmp_path):
    model, ids = together(), tokens(2, 6)
    base = logits(llama(), ids)
    for name in NAMES:
        fastlora.save_adapter(model, tmp_path / name, adapter_name=name)
    for name in NAMES:
        with fastlora.use_adapters(model, [name] * 2):
            want = logits(model, ids)
        theirs = peft.PeftModel.from_pretrained(llama(), tmp_path / name)
        assert_agree(logits(theirs, ids), want, base)
    other = together(config=LoRAConfig(r=4, lora_alpha=12, target_modules="all-linear"))
    fastlora.load_adapter(other, tmp_path / "ben", adapter_name="dora", is_trainable=True)
    with fastlora.use_adapters(other, ["dora"] * 2):
        got = logits(other, ids)
    with fastlora.use_adapters(model, ["ben"] * 2):
        assert_agree(got, logits(model, ids), base)
    server = MultiLoRAModel(llama(), max_rank=4)
    server.load_adapter(tmp_path / "anna", "anna")
    with fastlora.use_adapters(model, ["anna", None]):
        assert_agree(server(ids, adapter_names=["anna", None]).logits, logits(model, ids), base)


def test_a_loaded_adapter_must_fit(tmp_path):
    for name, config in {
        "rank": LoRAConfig(r=2, target_modules="all-linear"),
        "scaling": LoRAConfig(r=4, lora_alpha=4, target_modules="all-linear"),
        "layers": LoRAConfig(r=4, lora_alpha=12, target_modules=["q_proj"]),
        "bias": LoRAConfig(r=4, lora_alpha=12, lora_bias=True, target_modules="all-linear"),
    }.items():
        fastlora.save_adapter(fastlora.replace_linear(llama(), config), tmp_path / name)
    model = together()
    for name, message in {
        "rank": "the layer has r=4, the adapter r=2",
        "scaling": "the layer scales by 3, the adapter by 1",
        "layers": "the adapter's config does not name it",
        "bias": "none has biases of its own",
    }.items():
        with untouched(model), pytest.raises(ValueError, match=message):
            fastlora.load_adapter(model, tmp_path / name, adapter_name="anna")
    with untouched(model), pytest.raises(ValueError, match="adapter_name: expected which"):
        fastlora.load_adapter(model, tmp_path / "rank")
    for call in (fastlora.adapter_state_dict, fastlora.adapter_parameters):
        with pytest.raises(ValueError, match=r"one of anna, ben, c\.d-e, dora, got 'eve'"):
            call(model, "eve")


@pytest.mark.parametrize(
    "names, config, error, message",
    [
        ("anna", CONFIG, TypeError, "adapter_names: expected a list of names, got 'anna'"),
        ([], CONFIG, ValueError, "adapter_names: expected different names"),
        (["a", "a"], CONFIG, ValueError, "adapter_names: expected different names"),
        (["../a"], CONFIG, ValueError, "expected to match"),
        (["a", "__base__"], CONFIG, ValueError, 'none "__base__"'),
        (["a"], LoRAConfig(target_modules=["q_proj"], bias="all"), ValueError, "bias='all'"),
        (["a"], LoRAConfig(target_modules=["q_proj"], lora_bias=True), ValueError, "lora_bias"),
        (["a"], LoRAConfig(target_modules=["q_pro"]), ValueError, "no linear layer matches"),
    ],
)
def test_what_cannot_be_trained_together_is_refused(names, config, error, message):
    model = llama()
    with untouched(model), pytest.raises(error, match=message):
        fastlora.replace_linear(model, config, adapter_names=names)


def test_rows_must_be_named():
    model, ids = together(), tokens(3, 5)
    with pytest.raises(RuntimeError, match=r"within fastlora\.use_adapters"):
        model(input_ids=ids)
    with fastlora.use_adapters(model, ["ben"] * 2), pytest.raises(RuntimeError, match="expected 2"):
        model(input_ids=ids)
    single = fastlora.replace_linear(llama(), CONFIG)
    for asked, names, error_type, message in (
        (model, "ben", TypeError, "a name a row, got 'ben'"),
        (model, ["ben", "eve", None], ValueError, "expected one of anna"),
        (single, ["ben"], RuntimeError, "adapter_names="),
    ):
        with pytest.raises(error_type, match=message), fastlora.use_adapters(asked, names):
            pass
    with fastlora.use_adapters(model, ["ben"] * 3):
        outer = logits(model, ids)
        with fastlora.use_adapters(model, ["anna"] * 3):
            inner = logits(model, ids)
        assert same_bits(logits(model, ids), outer)
    assert error(inner, outer) > 0.01


def test_dropout_is_the_branch_s_alone():
    config = LoRAConfig(r=4, lora_dropout=0.5, target_modules="all-linear")
    model, ids = together(config=config), tokens(4, 8)
    base, rows = logits(llama(), ids), ["anna", None, "ben", "anna"]
    with fastlora.use_adapters(model, rows):
        still = logits(model, ids)
        assert same_bits(logits(model, ids), still)
        model.train()
        one, two = logits(model, ids), logits(model, ids)
    assert error(one[0], two[0]) > 0.01
    assert_agree(one[1], base[1])
    layer = next(layer for _, layer in trained_layers(model))
    layer.lora_dropout = 1.0
    x = torch.randn(2, 3, layer.in_features)
    with fastlora.use_adapters(model, ["anna", "ben"]):
        torch.testing.assert_close(layer(x), nnf.linear(x, layer.weight, layer.bias))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_activations(reentrant):
    rows, ids = ["ben", "anna", "ben"], tokens(3, 7)

    def gradients(checkpointed: bool) -> list[Tensor]:
        torch.manual_seed(1)
        model = together().train()
        if checkpointed:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        with fastlora.use_adapters(model, rows):
            sum(per_adapter(losses(model, ids), rows).values()).backward()
        return [p.grad for p in fastlora.adapter_parameters(model, "ben")]

    for got, want in zip(gradients(True), gradients(False), strict=True):
        assert error(got, want) < 1e-5
    model = together().train()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    with fastlora.use_adapters(model, rows):
        loss = losses(model, ids).sum()
    # Not another batch's adapters: none.
    with pytest.raises(RuntimeError, match="and its backward"):
        loss.backward()


def test_the_report_counts_them():
    model = together()
    report = fastlora.report(model)
    assert set(report.replaced.values()) == {4}
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    assert all("lora_" in name for name in names)
    assert report.trainable == 4 * fastlora.report(alone(model, "ben")).trainable
    with pytest.raises(ValueError, match="already"):
        fastlora.replace_linear(model, CONFIG)


def test_copies_have_rows_of_their_own():
    model, ids = together(), tokens(2, 5)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert training_rows(other) is not training_rows(model)
        with fastlora.use_adapters(model, ["ben"] * 2):
            want = logits(model, ids)
            with pytest.raises(RuntimeError, match="no adapters were named"):
                logits(other, ids)
        with fastlora.use_adapters(other, ["ben"] * 2):
            assert same_bits(logits(other, ids), want)


def test_a_state_dict_goes_by_names():
    model, other, ids = together(), llama(), tokens(2, 5)
    fastlora.replace_linear(other, CONFIG, adapter_names=[*reversed(NAMES)])
    other.load_state_dict(model.state_dict())
    with fastlora.use_adapters(model, ["ben", "c.d-e"]):
        want = logits(model, ids)
    with fastlora.use_adapters(other, ["ben", "c.d-e"]):
        assert same_bits(logits(other, ids), want)
    strangers = fastlora.replace_linear(llama(), CONFIG, adapter_names=["ben", "eve"])
    with pytest.raises(RuntimeError, match=r"lora_A\.eve"):
        strangers.load_state_dict(model.state_dict())


def test_every_layer_must_see_the_batch_even_of_the_base():
    model, ids = together(), tokens(4, 5)
    for rows in ([], [None] * 3):
        with (
            fastlora.use_adapters(model, rows),
            pytest.raises(RuntimeError, match=f"expected {len(rows)} rows first"),
        ):
            model(input_ids=ids)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_backward_in_another_block_is_refused(reentrant):
    model, x = together().train(), tokens(3, 7)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    with fastlora.use_adapters(model, ["ben"] * 3):
        loss = losses(model, x).sum()
    with (
        fastlora.use_adapters(model, ["anna"] * 3),
        pytest.raises(RuntimeError, match="not the rows of its forward"),
    ):
        loss.backward()


def test_blocks_are_one_thread_s_and_end_in_order():
    model, ids = together(), tokens(2, 5)
    failed: list[str] = []

    def another() -> None:
        try:
            with fastlora.use_adapters(model, ["anna"] * 2):
                pass
        except RuntimeError as error:
            failed.append(str(error))

    with fastlora.use_adapters(model, ["ben"] * 2):
        thread = threading.Thread(target=another)
        thread.start()
        thread.join()
        copied = copy.deepcopy(model)
    assert failed == ["use_adapters: another thread is in such a block of this model"]
    with pytest.raises(RuntimeError, match="no adapters were named"):
        copied(input_ids=ids)
    one, two = (fastlora.use_adapters(model, [name] * 2) for name in ("ben", "anna"))
    one.__enter__()
    two.__enter__()
    with pytest.raises(RuntimeError, match="another order"):
        one.__exit__(None, None, None)


def test_inference_first_and_training_after_in_one_block():
    model, ids = together(), tokens(2, 5)
    with torch.inference_mode():
        block = fastlora.use_adapters(model, ["ben", "anna"])
        block.__enter__()
        model(input_ids=ids)
    losses(model, ids).sum().backward()
    block.__exit__(None, None, None)
    assert all(p.grad is not None for p in fastlora.adapter_parameters(model, "ben"))


def test_what_such_a_model_refuses():
    model = together()
    for step in (fastlora.merge_adapter, fastlora.merge_and_unload):
        with untouched(model), pytest.raises(RuntimeError, match="several adapters in training"):
            step(model)
    half = fastlora.replace_linear(
        llama(), LoRAConfig(target_modules=["q_proj"]), adapter_names=["a"]
    )
    with untouched(half), pytest.raises(ValueError, match="have LoRA already"):
        fastlora.replace_linear(half, LoRAConfig(target_modules=["v_proj"]))
    rows = training_rows(model)
    for options, message in (
        ({"r": 0}, "r: expected"),
        ({"lora_dropout": 7}, "lora_dropout"),
        ({"init_lora_weights": "bogus"}, "init_lora_weights"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            TrainableMultiLoRALinear.from_linear(nn.Linear(3, 3), rows, **options)


def test_another_architecture():
    model, ids = together(bert()), tokens(3, 7)
    rows = ["dora", "ben", "dora"]
    with fastlora.use_adapters(model, rows):
        got = model(input_ids=ids).logits
    assert_agree(got[[0, 2]].detach(), logits(alone(model, "dora", bert()), ids[[0, 2]]))
