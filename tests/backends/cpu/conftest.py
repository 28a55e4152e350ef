"""Fixtures of the CPU kernels' tests."""

from collections.abc import Iterator

import pytest

import fastlora
from fastlora.backends import native
from tests.support.tile_calls import TILE_SETS


@pytest.fixture(params=TILE_SETS)
def tile_set(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set with tiles that runs here, forced."""
    before = native.instruction_set()
    native.use(request.param)
    with fastlora.use_backend("cpu"):
        yield request.param
    native.use(before)


@pytest.fixture
def hardware() -> Iterator[str]:
    """Skips where tiles are emulated alone; the test says which set is used."""
    missing = native.functions().fastlora_cpu_missing(b"amx_bf16")
    if missing != b"":
        pytest.skip((missing or b"this build has no amx_bf16").decode())
    before = native.instruction_set()
    yield "amx_bf16"
    native.use(before)
