"""Folders of adapters are combined into one, which loads and computes as PEFT's combination."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import fastlora
from fastlora.adapters.combine import TYPES
from tests.support.checkpoints import PREFIX
from tests.support.models import assert_agree, error, llama, logits, quiet, randomise_lora, tokens

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
LAYER = "model.layers.0.self_attn.q_proj"

pytestmark = quiet

PLAIN = {"target_modules": ["q_proj", "up_proj"], "r": 4}
PATTERNS = {
    "target_modules": ["q_proj", "v_proj", "down_proj"],
    "r": 4,
    "rank_pattern": {"q_proj": 6, r"layers\.1\.mlp\.down_proj": 2},
    "alpha_pattern": {"v_proj": 20},
}
SOURCES = {
    "alike": [PLAIN, PLAIN | {"lora_alpha": 3}, PLAIN | {"lora_dropout": 0.5}],
    "other layers": [PLAIN, {"target_modules": ["q_proj", "o_proj", "lm_head"], "r": 4}],
    "other ranks": [PLAIN, {"target_modules": ["up_proj", "v_proj"], "r": 3}],
    "patterns": [PATTERNS, PLAIN],
    "rslora": [PLAIN, PLAIN | {"use_rslora": True, "lora_alpha": 5}],
    "one": [PLAIN | {"lora_alpha": 3}],
}
ALIKE = ("alike", "other layers", "rslora", "one")


def save_random_adapter(
    folder: Path, options: dict[str, Any], dtype: torch.dtype = torch.float32
) -> Path:
    model = randomise_lora(peft.get_peft_model(llama(), peft.LoraConfig(**options)))
    model.to(dtype).save_pretrained(str(folder), save_embedding_layers=False)
    return folder


def save_adapters_of_case(tmp_path: Path, name: str) -> list[Path]:
    return [
        save_random_adapter(tmp_path / str(i), options) for i, options in enumerate(SOURCES[name])
    ]


def combine_by_peft(
    folders: Sequence[Path], weights: list[float], kind: str, **options: Any
) -> nn.Module:
    names = "abc"[: len(folders)]
    model = peft.PeftModel.from_pretrained(llama(), str(folders[0]), adapter_name="a")
    for name, folder in zip(names[1:], folders[1:], strict=True):
        model.load_adapter(str(folder), name)
    inject = model.base_model.inject_adapter

    def then_seed(*args: Any, **kwargs: Any) -> None:
        inject(*args, **kwargs)  # draws the new adapter's initial values
        torch.manual_seed(7)

    model.base_model.inject_adapter = then_seed
    model.add_weighted_adapter([*names], weights, "new", kind, **options)
    model.set_adapter("new")
    return model.eval()


def logits_in_both_libraries(folder: Path, ids: Tensor) -> list[Tensor]:
    """Logits of the combined adapter in both libraries."""
    theirs = peft.PeftModel.from_pretrained(llama(), str(folder)).eval()
    return [logits(theirs, ids), logits(fastlora.load_adapter(llama(), folder), ids)]


CASES = [
    *[(name, kind) for name in ("alike", "one") for kind in TYPES if not kind.startswith("dare")],
    *[("other layers", kind) for kind in ("svd", "cat", "linear", "ties", "magnitude_prune_svd")],
    *[(name, kind) for name in ("other ranks", "patterns") for kind in ("svd", "cat", "ties_svd")],
    *[("rslora", kind) for kind in ("svd", "cat", "linear", "ties")],
]


@pytest.mark.parametrize("name, kind", CASES)
def test_combined_folder_equals_peft_in_both_libraries(tmp_path, name, kind):
    folders, ids = save_adapters_of_case(tmp_path, name), tokens(2, 7)
    weights, out = [0.9, -0.6, 0.5][: len(folders)], tmp_path / "out"
    want = logits(combine_by_peft(folders, weights, kind, density=0.6), ids)
    fastlora.combine_adapters(folders, weights, out, combination_type=kind, density=0.6)
    for got in logits_in_both_libraries(out, ids):
        # PEFT cuts a float32 delta between singular values that may be close.
        assert error(got, want) < (1e-4 if kind == "svd" else 1e-5)
        assert error(logits(llama(), ids), want) > 1e-2


@pytest.mark.parametrize("kind", [name for name in TYPES if name.startswith("dare")])
def test_random_pruning_equals_peft_from_same_seed(tmp_path, kind):
    """The same entries from the same seed, where the model has its layers in our order."""
    options = {"target_modules": ["q_proj"], "r": 4}
    folders, ids = [save_random_adapter(tmp_path / name, options) for name in "ab"], tokens(2, 7)
    want = logits(combine_by_peft(folders, [0.9, -0.6], kind, density=0.6), ids)
    torch.manual_seed(7)
    options = {"combination_type": kind, "density": 0.6}
    fastlora.combine_adapters(folders, [0.9, -0.6], tmp_path / "out", **options)
    for got in logits_in_both_libraries(tmp_path / "out", ids):
        assert_agree(got, want, logits(llama(), ids))


def test_combined_rslora_adapter_scales_once(tmp_path):
    """PEFT leaves use_rslora on where the first adapter has it, and so multiplies by sqrt(r)."""
    both = [PLAIN | {"use_rslora": True}, PLAIN]
    folders = [save_random_adapter(tmp_path / str(i), options) for i, options in enumerate(both)]
    ids = tokens(2, 7)
    config = fastlora.combine_adapters(
        folders, [0.5, 0.5], tmp_path / "out", combination_type="cat"
    )
    assert not config.use_rslora
    flipped = combine_by_peft(folders[::-1], [0.5, 0.5], "cat")
    for got in logits_in_both_libraries(tmp_path / "out", ids):
        assert_agree(got, logits(flipped, ids), logits(llama(), ids))


def test_server_loads_a_combined_adapter(tmp_path):
    folders, ids = save_adapters_of_case(tmp_path, "patterns"), tokens(2, 7)
    fastlora.combine_adapters(folders, [0.9, -0.6], tmp_path / "out", combination_type="cat")
    server = fastlora.MultiLoRAModel(llama(), max_adapters=2, max_rank=10)
    server.load_adapter(tmp_path / "out", adapter_name="both")
    want = logits_in_both_libraries(tmp_path / "out", ids)[0]
    with torch.no_grad():
        assert_agree(server(ids, adapter_names=["both"] * 2).logits, want, logits(llama(), ids))


def test_combined_config_stays_for_equal_adapters(tmp_path):
    folders = save_adapters_of_case(tmp_path, "alike")
    config = fastlora.combine_adapters(folders, [1.0, 1.0, 1.0], tmp_path / "out", svd_rank=5)
    assert (config.r, config.lora_alpha, config.rank_pattern) == (5, 5, {})
    assert sorted(config.target_modules) == ["q_proj", "up_proj"]
    assert json.loads((tmp_path / "out" / CONFIG).read_text())["r"] == 5


def test_combined_config_names_layers_of_unequal_adapters(tmp_path):
    folders = save_adapters_of_case(tmp_path, "patterns")
    config = fastlora.combine_adapters(
        folders, [1.0, 1.0], tmp_path / "out", combination_type="cat"
    )
    file = load_file(tmp_path / "out" / WEIGHTS)
    ranks = {
        key.removeprefix(PREFIX).removesuffix(".lora_A.weight"): len(t)
        for key, t in file.items()
        if "lora_A" in key
    }
    assert set(config.target_modules) == set(ranks)
    assert ranks[LAYER] == 10
    assert ranks["model.layers.1.mlp.down_proj"] == 2
    for name, rank in ranks.items():
        assert config.rank_of(name) == rank
        assert config.scaling_of(name) == 1
    assert config.rank_of("other." + LAYER) == config.rank_of(LAYER.replace(".", "_")) == config.r


def test_combined_adapter_keeps_layers_excluded_by_first(tmp_path):
    """PEFT keeps the first adapter's exclude_modules for all."""
    first = save_random_adapter(tmp_path / "a", PLAIN | {"exclude_modules": [LAYER]})
    second = save_random_adapter(tmp_path / "b", PLAIN)
    config = fastlora.combine_adapters([first, second], [1.0, 1.0], tmp_path / "out")
    assert config.exclude_modules is None
    assert f"{PREFIX}{LAYER}.lora_A.weight" in load_file(tmp_path / "out" / WEIGHTS)


