"""``torch.compile``, where there is what it needs."""

from __future__ import annotations

import os
import shutil
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from benchmarks.work import Absent


def compiled(module: nn.Module, device: str) -> Any:
    """The module compiled by its first call; ``Absent`` where that would find no compiler."""
    if device == "cuda" and find_spec("triton") is None:
        raise Absent("torch.compile needs triton on a GPU")
    if not any(shutil.which(name) for name in (os.environ.get("CXX", ""), "g++", "clang++")):
        raise Absent("torch.compile needs a C++ compiler: none in CXX, no g++, no clang++")
    return torch.compile(module)
