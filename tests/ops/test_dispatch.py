"""Which backend runs: what was asked for, or the best there is, and the same one backward."""

import os
import subprocess
import sys
import threading
from types import ModuleType

import pytest
import torch

import fastlora
from fastlora import functional as F
from fastlora.backends import torch as reference
from fastlora.ops import availability, dispatch
from fastlora.ops.table import OPS
from tests.support.calls import functions, linear, operands

CHOICES = "cuda, triton, cpu, torch"


def test_the_backend_of_every_op_is_named(device):
    for op in (None, *OPS):
        assert fastlora.backend(op, device) in availability.BACKENDS
    assert fastlora.backend() == fastlora.backend("lora_linear", "cpu")


def test_torch_runs_everything(device):
    assert availability.unusable("torch") is None
    with fastlora.use_backend("torch"):
        assert {fastlora.backend(op, device) for op in OPS} == {"torch"}


@pytest.mark.parametrize("name", ["Torch", "", "gpu", None])
def test_unknown_names(name):
    message = rf"backend: expected one of {CHOICES}, got {name!r}"
    with pytest.raises(ValueError, match=message), fastlora.use_backend(name):
        pass
    with pytest.raises(ValueError, match=message):
        dispatch.implementation("lora_linear", name)


def test_an_unusable_backend_says_why(monkeypatch):
    monkeypatch.setattr(availability, "no_cuda_library", lambda: "no such thing here")
    with (
        pytest.raises(RuntimeError, match="'cuda' cannot be used: no such thing here"),
        fastlora.use_backend("cuda"),
    ):
        pass


@pytest.fixture
def twin(monkeypatch):
    """A second usable backend, "cpu": the reference, and a list of what it ran."""
    ran: list[str] = []

    def noting(op: str):
        def run(*args, **options):
            ran.append(op)
            return getattr(reference, op)(*args, **options)

        return run

    module = ModuleType("twin")
    module.merge_kernel = reference.merge_kernel
    for op in OPS:
        setattr(module, op, noting(op))
    monkeypatch.setattr(dispatch._asked, "name", None)
    monkeypatch.setattr(availability, "no_cuda_library", lambda: "absent")
    monkeypatch.setattr(availability, "_TRITON", False)
    monkeypatch.setattr(availability, "no_cpu_library", lambda: None)
    monkeypatch.setitem(dispatch._MODULES, "cpu", "twin")
    monkeypatch.setitem(sys.modules, "twin", module)
    monkeypatch.setattr(dispatch, "_loaded", {})
    return ran


def test_the_best_usable_backend_is_taken(twin):
    assert fastlora.backend() == "cpu"
    assert fastlora.backend("merge_", "cuda") == "torch"
    linear(*operands(linear))
    assert twin == ["lora_linear"]


def test_nested_use(twin):
    with fastlora.use_backend("torch"):
        with fastlora.use_backend("cpu"):
            assert fastlora.backend() == "cpu"
        assert fastlora.backend() == "torch"
        with pytest.raises(KeyError), fastlora.use_backend("cpu"):
            raise KeyError
        with pytest.raises(ValueError), fastlora.use_backend("nothing"):
            pass
        assert fastlora.backend() == "torch"
    assert fastlora.backend() == "cpu"


def test_use_is_of_one_thread(twin):
    with fastlora.use_backend("torch"):
        others = in_a_thread(fastlora.backend)
        assert fastlora.backend() == "torch"
    assert others == os.environ.get("FASTLORA_BACKEND", "cpu")


def in_a_thread(f):
    found = []
    thread = threading.Thread(target=lambda: found.append(f()))
    thread.start()
    thread.join()
    return found[0]


@functions
def test_backward_runs_where_forward_ran(f, twin):
    """Also when another backend was chosen meanwhile, and in a thread that chose none."""
    args = [t.requires_grad_() for t in operands(f)]
    for name, ran in (("cpu", ["lora_linear_backward"]), ("torch", [])):
        for run in (lambda backward: backward(), in_a_thread):
            with fastlora.use_backend(name):
                y = f(*args)
            twin.clear()
            with fastlora.use_backend("cpu" if name == "torch" else "torch"):
                run(y.sum().backward)
            assert [op.removeprefix("multi_") for op in twin] == ran


def test_unmerge_runs_where_merge_ran(twin):
    _, weight, A, B = operands(linear)
    with fastlora.use_backend("cpu"):
        receipt = F.merge_(weight, [(A, B, 0.5)])
    with fastlora.use_backend("torch"):
        F.unmerge_(weight, receipt)
    assert twin == ["merge_", "unmerge_"]


def test_a_compiled_graph_follows_the_choice(twin):
    """Another backend, another graph: the first trace's is not baked in for all."""
    torch.compiler.reset()
    args = operands(linear)
    compiled = torch.compile(linear, backend="aot_eager", fullgraph=True)
    for name, ran in (("torch", []), ("cpu", ["lora_linear"]), ("torch", ["lora_linear"])):
        with fastlora.use_backend(name):
            compiled(*args)
        assert twin == ran


PROBE = "import fastlora; print(fastlora.backend(), fastlora.backend('merge_', 'cuda'))"


@pytest.mark.parametrize("value, prints", [("torch", "torch torch"), ("", None), (None, None)])
def test_the_environment_of_a_process(value, prints):
    environment = {**os.environ, "FASTLORA_BACKEND": value or ""}
    if value is None:
        del environment["FASTLORA_BACKEND"]
    result = run_probe(environment)
    # Unasked: no GPU kernel has been verified anywhere.
    unasked = "torch torch" if availability.unusable("cpu") else "cpu torch"
    assert result.stdout.strip() == (prints or unasked), result.stderr


def test_an_unknown_backend_in_the_environment():
    result = run_probe({**os.environ, "FASTLORA_BACKEND": "nonsense"})
    assert result.returncode != 0
    assert f"ValueError: backend: expected one of {CHOICES}, got 'nonsense'" in result.stderr


def run_probe(environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PROBE], env=environment, capture_output=True, text=True
    )