@pytest.mark.parametrize("other", [0, 1])
def test_layers_to_transform_stay_only_when_equal(tmp_path, other):
    """Kept where they are the same; those of the first alone would be others' layers lost."""
    layers = [0, other]
    folders = [save_random_adapter(tmp_path / str(i), PLAIN | {"layers_to_transform": n})
               for i, n in enumerate(layers)]  # fmt: skip
    config = fastlora.combine_adapters(folders, [1.0, 1.0], tmp_path / "out")
    assert config.layers_to_transform == (0 if other == 0 else None)
    found = {key.split(".")[4] for key in load_file(tmp_path / "out" / WEIGHTS)}
    assert found == {str(n) for n in layers}
    ours, theirs = logits_in_both_libraries(tmp_path / "out", tokens(2, 5))
    assert_agree(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["svd", "linear", "ties", "ties_svd"])
def test_combined_file_keeps_dtype_of_inputs(tmp_path, kind, dtype):
    """PEFT loads halves as float32 and combines them so; the result is rounded once."""
    folders = [save_random_adapter(tmp_path / name, PLAIN, dtype) for name in "ab"]
    options = {"density": 0.5}
    fastlora.combine_adapters(
        folders, [0.9, -0.6], tmp_path / "out", combination_type=kind, **options
    )
    got = load_file(tmp_path / "out" / WEIGHTS)
    assert {t.dtype for t in got.values()} == {dtype}
    theirs = combine_by_peft(folders, [0.9, -0.6], kind, **options)
    want = peft.get_peft_model_state_dict(theirs, adapter_name="new", save_embedding_layers=False)
    for key in got:
        if kind in ("linear", "ties"):
            assert torch.equal(got[key], want[key].to(dtype))
        elif key.endswith("lora_A.weight"):
            A, B = key, key.replace("lora_A", "lora_B")
            ours, exact = got[B].float() @ got[A].float(), want[B] @ want[A]
            assert (ours - exact).norm() <= 2 * torch.finfo(dtype).eps * exact.norm()


