"""Fixtures of every test: fresh data, the devices that there are, the backends that run there."""

import gc
import importlib.util
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests import thinning, times
from tests.support import cuda_host

# Without a GPU, Triton kernels are interpreted and CUDA kernels run on the host; read once, when
# they are imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    os.environ.setdefault("FASTLORA_CUDA_LIBRARY", str(cuda_host.built() or ""))

# What cuBLAS needs to be deterministic, which some tests ask torch for; read once too.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import fastlora
from fastlora.backends import native
from fastlora.ops import availability

# Of `make test-vllm`, which has an environment of its own and does not read this file.
collect_ignore = ["integrations/vllm_engine"]

SETS = [] if native.unusable() else native.available().split(", ")

# Before any kernel runs; a triton that is not there needs nothing.
if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
    from tests.support import interpreter

    interpreter.quicken()

# What tests compute is small: on a busy machine a second thread costs five times what it brings.
torch.set_num_threads(1)


def pytest_configure(config: pytest.Config) -> None:
    times.start(config)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> Iterator[None]:
    yield
    times.tell(terminalreporter)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Before -k and -m choose among them: what is quick never depends on what is asked for."""
    thinning.thin(items)
    # xdist gives each worker a stretch, of which others take the end: the first stays with one.
    items.sort(key=lambda item: not item.get_closest_marker("shared_start"))


def pytest_collection_finish() -> None:
    """What has been imported stays: no collection of garbage looks at it again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seed(request: pytest.FixtureRequest) -> None:
    """Every test draws data of its own, the same in every run."""
    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()))


# thinning skips it where there is no GPU.
@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


def _asking_for(*backends: str) -> list:
    """As parameters; each skips the combinations that it cannot run."""

    def where(backend: str) -> Callable[..., str | None]:
        return lambda device, dtype=None: availability.cannot(backend, device, dtype)

    return [pytest.param(name, marks=thinning.skip_where(where(name))) for name in backends]


@pytest.fixture(params=_asking_for("torch", "cpu", "triton"))
def backend(request: pytest.FixtureRequest, device: torch.device) -> Iterator[str]:
    """Every backend that has the linear ops, of one adapter and of many, asked for by name."""
    with fastlora.use_backend(request.param):
        yield request.param


@pytest.fixture(params=_asking_for("torch", "cpu"))
def whole_backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every backend that has all ops, asked for by name."""
    with fastlora.use_backend(request.param):
        yield request.param


@pytest.fixture(params=_asking_for("torch", "cpu", "triton", "cuda"))
def merge_backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every backend that merges, asked for by name; the tests with few tiles take Triton's too."""
    with fastlora.use_backend(request.param):
        yield request.param


# tests/support/checkpoints.py needs PEFT: imported by the fixtures, or no test would run without
# it.
@pytest.fixture
def base_and_adapter(tmp_path: Path) -> Path:
    """A folder with a base of a dozen files and an adapter for all its linears."""
    from tests.support.checkpoints import save_adapter, save_base

    save_base(tmp_path / "base")
    save_adapter(tmp_path / "adapter")
    return tmp_path


@pytest.fixture(scope="module")
def merge_folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base of a dozen files, adapters, and what merging the first one without a stop gives."""
    from fastlora.merge_files import merge_folder
    from tests.support.checkpoints import llama, save_adapter, save_base

    folder = tmp_path_factory.mktemp("given")
    save_base(folder / "base", llama(dtype=torch.bfloat16), "5KB")
    save_adapter(folder / "adapter")
    save_adapter(folder / "lr=0.1", target_modules=["q_proj"])
    merge_folder(folder / "base", folder / "adapter", folder / "whole")
    return folder


@pytest.fixture
def on_cuda_kernels(device: torch.device) -> Iterator[None]:
    """Asks for the CUDA kernels; skips where they run neither on the device nor on the host."""
    reason = availability.cannot("cuda", device)
    if reason is not None:
        pytest.skip(reason)
    with fastlora.use_backend("cuda"):
        yield


@pytest.fixture
def triton_usable(device: torch.device) -> None:
    """Skips where Triton kernels neither run on the device nor are interpreted."""
    reason = availability.cannot("triton", device)
    if reason is not None:
        pytest.skip(reason)


@pytest.fixture
def on_triton(triton_usable: None) -> Iterator[None]:
    """The backend "triton", asked for by name."""
    with fastlora.use_backend("triton"):
        yield


@pytest.fixture
def memory_holds_nan() -> Iterator[None]:
    """Every tensor that torch allocates empty holds NaN: what is not written shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=SETS)
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set of the native library that runs here, forced."""
    before = native.instruction_set()
    native.use(request.param)
    assert native.instruction_set() == request.param
    with fastlora.use_backend("cpu"):
        yield request.param
    native.use(before)
