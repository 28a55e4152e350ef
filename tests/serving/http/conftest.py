"""Fixtures: one server for all tests of a worker that change nothing of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

for package in ("transformers", "fastapi", "uvicorn", "prometheus_client"):
    pytest.importorskip(package)


@pytest.fixture(scope="session")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.support.serving.http_server import save_adapters

    folder = tmp_path_factory.mktemp("adapters")
    save_adapters(folder)
    (folder / "broken").mkdir()
    (folder / "broken" / "adapter_config.json").write_text("{}")
    (folder / "linked").symlink_to(folder / "alice")
    (folder / "notes").mkdir()
    return folder


@pytest.fixture(scope="session")
def running(adapters: Path) -> Iterator[Any]:
    from tests.support.serving.http_server import running

    with running(adapters) as server:
        yield server