def test_combine_adapters_accepts_a_device(tmp_path):
    folders = save_adapters_of_case(tmp_path, "alike")
    for where in ("cpu", torch.device("cpu"), None):
        out = tmp_path / f"out {where!r}"
        fastlora.combine_adapters(folders, [1, 1, 1], out, device=where)
    files = [path.read_bytes() for path in sorted(tmp_path.glob("out*/*.safetensors"))]
    assert files[0] == files[1] == files[2]


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS, "adapter_model.bin"])
def test_combine_adapters_refuses_folder_holding_adapter(tmp_path, name):
    folders = save_adapters_of_case(tmp_path, "alike")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_bytes(b"mine")
    with pytest.raises(FileExistsError, match=f"directory: .* already holds {name}"):
        fastlora.combine_adapters(folders, [1, 1, 1], tmp_path / "out")
    assert [path.read_bytes() for path in (tmp_path / "out").iterdir()] == [b"mine"]
    with pytest.raises(FileExistsError):
        fastlora.combine_adapters(folders, [1, 1, 1], folders[0])


def edit_config(folder: Path, **changes: object) -> None:
    values = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(values | changes))


def edit_tensors(folder: Path, **changes: Tensor | None) -> None:
    tensors = load_file(folder / WEIGHTS)
    for key, value in changes.items():
        name = f"{PREFIX}{LAYER}.{key}.weight"
        tensors.pop(name, None)
        if value is not None:
            tensors[name] = value
    save_file(tensors, folder / WEIGHTS)


