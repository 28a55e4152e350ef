"""use_adapters blocks: what joint training refuses, and which rows a layer sees."""

from __future__ import annotations

import copy
import io
import threading

import pytest
import torch
from torch import Tensor, nn

import fastlora
from fastlora import LoRAConfig
from fastlora.model.record import get_training_rows
from fastlora.modules.trained import TrainableMultiLoRALinear
from tests.support.helpers import same_bits
from tests.support.models import error, llama, logits, tokens, untouched
from tests.support.trained_models import (
    CONFIG,
    losses_of_rows,
    model_of_several_adapters,
    per_adapter,
)

pytestmark = pytest.mark.filterwarnings(
    "ignore:.(is_gradient_checkpointing|gradient_checkpointing_enable). is deprecated"
)


def test_load_adapter_refuses_adapter_of_other_settings(tmp_path):
    for name, config in {
        "rank": LoRAConfig(r=2, target_modules="all-linear"),
        "scaling": LoRAConfig(r=4, lora_alpha=4, target_modules="all-linear"),
        "layers": LoRAConfig(r=4, lora_alpha=12, target_modules=["q_proj"]),
        "bias": LoRAConfig(r=4, lora_alpha=12, lora_bias=True, target_modules="all-linear"),
    }.items():
        fastlora.save_adapter(fastlora.replace_linear(llama(), config), tmp_path / name)
    model = model_of_several_adapters()
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
def test_replace_linear_refuses_configs_unfit_for_joint_training(names, config, error, message):
    model = llama()
    with untouched(model), pytest.raises(error, match=message):
        fastlora.replace_linear(model, config, adapter_names=names)


def test_forward_refuses_rows_without_names():
    model, ids = model_of_several_adapters(), tokens(3, 5)
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


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_joint_training_has_same_gradients(reentrant):
    rows, ids = ["ben", "anna", "ben"], tokens(3, 7)

    def gradients(checkpointed: bool) -> list[Tensor]:
        torch.manual_seed(1)
        model = model_of_several_adapters().train()
        if checkpointed:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        with fastlora.use_adapters(model, rows):
            sum(per_adapter(losses_of_rows(model, ids), rows).values()).backward()
        return [p.grad for p in fastlora.adapter_parameters(model, "ben")]

    for got, want in zip(gradients(True), gradients(False), strict=True):
        assert error(got, want) < 1e-5
    model = model_of_several_adapters().train()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    with fastlora.use_adapters(model, rows):
        loss = losses_of_rows(model, ids).sum()
    # Not another batch's adapters: none.
    with pytest.raises(RuntimeError, match="and its backward"):
        loss.backward()


def test_copied_models_have_separate_training_rows():
    model, ids = model_of_several_adapters(), tokens(2, 5)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert get_training_rows(other) is not get_training_rows(model)
        with fastlora.use_adapters(model, ["ben"] * 2):
            want = logits(model, ids)
            with pytest.raises(RuntimeError, match="no adapters were named"):
                logits(other, ids)
        with fastlora.use_adapters(other, ["ben"] * 2):
            assert same_bits(logits(other, ids), want)


def test_layer_refuses_wrong_batch_even_without_adapters():
    model, ids = model_of_several_adapters(), tokens(4, 5)
    for rows in ([], [None] * 3):
        with (
            fastlora.use_adapters(model, rows),
            pytest.raises(RuntimeError, match=f"expected {len(rows)} rows first"),
        ):
            model(input_ids=ids)


@pytest.mark.parametrize("reentrant", [False, True])
def test_backward_in_another_use_adapters_block_is_refused(reentrant):
    model, x = model_of_several_adapters().train(), tokens(3, 7)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    with fastlora.use_adapters(model, ["ben"] * 3):
        loss = losses_of_rows(model, x).sum()
    with (
        fastlora.use_adapters(model, ["anna"] * 3),
        pytest.raises(RuntimeError, match="not the rows of its forward"),
    ):
        loss.backward()


def test_use_adapters_blocks_belong_to_one_thread():
    model, ids = model_of_several_adapters(), tokens(2, 5)
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


def test_use_adapters_block_trains_after_inference_mode():
    model, ids = model_of_several_adapters(), tokens(2, 5)
    with torch.inference_mode():
        block = fastlora.use_adapters(model, ["ben", "anna"])
        block.__enter__()
        model(input_ids=ids)
    losses_of_rows(model, ids).sum().backward()
    block.__exit__(None, None, None)
    assert all(p.grad is not None for p in fastlora.adapter_parameters(model, "ben"))


def test_jointly_trained_model_refuses_merge_and_replace():
    model = model_of_several_adapters()
    for step in (fastlora.merge_adapter, fastlora.merge_and_unload):
        with untouched(model), pytest.raises(RuntimeError, match="several adapters in training"):
            step(model)
    half = fastlora.replace_linear(
        llama(), LoRAConfig(target_modules=["q_proj"]), adapter_names=["a"]
    )
    with untouched(half), pytest.raises(ValueError, match="have LoRA already"):
        fastlora.replace_linear(half, LoRAConfig(target_modules=["v_proj"]))
    rows = get_training_rows(model)
    for options, message in (
        ({"r": 0}, "r: expected"),
        ({"lora_dropout": 7}, "lora_dropout"),
        ({"init_lora_weights": "bogus"}, "init_lora_weights"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            TrainableMultiLoRALinear.from_linear(nn.Linear(3, 3), rows, **options)
