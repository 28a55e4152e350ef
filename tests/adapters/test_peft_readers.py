"""One adapter's files mean the same to PEFT, a model, a server and a merge."""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda
from safetensors.torch import load_file
from torch import Tensor, nn

import fastlora
from fastlora import LoRAConfig
from fastlora.modules.layer import find_lora_layers
from tests.support.checkpoints import CONFIG as BASE_CONFIG
from tests.support.checkpoints import edit_json, load, save_base
from tests.support.models import (
    assert_agree,
    llama,
    logits,
    quiet,
    randomise_lora,
    tokens,
    untouched,
)

pytestmark = quiet

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
Q0, Q1 = (f"model.layers.{i}.self_attn.q_proj" for i in (0, 1))


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return save_base(tmp_path_factory.mktemp("base") / "base", size="1GB")


def by_peft(folder: Path, base: Path, ids: Tensor) -> Tensor:
    return logits(peft.PeftModel.from_pretrained(llama(), str(folder)).eval(), ids)


def by_load(folder: Path, base: Path, ids: Tensor) -> Tensor:
    return logits(fastlora.load_adapter(llama(), folder), ids)


def by_server(folder: Path, base: Path, ids: Tensor) -> Tensor:
    server = fastlora.MultiLoRAModel(llama(), max_adapters=1, max_rank=64)
    server.load_adapter(folder, adapter_name="a")
    with torch.no_grad():
        return server(ids, adapter_names=["a"] * len(ids)).logits


def by_merge(folder: Path, base: Path, ids: Tensor) -> Tensor:
    out = folder.with_name(f"{folder.name} merged {len(list(folder.parent.iterdir()))}")
    fastlora.merge_checkpoint(base, [folder], out)
    assert (out / BASE_CONFIG).exists()
    return logits(load(out), ids)


def by_combining(folder: Path, base: Path, ids: Tensor) -> Tensor:
    out = folder.with_name(f"{folder.name} combined {len(list(folder.parent.iterdir()))}")
    fastlora.combine_adapters([folder], [1.0], out)
    return by_load(out, base, ids)


OURS = [by_load, by_server, by_merge, by_combining]
READERS = [by_peft, *OURS]


def assert_all_read(folder: Path, base: Path, ids: Tensor, want: Tensor) -> None:
    for read in READERS:
        assert_agree(read(folder, base, ids), want, logits(llama(), ids))


def settings(folder: Path) -> dict[str, Any]:
    return json.loads((folder / CONFIG).read_text())


# In each, what counts first would not in the order of the alphabet.
PATTERNS = {
    "alphas": {"alpha_pattern": {"q_proj": 4, "layers.0.self_attn.q_proj": 64}},
    "ranks": {"rank_pattern": {"q_proj": 4, "layers.0.self_attn.q_proj": 2}},
    "both": {
        "rank_pattern": {r"q_(proj|x)": 3, "model.layers.0": 5, r"layers\.1\..*": 2, ".*v_proj": 6},
        "alpha_pattern": {"v_proj": 40, r"^model\.layers\.0\..*": 8, "_proj|.*": 2},
        "use_rslora": True,
    },
    "full name": {"alpha_pattern": {"v_proj": 2, f"^{Q0}": 64, Q0: 1, "self_attn.q_proj": 30}},
    "equal": {"alpha_pattern": {"q_proj": 4, "layers.0.self_attn.q_proj": 4, "v_proj": 32}},
}


@pytest.mark.filterwarnings("ignore:.*(rank|alpha)_pattern.*(did not match|no layer)")
@pytest.mark.parametrize("case", PATTERNS)
def test_order_of_patterns_survives_saving(tmp_path, base, case):
    options = {"target_modules": ["q_proj", "v_proj"], "lora_alpha": 8} | PATTERNS[case]
    ours, ids = fastlora.replace_linear(llama(), LoRAConfig(**options)), tokens(2, 7)
    fastlora.save_adapter(randomise_lora(ours), tmp_path / "a")
    want = logits(ours, ids)
    there = {name: (layer.r, layer.scaling) for name, layer in find_lora_layers(ours)}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*more than one key")
        assert_all_read(tmp_path / "a", base, ids, want)
        # However another program may have written them.
        for name in ("rank_pattern", "alpha_pattern"):
            turned = dict(reversed(settings(tmp_path / "a")[name].items()))
            edit_json(tmp_path / "a" / CONFIG, **{name: turned})
        assert_agree(by_peft(tmp_path / "a", base, ids), want)
        theirs = peft.PeftModel.from_pretrained(llama(), str(tmp_path / "a"))
        theirs.save_pretrained(str(tmp_path / "b"))
        again = fastlora.load_adapter(llama(), tmp_path / "b")
        fastlora.load_adapter(ours, tmp_path / "b")
    for model in (again, ours):
        assert {n: (layer.r, layer.scaling) for n, layer in find_lora_layers(model)} == there
    if case == "equal":  # keys that do not contradict each other stay as they were given
        assert settings(tmp_path / "a")["alpha_pattern"] == options["alpha_pattern"]