SPOILS = {
    "lora_bias": (lambda f: edit_config(f, lora_bias=True), "biases of its own"),
    "bias": (lambda f: edit_config(f, bias="all"), "biases of its own, got .*'all'"),
    "dora": (lambda f: edit_config(f, use_dora=True), "does not support use_dora"),
    "saved": (lambda f: edit_config(f, modules_to_save=["lm_head"]), "modules_to_save"),
    "kind": (lambda f: edit_config(f, peft_type="LOHA"), "peft_type: expected LORA"),
    "rank": (lambda f: edit_config(f, r=5), r"expected shape \(5, 32\), got \(4, 32\)"),
    "names": (lambda f: edit_config(f, target_modules=["up_proj"]), "config does not name it"),
    "excludes": (lambda f: edit_config(f, exclude_modules=["q_proj"]), "does not name it"),
    "missing A": (lambda f: edit_tensors(f, lora_A=None), f"missing {LAYER}.lora_A.weight"),
    "missing B": (lambda f: edit_tensors(f, lora_B=None), f"missing {LAYER}.lora_B.weight"),
    "unknown": (lambda f: edit_tensors(f, lora_C=torch.ones(1)), "unexpected .*lora_C"),
    "columns": (
        lambda f: edit_tensors(f, lora_A=torch.ones(4, 8)),
        rf"{LAYER}: adapters: expected deltas of one shape .*\(32, 32\), \(32, 8\)",
    ),
    "4-D": (
        lambda f: edit_tensors(f, lora_A=torch.ones(4, 32, 1, 1)),
        rf"{LAYER}: expected lora_A \(R, K\)",
    ),
    "vector": (lambda f: edit_tensors(f, lora_A=torch.ones(4)), rf"{LAYER}: expected lora_A"),
    "nan": (
        lambda f: edit_tensors(f, lora_A=torch.full((4, 32), float("nan"))),
        f"{LAYER}: lora_A: expected finite numbers",
    ),
    "no layers": (lambda f: save_file({}, f / WEIGHTS), "expected a LoRA layer, found none"),
    "cut off": (lambda f: (f / WEIGHTS).write_bytes(b"123"), "truncated"),
    "pickle": (lambda f: (f / WEIGHTS).rename(f / "adapter_model.bin"), "is a pickle"),
}


@pytest.mark.parametrize("case", SPOILS)
def test_combine_adapters_refuses_bad_files(tmp_path, case):
    folders = [save_random_adapter(tmp_path / name, PLAIN) for name in "ab"]
    spoil, message = SPOILS[case]
    spoil(folders[1])
    with pytest.raises(ValueError, match=message):
        fastlora.combine_adapters(folders, [1.0, 1.0], tmp_path / "out", combination_type="cat")
    assert not (tmp_path / "out").exists()


def test_combine_adapters_names_a_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=CONFIG):
        fastlora.combine_adapters([tmp_path / "nothing"], [1.0], tmp_path / "out")


ARGUMENTS = {
    "text": ({"directories": "abc"}, TypeError, "directories: expected a list, got str"),
    "none": ({"directories": [], "weights": []}, ValueError, "directories: expected at least one"),
    "lengths": ({"weights": [1.0]}, ValueError, "weights: expected one for each of 2 directories"),
    "weight": ({"weights": [1.0, float("nan")]}, ValueError, r"weights\[1\]: expected a finite"),
    "type": ({"combination_type": "sum"}, ValueError, "combination_type: expected one of svd"),
    "density": ({"combination_type": "dare_ties"}, ValueError, "density: dare_ties needs"),
    "rank": ({"svd_rank": -1}, ValueError, "svd_rank: expected a whole number"),
    "driver": ({"svd_driver": "gesvd"}, ValueError, "svd_driver: CUDA alone"),
    "ranks": ({"combination_type": "linear"}, ValueError, r"up_proj: .* got ranks \[4, 3\]"),
}


@pytest.mark.parametrize("case", ARGUMENTS)
def test_combine_adapters_with_bad_arguments_writes_nothing(tmp_path, case):
    changes, kind, message = ARGUMENTS[case]
    good = {"directories": save_adapters_of_case(tmp_path, "other ranks"), "weights": [1.0, 1.0]}
    with pytest.raises(kind, match=message):
        fastlora.combine_adapters(**(good | {"directory": tmp_path / "out"} | changes))
    assert not (tmp_path / "out").exists()
