"""Merging copies the other files of a model's folder, and says what it leaves out."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fastlora.commands import main as cli
from fastlora.merge_files import durable, merge_folder
from fastlora.merge_files.journal import JOURNAL
from tests.support.checkpoints import (
    CONFIG,
    SINGLE,
    Q,
    contents,
    merge,
    save_adapter,
    save_base,
    tensors,
)
from tests.support.models import quiet

pytestmark = quiet

# As on the hub: pooling and a dense layer of sentence-transformers, heads beside the weights, parts
# of an image model, exports of the model itself.
MODULES = {
    "modules.json": "[]",
    "1_Pooling/config.json": "{}",
    "2_Dense/config.json": "{}",
    "colbert_linear.pt": "a head",
    "original/params.json": "{}",
    "assets/deep/er/card.png": "an image",
}
WEIGHTS = [
    "2_Dense/model.safetensors",
    "2_Dense/pytorch_model.bin",
    "colbert_linear.pt",
    "vae/d.h5",
]
EXPORTS = ["onnx/model.onnx", "original/consolidated.00.pth", "twin/model.safetensors"]
LEFT = {
    "adapter_config.json": "an adapter",
    "consolidated.00.pth": "the base without",
    "flax_model.msgpack": "the base without",
    "half.partial": "begun and not finished",
    "model.fp16.safetensors": "the base without",
    "model.gguf": "the base without",
    "model.onnx": "the base without",
    "optimizer.pt": "a state of",
    "pytorch_model-00001-of-00002.bin": "the base without",
    "pytorch_model.bin.index.json": "the base without",
    "same.safetensors": "the base without",
    "tf_model.h5": "the base without",
}


@pytest.fixture
def base_and_adapter(tmp_path) -> Path:
    """A base in one file amid all of that, and an adapter of a few layers."""
    base = save_base(tmp_path / "base", size="1GB")
    same = {f"{Q}.weight": tensors(base)[f"{Q}.weight"]}
    for name in (*MODULES, *WEIGHTS, *EXPORTS, *LEFT):
        (base / name).parent.mkdir(parents=True, exist_ok=True)
        (base / name).write_text(MODULES.get(name, f"bytes of {name}"))
    save_file({"linear.weight": torch.randn(4, 4)}, base / "2_Dense" / SINGLE)
    for name in ("twin/model.safetensors", "same.safetensors"):
        save_file(same, base / name)
    (base / ".cache").mkdir()
    (base / ".cache" / "lock").write_text("")
    save_adapter(tmp_path / "adapter", target_modules=["q_proj"])
    return tmp_path


def test_merge_copies_all_other_files_unchanged(base_and_adapter):
    """To the byte, whatever it is; what would be loaded instead of the merged model does not."""
    before = contents(base_and_adapter / "base")
    with pytest.warns(UserWarning, match="of the base") as said:
        merge(base_and_adapter)
    after = contents(base_and_adapter / "out")
    assert contents(base_and_adapter / "base") == before
    assert after.keys() == before.keys() - LEFT.keys() - {".cache/lock"}
    assert [name for name in after if after[name] != before[name]] == [SINGLE]
    left, copied = sorted(str(warning.message) for warning in said)
    assert left.startswith(f"{len(LEFT)} files of the base were left out: ")
    assert all(f"{name}: {why}" in left for name, why in LEFT.items())
    assert copied.endswith(f"without the adapters: {', '.join(EXPORTS)}")


def test_merge_command_lists_copied_and_omitted_files(base_and_adapter, capsys, monkeypatch):
    monkeypatch.chdir(base_and_adapter)
    assert cli.main(["merge", "base", "adapter", "--out", "out", "--report", "said.json"]) == 0
    out = capsys.readouterr().out
    assert f"copied as they are: {', '.join(WEIGHTS)}" in out
    assert f"note: {len(LEFT)} files of the base were left out: adapter_config.json: an" in out
    values = json.loads((base_and_adapter / "said.json").read_text())
    assert values["files left out"].keys() == LEFT.keys()
    assert values["weights copied as they are"] == WEIGHTS + EXPORTS


def test_merge_copies_targets_of_links(base_and_adapter):
    """As Hugging Face's cache has them: files of blobs. Folders too; links to nothing are told."""
    base, blobs = base_and_adapter / "base", base_and_adapter / "blobs"
    blobs.mkdir()
    for name in (SINGLE, CONFIG, "2_Dense/model.safetensors"):
        (base / name).rename(blobs / name.replace("/", "_"))
        (base / name).symlink_to(
            os.path.relpath(blobs / name.replace("/", "_"), (base / name).parent)
        )
    (base_and_adapter / "elsewhere").mkdir()
    (base_and_adapter / "elsewhere" / "weights.bin").write_text("elsewhere")
    (base / "linked").symlink_to(base_and_adapter / "elsewhere")
    (base / "2_Dense" / "again").symlink_to(base_and_adapter / "elsewhere")
    (base / "gone").symlink_to(base_and_adapter / "nowhere")
    os.mkfifo(base / "pipe")
    with pytest.warns(UserWarning, match="gone: a link to nothing; .*pipe: no file"):
        merge(base_and_adapter)
    out = contents(base_and_adapter / "out")
    assert out["linked/weights.bin"] == out["2_Dense/again/weights.bin"] == b"elsewhere"
    assert out["2_Dense/model.safetensors"] == (blobs / "2_Dense_model.safetensors").read_bytes()
    assert not any(path.is_symlink() for path in (base_and_adapter / "out").rglob("*"))


