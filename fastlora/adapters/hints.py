"""Hints: what a folder holds that is no adapter as PEFT saves one, and what to do with it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from fastlora.config.listing import list_some

_POINTER = b"version https://git-lfs.github.com/spec/"
# What PEFT's modules are called: the adapter's name stands where its files have none.
_NAMED = re.compile(r".*\.lora_[AB]\.([^.]+)\.(?:weight|bias)")
# The other tensors of a layer whose alpha is one too, in the formats that keep it so.
_BESIDE_ALPHA = tuple(
    f".{name}.weight" for name in ("lora_down", "lora_up", "lora_A", "lora_B", "lora.down")
)


def check_content(path: Path) -> None:
    """Raises ValueError where a file is only Git's note of where its content lies."""
    with path.open("rb") as file:
        if file.read(len(_POINTER)) == _POINTER:
            raise ValueError(
                f"{path}: a Git LFS pointer, not the file itself: run git lfs pull in its "
                "repository, or download the file"
            )


def check_names(where: Path | str, tensors: Iterable[str]) -> None:
    """Raises ValueError where names of tensors tell that something else than PEFT wrote them."""
    names = set(tensors)
    for name in sorted(names):
        match = _NAMED.fullmatch(name)
        if match:
            raise ValueError(
                f"{where}: tensor {name!r} has an adapter's name in it, {match[1]!r}, as in a "
                "model's state_dict; PEFT's files have none. Save with "
                "model.save_pretrained(folder), or peft.get_peft_model_state_dict(model) in the "
                "state_dict's place"
            )
        stem = name.removesuffix(".alpha")
        if stem != name and any(stem + beside in names for beside in _BESIDE_ALPHA):
            raise ValueError(
                f"{where}: tensor {name!r} is a layer's alpha, which kohya-ss's format keeps "
                "beside the matrices; PEFT's files have none, but lora_alpha and alpha_pattern in "
                "adapter_config.json: convert the file to PEFT's format"
            )


def hint_elsewhere(folder: Path, name: str) -> str:
    """Says where file ``name`` is, if not in ``folder``: an end for an error, or empty."""
    if folder.is_file():
        return f"; {folder.name} is a file: give the folder that holds both"
    if not folder.is_dir():
        return ""
    inner = sorted(repr(str(path.parent)) for path in folder.glob(f"*/{name}"))
    if not inner:
        return ""
    return (
        f"; there is one in {list_some(inner)}: give that folder (PEFT saves an adapter that is "
        "not called 'default' in one of its name)"
    )
