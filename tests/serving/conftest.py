"""Fixtures of the serving tests."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import fastlora
from tests.serving.adapters import ADAPTERS, adapt
from tests.support.models import (
    llama,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every adapter, saved under its name."""
    path = tmp_path_factory.mktemp("adapters")
    torch.manual_seed(7)
    for name, options in ADAPTERS.items():
        fastlora.save_adapter(adapt(llama(), options), path / name)
    return path