@pytest.mark.parametrize(
    "link, to, says",
    [
        ("again", ".", "leads in a circle, to"),
        ("2_Dense/up", "..", "leads in a circle, to"),
        ("2_Dense/me", ".", "leads in a circle, to"),
        ("beside", "../results", "out: expected a folder outside of base, .*beside leads to"),
    ],
)
def test_merge_refuses_circular_links_and_links_to_output(base_and_adapter, link, to, says):
    (base_and_adapter / "results").mkdir()
    (base_and_adapter / "base" / link).symlink_to(to)
    with pytest.raises(ValueError, match=says):
        merge_folder(
            base_and_adapter / "base",
            base_and_adapter / "adapter",
            base_and_adapter / "results" / "out",
        )
    assert not (base_and_adapter / "results" / "out").exists()


def test_merge_stopped_anywhere_resumes_copying_other_files(base_and_adapter, monkeypatch):
    """By an error at every rename in turn; what was whole and is large is not written again."""
    monkeypatch.setattr(durable, "CHUNK", 64)
    for name in (*MODULES, *EXPORTS, *WEIGHTS[:-2], *LEFT):
        (base_and_adapter / "base" / name).unlink()
    (base_and_adapter / "base" / "vae" / "d.h5").write_bytes(os.urandom(1000))
    merge_folder(
        base_and_adapter / "base", base_and_adapter / "adapter", base_and_adapter / "whole"
    )
    replace, moments, kept = os.replace, 0, 0

    def stopping(after: int):
        def stop(*args: object) -> None:
            nonlocal after
            after -= 1
            if after < 0:
                raise KeyboardInterrupt
            replace(*args)  # pyright: ignore[reportArgumentType]

        return stop

    while True:
        out = base_and_adapter / f"out{moments}"
        with monkeypatch.context() as patched:
            patched.setattr(os, "replace", stopping(moments))
            try:
                merge_folder(base_and_adapter / "base", base_and_adapter / "adapter", out)
                break
            except KeyboardInterrupt:
                assert not (out / CONFIG).exists()
        kept += (
            "vae/d.h5"
            in merge_folder(base_and_adapter / "base", base_and_adapter / "adapter", out).kept
        )
        assert contents(out) == contents(base_and_adapter / "whole")
        moments += 1
    assert moments > 8
    assert 0 < kept < moments


def test_merge_notices_other_file_that_changes(base_and_adapter, monkeypatch):
    """While it is copied, or before the merge is resumed."""
    write, large = durable.write, base_and_adapter / "base" / "vae" / "d.h5"

    def change(path: Path, chunks: object) -> durable.Written:
        written = write(path, chunks)  # pyright: ignore[reportArgumentType]
        if path.name == "d.h5":
            os.utime(large, ns=(1, 1))
        return written

    with monkeypatch.context() as patched:
        patched.setattr(durable, "write", change)
        with pytest.raises(RuntimeError, match=r"d\.h5 was changed meanwhile"):
            merge(base_and_adapter)
    assert (base_and_adapter / "out" / JOURNAL).exists()
    assert not (base_and_adapter / "out" / CONFIG).exists()
    with pytest.raises(FileExistsError, match=r"another kind .*base"):
        merge(base_and_adapter)
