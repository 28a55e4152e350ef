"""Several processes train as one process would."""

from __future__ import annotations

import importlib.util
import inspect
from pathlib import Path

import pytest
from torch import distributed

from tests.distributed import launch

# Of a file those that take a folder and nothing else are checks.
FILES = ["ddp", "fsdp", "tensor_parallel", "tensor_parallel_use"]
FILES += ["peft_models"] if importlib.util.find_spec("peft") else []
SECONDS = 150

if not distributed.is_available():
    pytest.skip("this torch was built without torch.distributed", allow_module_level=True)


def checks() -> list[str]:
    found = []
    for file in FILES:
        module = __import__(f"tests.distributed.{file}", fromlist=["_"])
        for name, check in inspect.getmembers(module, inspect.isfunction):
            own = check.__module__ == module.__name__ and not name.startswith("_")
            hints = [p.annotation for p in inspect.signature(check).parameters.values()]
            if own and hints == ["Path"]:
                found.append(f"{file}.{name}")
    return found


CHECKS = checks()


@pytest.fixture(scope="module")
def outcomes(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> dict[str, str]:
    mine = [item for item in request.session.items if item.path == Path(__file__)]
    chosen = [item.callspec.params["check"] for item in mine if hasattr(item, "callspec")]
    return launch.outcomes(chosen, tmp_path_factory.mktemp("processes"), SECONDS)


@pytest.mark.shared_start
@pytest.mark.parametrize("check", CHECKS)
def test_check_passes_in_two_processes(check: str, outcomes: dict[str, str]) -> None:
    assert not outcomes[check], outcomes[check]


@pytest.mark.full  # two processes show the same
def test_mesh_check_passes_in_four_processes(tmp_path: Path) -> None:
    check = "both.same_as_one_process"
    why_not = launch.outcomes([check], tmp_path, SECONDS, world=4)[check]
    assert not why_not, why_not


def test_launch_reports_failed_check_and_runs_others(tmp_path: Path) -> None:
    said = launch.outcomes(["launch.fails", "launch.passes"], tmp_path, SECONDS, world=1)
    assert "process 0: Traceback" in said["launch.fails"]
    assert "on purpose" in said["launch.fails"]
    assert not said["launch.passes"]