def test_ranks_sorted_by_peft_follow_tensors(tmp_path, base):
    options = PATTERNS["ranks"] | {"alpha_pattern": {"v_proj": 3}}
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], **options)
    theirs, ids = randomise_lora(peft.get_peft_model(llama(), config)).eval(), tokens(2, 7)
    theirs.save_pretrained(str(tmp_path / "a"))
    assert [*settings(tmp_path / "a")["rank_pattern"]] == sorted(options["rank_pattern"])
    for read in OURS:
        assert_agree(read(tmp_path / "a", base, ids), logits(theirs, ids), logits(llama(), ids))
    # What we make of it PEFT can read again; itself it cannot.
    model = fastlora.load_adapter(llama(), tmp_path / "a")
    fastlora.save_adapter(model, tmp_path / "b")
    assert_all_read(tmp_path / "b", base, ids, logits(theirs, ids))
    edit_json(tmp_path / "a" / CONFIG, rank_pattern={"q_proj": 3, "layers.0.self_attn.q_proj": 5})
    with untouched(model), pytest.raises(ValueError, match=r"expected shape|the layer has r=4"):
        fastlora.load_adapter(model, tmp_path / "a")


def test_ambiguous_alphas_sorted_by_peft_give_warnings(tmp_path, base):
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], **PATTERNS["alphas"])
    ids = tokens(2, 7)
    theirs = randomise_lora(peft.get_peft_model(llama(), config)).eval()
    theirs.save_pretrained(str(tmp_path / "a"))
    says = rf"{Q0}: 64 \('layers.0.self_attn.q_proj'\) or 4 \('q_proj'\)\. PEFT writes"
    for read in OURS:
        with pytest.warns(UserWarning, match=says) as seen:
            got = read(tmp_path / "a", base, ids)
        assert not any(Q1 in str(each.message) for each in seen)
        # As PEFT takes its own file.
        assert_agree(got, by_peft(tmp_path / "a", base, ids), logits(theirs, ids))
    # An order that nobody has sorted is the one that was meant.
    edit_json(tmp_path / "a" / CONFIG, **PATTERNS["alphas"])
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*more than one key")
        assert_all_read(tmp_path / "a", base, ids, logits(theirs, ids))


