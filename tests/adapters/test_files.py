"""Adapter files are not trusted: bad ones are refused by name and change nothing."""

from __future__ import annotations

import functools
import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save_file
from torch import nn

import fastlora
from fastlora import LoRAConfig, MultiLoRAModel
from fastlora.adapters import files as adapter_files
from fastlora.modules.layer import find_lora_layers
from tests.support.models import bert, llama, randomise_lora, untouched

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
QV = LoRAConfig(r=4, lora_alpha=6, target_modules=["q_proj", "v_proj"])
FIRST = PREFIX + "model.layers.0.self_attn.q_proj.lora_A.weight"  # (4, 32)


def model_with_adapter(
    config: LoRAConfig = QV, build: Callable[[], nn.Module] = llama
) -> nn.Module:
    return randomise_lora(fastlora.replace_linear(build(), config))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A good adapter, to be spoilt."""
    fastlora.save_adapter(model_with_adapter(), tmp_path)
    return tmp_path


def raw(folder: Path) -> tuple[dict, bytes]:
    """Header and data of the weights file."""
    content = (folder / WEIGHTS).read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def write_raw(folder: Path, header: object, data: bytes, length: int | None = None) -> None:
    """A weights file of any header, padded to ``length`` as safetensors pads to 8."""
    text = json.dumps(header).encode()
    text = text.ljust(length or -(-len(text) // 8) * 8)
    (folder / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + data)


def edit_header(folder: Path, key: str, **changes: object) -> None:
    header, data = raw(folder)
    header[key] |= changes
    write_raw(folder, header, data)


def edit_config(folder: Path, **changes: object) -> None:
    values = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(values | changes))


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load((folder / WEIGHTS).read_bytes())
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def truncate(folder: Path, size: int) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:size])


def write_pickle(folder: Path, save: Callable[[object, Path], object]) -> None:
    save(load((folder / WEIGHTS).read_bytes()), folder / WEIGHTS)


def only_pickle(folder: Path) -> None:
    torch.save(load((folder / WEIGHTS).read_bytes()), folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()


def giant(folder: Path) -> None:
    edit_header(folder, FIRST, shape=[1 << 40, 1 << 20])


def other_model(folder: Path, **sizes: int) -> None:
    fastlora.save_adapter(model_with_adapter(build=lambda: llama(**sizes)), folder)


# {what: (how to spoil the adapter, what the error says)}
BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (lambda f: truncate(f, 0), "truncated"),
    "cut in its length": (lambda f: truncate(f, 5), "truncated"),
    "cut in its header": (lambda f: truncate(f, 300), "truncated"),
    "cut in its data": (lambda f: truncate(f, (f / WEIGHTS).stat().st_size - 1), "safetensors"),
    "data behind its end": (
        lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes() + b"12345678"),
        "safetensors",
    ),
    "header longer than the file": (
        lambda f: (f / WEIGHTS).write_bytes(b"\xff" * 8 + (f / WEIGHTS).read_bytes()[8:]),
        "truncated",
    ),
    "header is no JSON": (
        lambda f: (f / WEIGHTS).write_bytes((8).to_bytes(8, "little") + b"{......."),
        "JSON header",
    ),
    "header nested too deep": (
        lambda f: (f / WEIGHTS).write_bytes((10**5).to_bytes(8, "little") + b"[" * 10**5),
        "JSON header",
    ),
    "header is a list": (lambda f: write_raw(f, [], b""), "header"),
    "no tensors": (lambda f: write_raw(f, {}, b""), "missing"),
    "entry is no object": (lambda f: write_raw(f, {FIRST: 3}, b""), "no valid shape"),
    "giant shape": (giant, r"q_proj.lora_A.weight: expected shape \(4, 32\)"),
    "negative shape": (lambda f: edit_header(f, FIRST, shape=[-4, -32]), "no valid shape"),
    "integer tensor": (
        lambda f: edit_tensors(f, lambda t: t.update({FIRST: t[FIRST].to(torch.int32)})),
        "expected dtype F16/BF16/F32/F64, got 'I32'",
    ),
    "offsets outside": (
        lambda f: edit_header(f, FIRST, data_offsets=[1 << 40, (1 << 40) + 512]),
        "safetensors",
    ),
    "offsets overlapping": (lambda f: edit_header(f, FIRST, data_offsets=[0, 4]), "safetensors"),
    "torch pickle": (lambda f: write_pickle(f, torch.save), "pickle, which is never read"),
    "plain pickle": (
        lambda f: write_pickle(f, lambda t, path: path.write_bytes(pickle.dumps(list(t)))),
        "pickle, which is never read",
    ),
    "pickle beside nothing": (only_pickle, r"adapter_model.bin is a pickle.*convert"),
    "rank in the config": (lambda f: edit_config(f, r=8), r"expected shape \(8, 32\), got \(4,"),
    "rank of one tensor": (
        lambda f: edit_tensors(f, lambda t: t.update({FIRST: t[FIRST][:3].clone()})),
        r"expected shape \(4, 32\), got \(3, 32\)",
    ),
    "rank pattern": (lambda f: edit_config(f, rank_pattern={"v_proj": 2}), "expected shape"),
    "missing tensor": (lambda f: edit_tensors(f, lambda t: t.pop(FIRST)), "missing .*lora_A"),
    "unexpected tensor": (
        lambda f: edit_tensors(f, lambda t: t.update({PREFIX + "extra": torch.ones(2)})),
        "unexpected extra",
    ),
    "tensor without PEFT's prefix": (
        lambda f: edit_tensors(f, lambda t: t.update({"extra": torch.ones(2)})),
        "unexpected tensor 'extra'",
    ),
    "lora_bias that is not there": (lambda f: edit_config(f, lora_bias=True), "missing"),
    "biases that are not there": (
        lambda f: edit_config(f, bias="all", target_modules=["query"]),
        "no linear layer matches|missing",
    ),
    "fewer targets than tensors": (lambda f: edit_config(f, target_modules=["q_proj"]), "unexp"),
    "wider model": (lambda f: other_model(f, hidden_size=64), "expected shape"),
    "deeper model": (lambda f: other_model(f, num_hidden_layers=3), r"unexpected model.layers.2"),
    "shallower model": (lambda f: other_model(f, num_hidden_layers=1), r"missing model.layers.1"),
    "other family": (
        lambda f: fastlora.save_adapter(
            model_with_adapter(LoRAConfig(target_modules=["query"]), bert), f
        ),
        "no linear layer matches|unexpected|not name|not served",
    ),
    "unsupported option": (lambda f: edit_config(f, use_dora=True), "not support use_dora=True"),
    "layer zero only": (
        lambda f: edit_config(f, layers_to_transform=0),  # equals False
        r"unexpected model\.layers\.1",
    ),
    "a head that is not there": (
        lambda f: edit_config(f, modules_to_save=["lm_head"]),
        r"missing lm_head\.weight|the model trains nothing whole|trains modules whole",
    ),
    "bad value": (lambda f: edit_config(f, lora_alpha=10**400), "lora_alpha"),
    "not finite": (lambda f: edit_config(f, lora_alpha=float("inf")), "lora_alpha"),
    "another method": (lambda f: edit_config(f, peft_type="IA3"), "expected LORA"),
    "config is no JSON": (lambda f: (f / CONFIG).write_text("{"), "expected JSON"),
    "config is no text": (lambda f: (f / CONFIG).write_bytes(b"\xff\xfe{}"), "expected JSON"),
    "config nested too deep": (lambda f: (f / CONFIG).write_text("[" * 10**5), "expected JSON"),
    "config is a list": (lambda f: (f / CONFIG).write_text("[]"), "JSON object"),
    "config too large": (lambda f: (f / CONFIG).write_text(" " * (1 << 21)), "at most"),
}


@pytest.mark.parametrize("into", ["fresh", "adapted", "served"])
@pytest.mark.parametrize("what", BAD)
def test_bad_adapter_is_refused_and_changes_nothing(folder, what, into):
    spoil, says = BAD[what]
    spoil(folder)
    if into == "served":
        model: nn.Module = MultiLoRAModel(llama(), max_adapters=2, max_rank=8)
        load_it: Callable[[], object] = functools.partial(model.load_adapter, folder, "new")
        says += "|not served|biases of its own"
    else:
        model = model_with_adapter() if into == "adapted" else llama()
        load_it = functools.partial(fastlora.load_adapter, model, folder)
        says += "|the layer has|the layer and" if into == "adapted" else ""
    with untouched(model), pytest.raises(ValueError, match=says):
        load_it()
    if isinstance(model, MultiLoRAModel):
        assert model.adapters == ()


@pytest.mark.parametrize("directory", [None, 3])
def test_load_adapter_refuses_what_is_no_path(directory):
    says = f"directory: expected the path of a folder, got {directory}"
    with pytest.raises(TypeError, match=says):
        fastlora.load_adapter(llama(), directory)
    with pytest.raises(TypeError, match=says):
        MultiLoRAModel(llama(), max_adapters=2, max_rank=8).load_adapter(directory, "new")


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_load_adapter_names_a_missing_file(folder, name):
    (folder / name).unlink()
    model = llama()
    with untouched(model), pytest.raises(FileNotFoundError, match=name):
        fastlora.load_adapter(model, folder)
    with untouched(model), pytest.raises(FileNotFoundError, match=f"{CONFIG} .*a local folder"):
        fastlora.load_adapter(model, "some-hub/adapter")  # and nobody asked the network


@pytest.mark.parametrize(
    "limit, value, says",
    [
        ("_MAX_TENSORS", 7, "at most 7 tensors"),
        ("_MAX_HEADER_BYTES", 100, "header of at most 100 bytes"),
        ("_MAX_BYTES", 1000, "at most 1000 bytes"),
        ("_MAX_CONFIG_BYTES", 10, "at most 10 bytes"),
    ],
)
def test_load_adapter_checks_limits_before_reading(folder, monkeypatch, limit, value, says):
    monkeypatch.setattr(adapter_files, limit, value)
    monkeypatch.setattr(adapter_files, "safe_open", None)
    model = llama()
    with untouched(model), pytest.raises(ValueError, match=says):
        fastlora.load_adapter(model, folder)


@pytest.mark.parametrize("what", ["giant shape", "integer tensor", "missing tensor", "wider model"])
def test_load_adapter_checks_header_before_reading_tensors(folder, monkeypatch, what):
    BAD[what][0](folder)
    monkeypatch.setattr(adapter_files, "safe_open", None)
    with pytest.raises(ValueError, match=BAD[what][1]):
        fastlora.load_adapter(llama(), folder)


@pytest.mark.parametrize("length", [1152, 2176, 0x4B50], ids=hex)
def test_header_length_resembling_a_pickle_loads(folder, length):
    """Its first byte is a pickle's 0x80, or its first two a zip's PK."""
    header, data = raw(folder)
    write_raw(folder, header, data, length)
    assert (folder / WEIGHTS).read_bytes()[:1] in (b"\x80", b"P")
    model = fastlora.load_adapter(llama(), folder)
    assert len(list(find_lora_layers(model))) == 4


NAMES = ["", ".", "..", "a/b", "/a", "a\\b", "a b", "ä", "a" * 129, "a\n", None]


@pytest.mark.parametrize("name", NAMES)
def test_server_refuses_bad_adapter_names(folder, name):
    server = MultiLoRAModel(llama(), max_adapters=2)
    with untouched(server), pytest.raises(ValueError, match="adapter_name: expected to match"):
        server.load_adapter(folder, name)
    assert adapter_files.check_name("a" * 128) == "a" * 128


@pytest.mark.parametrize("call", [fastlora.save_adapter, fastlora.load_adapter])
def test_arguments_in_wrong_order_are_refused(call, tmp_path):
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got "):
        call(tmp_path, llama())
