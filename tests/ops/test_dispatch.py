"""Which backend runs: the one asked for or the best usable, and the same one backward."""

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
from tests.support import forks
from tests.support.calls import functions, linear, operands

CHOICES = "cuda, triton, cpu, torch"


def test_backend_names_a_known_one_per_op(device):
    for op in (None, *OPS):
        assert fastlora.backend(op, device) in availability.BACKENDS
    assert fastlora.backend() == fastlora.backend("lora_linear", "cpu")


def test_torch_backend_runs_every_op(device):
    assert availability.unusable("torch") is None
    with fastlora.use_backend("torch"):
        assert {fastlora.backend(op, device) for op in OPS} == {"torch"}


@pytest.mark.parametrize("name", ["Torch", "", "gpu", None])
def test_unknown_backend_name_is_refused(name):
    message = rf"backend: expected one of {CHOICES}, got {name!r}"
    with pytest.raises(ValueError, match=message), fastlora.use_backend(name):
        pass
    with pytest.raises(ValueError, match=message):
        dispatch.implementation("lora_linear", name)


def test_unusable_backend_says_why_when_asked_for(monkeypatch):
    monkeypatch.setattr(availability, "no_cuda_library", lambda: "no such thing here")
    with (
        pytest.raises(RuntimeError, match="'cuda' cannot be used: no such thing here"),
        fastlora.use_backend("cuda"),
    ):
        pass


@pytest.fixture
def recorded_cpu_backend(monkeypatch):
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


def test_best_usable_backend_runs_unasked(recorded_cpu_backend):
    assert fastlora.backend() == "cpu"
    assert fastlora.backend("merge_", "cuda") == "torch"
    linear(*operands(linear))
    assert recorded_cpu_backend == ["lora_linear"]


def test_use_backend_nests_and_restores(recorded_cpu_backend):
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


def test_use_backend_affects_its_thread_only(recorded_cpu_backend):
    with fastlora.use_backend("torch"):
        others = run_in_thread(fastlora.backend)
        assert fastlora.backend() == "torch"
    assert others == os.environ.get("FASTLORA_BACKEND", "cpu")


def run_in_thread(f):
    found = []
    thread = threading.Thread(target=lambda: found.append(f()))
    thread.start()
    thread.join()
    return found[0]


@functions
def test_backward_runs_on_backend_of_forward(f, recorded_cpu_backend):
    """Also when another backend was chosen meanwhile, and in a thread that chose none."""
    args = [t.requires_grad_() for t in operands(f)]
    for name, ran in (("cpu", ["lora_linear_backward"]), ("torch", [])):
        for run in (lambda backward: backward(), run_in_thread):
            with fastlora.use_backend(name):
                y = f(*args)
            recorded_cpu_backend.clear()
            with fastlora.use_backend("cpu" if name == "torch" else "torch"):
                run(y.sum().backward)
            assert [op.removeprefix("multi_") for op in recorded_cpu_backend] == ran


def test_unmerge_runs_on_backend_of_merge(recorded_cpu_backend):
    _, weight, A, B = operands(linear)
    with fastlora.use_backend("cpu"):
        receipt = F.merge_(weight, [(A, B, 0.5)])
    with fastlora.use_backend("torch"):
        F.unmerge_(weight, receipt)
    assert recorded_cpu_backend == ["merge_", "unmerge_"]


def test_compiled_function_follows_change_of_backend(recorded_cpu_backend):
    """Another backend, another graph: the first trace's is not baked in for all."""
    torch.compiler.reset()
    args = operands(linear)
    compiled = torch.compile(linear, backend="aot_eager", fullgraph=True)
    for name, ran in (("torch", []), ("cpu", ["lora_linear"]), ("torch", ["lora_linear"])):
        with fastlora.use_backend(name):
            compiled(*args)
        assert recorded_cpu_backend == ran


PROBE = "import fastlora; print(fastlora.backend(), fastlora.backend('merge_', 'cuda'))"


@pytest.mark.parametrize("value, prints", [("torch", "torch torch"), ("", None), (None, None)])
def test_environment_variable_sets_backend_of_process(value, prints):
    environment = {**os.environ, "FASTLORA_BACKEND": value or ""}
    if value is None:
        del environment["FASTLORA_BACKEND"]
    result = run_probe(environment)
    # Unasked: no GPU kernel has been verified anywhere.
    unasked = "torch torch" if availability.unusable("cpu") else "cpu torch"
    assert result.stdout.strip() == (prints or unasked), result.stderr


def test_unknown_backend_in_environment_is_refused():
    result = run_probe({**os.environ, "FASTLORA_BACKEND": "nonsense"})
    assert result.returncode != 0
    assert f"ValueError: backend: expected one of {CHOICES}, got 'nonsense'" in result.stderr


def run_probe(environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return forks.run(PROBE, env=environment)