class Nested(nn.Module):
    """A linear whose name is the end of others' names, of which all-linear leaves one out."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(4, 4)
        self.inner = nn.ModuleDict({"out": nn.Linear(4, 4), "up": nn.Linear(4, 4)})

    def get_output_embeddings(self) -> nn.Module:
        return self.inner["out"]

    def forward(self, x: Tensor) -> Tensor:
        return self.inner["out"](self.inner["up"](self.out(x)))


def test_names_ending_others_match_only_themselves(tmp_path):
    ours = randomise_lora(
        fastlora.replace_linear(Nested(), LoRAConfig(target_modules="all-linear"))
    )
    assert [name for name, _ in find_lora_layers(ours)] == ["out", "inner.up"]
    fastlora.save_adapter(ours, tmp_path / "a")
    fastlora.combine_adapters([tmp_path / "a"] * 2, [0.5, 0.5], tmp_path / "b")
    # Of other layers than the first, so that the names themselves are written.
    one = randomise_lora(fastlora.replace_linear(Nested(), LoRAConfig(target_modules=("up",))))
    fastlora.save_adapter(one, tmp_path / "c")
    fastlora.combine_adapters([tmp_path / "a", tmp_path / "c"], [1.0, 0.5], tmp_path / "d")
    for name in "abd":
        model = fastlora.load_adapter(Nested(), tmp_path / name)
        theirs = peft.PeftModel.from_pretrained(Nested(), str(tmp_path / name))
        found = [n for n, m in theirs.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)]
        assert [n.removeprefix("base_model.model.") for n in found] == ["out", "inner.up"]
        assert [n for n, _ in find_lora_layers(model)] == ["out", "inner.up"]


def eva(model: nn.Module, ids: Tensor) -> nn.Module:
    """With the ranks that EVA deals out anew: a full name a layer in rank_pattern."""
    config = peft.LoraConfig(
        init_lora_weights="eva", eva_config=peft.EvaConfig(rho=2.0), r=4,
        target_modules=["q_proj", "down_proj"], lora_alpha=6, task_type="CAUSAL_LM",
    )  # fmt: skip
    theirs = peft.get_peft_model(model, config)
    mask = torch.ones_like(ids)
    batches = [{"input_ids": ids, "attention_mask": mask, "labels": ids}] * 12
    peft.initialize_lora_eva_weights(theirs, batches, show_progress_bar=False)
    return theirs


def mica(model: nn.Module, ids: Tensor) -> nn.Module:
    config = peft.LoraConfig(init_lora_weights="mica", target_modules=["q_proj", "up_proj"], r=4)
    theirs = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_A" in name:
                parameter.copy_(torch.randn(parameter.shape) * 0.3)
    return theirs


def corda(model: nn.Module, ids: Tensor) -> nn.Module:
    config = peft.LoraConfig(
        init_lora_weights="corda", corda_config=CordaConfig(), target_modules=["q_proj"], r=4
    )
    preprocess_corda(model, config, run_model=lambda: [logits(model, row[None]) for row in ids])
    return peft.get_peft_model(model, config)


def lora_ga(model: nn.Module, ids: Tensor) -> nn.Module:
    config = peft.LoraConfig(
        init_lora_weights="lora_ga", lora_ga_config=peft.LoraGAConfig(), r=4,
        target_modules=["q_proj"],
    )  # fmt: skip
    peft.preprocess_loraga(model, config, lambda: model(ids, labels=ids).loss.backward())
    return peft.get_peft_model(model, config)


Begin = Callable[[nn.Module, Tensor], nn.Module]


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {n.replace("base_layer.", ""): p.clone() for n, p in model.state_dict().items()}


@pytest.mark.filterwarnings("ignore:lora with eva init", "ignore:.*low_cpu_mem_usage")
@pytest.mark.parametrize("begin", [eva, mica], ids=lambda begin: begin.__name__)
def test_adapter_initialised_on_plain_base_loads_everywhere(tmp_path, base, begin: Begin):
    ids, plain = tokens(3, 8), weights(llama())
    theirs = begin(llama(), ids)
    while begin is eva and not theirs.peft_config["default"].rank_pattern:
        ids = tokens(3, 8)  # of the last ones every layer came by the same rank
        theirs = begin(llama(), ids)
    if begin is eva:
        randomise_lora(theirs)
    # It has left the base as it is.
    left = weights(theirs.base_model.model)
    assert all(torch.equal(left[name], plain[name]) for name in plain)
    theirs.save_pretrained(str(tmp_path / "a"))
    assert settings(tmp_path / "a")["init_lora_weights"] == begin.__name__
    assert_all_read(tmp_path / "a", base, ids, logits(theirs.eval(), ids))
    # To begin so needs what fastlora has not; to go on from EVA's does not.
    config = peft.LoraConfig.from_pretrained(str(tmp_path / "a"))
    model = llama()
    with untouched(model), pytest.raises(ValueError, match=begin.__name__):
        fastlora.replace_linear(model, config)
    expected = (
        pytest.raises(ValueError, match=r"is_trainable.*'mica' trains lora_A alone")
        if begin is mica
        else contextlib.nullcontext()
    )
    with expected:
        fastlora.load_adapter(model, tmp_path / "a", is_trainable=True)
    assert bool(list(find_lora_layers(model))) == (begin is eva)


@pytest.mark.filterwarnings("ignore:Full backward hook is firing", "ignore:CorDA changes the base")
@pytest.mark.parametrize("begin", [corda, lora_ga], ids=lambda begin: begin.__name__)
def test_adapter_of_changed_base_needs_conversion(tmp_path, base, begin: Begin):
    ids, plain = tokens(3, 8), weights(llama())
    theirs, name = begin(llama(), ids), begin.__name__
    left = weights(theirs.base_model.model)
    assert not all(torch.allclose(left[n], plain[n], atol=1e-3) for n in plain)
    start = tmp_path / "start"
    theirs.peft_config["default"].init_lora_weights = True  # as PEFT's guides of both do
    theirs.save_pretrained(str(start))
    theirs.peft_config["default"].init_lora_weights = name
    randomise_lora(theirs).eval()
    theirs.save_pretrained(str(tmp_path / "a"))
    says = f"init_lora_weights='{name}': the adapter is for another base: PEFT subtracted"
    for read in OURS:
        with pytest.raises(ValueError, match=says):
            read(tmp_path / "a", base, ids)
    want = logits(theirs, ids)
    theirs.save_pretrained(str(tmp_path / "b"), path_initial_model_for_weight_conversion=str(start))
    # How it began is still written there.
    assert settings(tmp_path / "b")["init_lora_weights"] is True
    assert settings(tmp_path / "b")[f"{name}_config"]
    assert load_file(tmp_path / "b" / WEIGHTS)[f"base_model.model.{Q0}.lora_A.weight"].shape[0] == 8
    for read in OURS:
        assert_agree(read(tmp_path / "b", base, ids), want, logits(llama(), ids))


def test_adapter_of_quantised_base_is_refused(tmp_path, base):
    """LoftQ's needs CUDA to begin in PEFT; here is its config, from there."""
    config = LoRAConfig(target_modules=("q_proj",))
    fastlora.save_adapter(fastlora.replace_linear(llama(), config), tmp_path / "a")
    asked = {"loftq_bits": 4, "loftq_iter": 1}
    edit_json(tmp_path / "a" / CONFIG, init_lora_weights="loftq", loftq_config=asked)
    for read in OURS:
        with pytest.raises(ValueError, match=r"'loftq'.*quantised weights in the place of"):
            read(tmp_path / "a", base, tokens(1, 3))
    edit_json(tmp_path / "a" / CONFIG, init_lora_weights=True)
    by_load(tmp_path / "a", base, tokens(1, 3))
