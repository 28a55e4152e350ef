"""When the backend "triton" runs: asked for, unasked, refused, missing."""

import logging
import os

import pytest
import torch

import fastlora
from fastlora import functional as F
from fastlora.ops import availability, dispatch
from tests.support import forks
from tests.support.calls import IDS, SCALINGS, linear, multi_add, operands
from tests.support.helpers import same_bits, signed

pytest.importorskip("triton", reason="triton is not installed")

from fastlora.kernels.choose import choice, records

REAL_CANNOT = availability.cannot


@pytest.fixture
def rows_of_a_gpu(tmp_path, monkeypatch):
    """Stamps verified rows for arch 90 into a cache of the test's own."""
    monkeypatch.setenv("FASTLORA_CACHE", str(tmp_path))
    monkeypatch.setattr(records, "SHIPPED", tmp_path / "none")

    def stamp(*rows: tuple[str, str, str]) -> None:
        keys = ("op", "dtype", "path")
        given = [dict(zip(keys, row, strict=True)) for row in rows]
        for row in given:
            row |= {"arch": 90, **choice.versions()}
        records.write(records.VERIFIED, given, keys=(*keys, "arch"))
        choice.forget()

    yield stamp
    monkeypatch.undo()
    choice.forget()


def test_compiling_reads_verified_rows_once(rows_of_a_gpu, monkeypatch):
    """The reading of files is not traced: its answer is a constant of the graph."""
    torch.compiler.reset()
    rows_of_a_gpu(("lora_linear", "fp32", "one_pass"), ("lora_linear_backward", "fp32", "one_pass"))
    monkeypatch.setattr("fastlora.kernels.tile.launch.arch_of", lambda device: 90)

    @torch.compile(fullgraph=True, backend="eager")
    def chosen(x):
        return x + len(dispatch.verified_paths("lora_linear", x.device, x.dtype))

    assert torch.equal(chosen(torch.zeros(2)), torch.ones(2))


# What a forced backend refuses, nothing having been computed.
@pytest.mark.parametrize(
    "change, message",
    [
        ({"dtype": torch.float64}, "float16, bfloat16 and float32, got torch.float64"),
        ({"R": 513}, "ranks up to 512, got 513"),
    ],
)
def test_forced_triton_raises_for_unsupported_product(change, message, device, on_triton):
    kind = {"dtype": change.get("dtype", torch.float32), "device": device}
    rank = change.get("R", 3)
    x, weight = signed(4, 8, **kind), signed(6, 8, **kind)
    A, B = signed(rank, 8, **kind), signed(6, rank, **kind)
    with pytest.raises(RuntimeError, match=f"'triton' was asked for but cannot run.*{message}"):
        F.lora_linear(x, weight, A, B, 1.0)
    y = signed(4, 6, **kind)
    before = y.clone()
    with pytest.raises(RuntimeError, match=message):
        F.lora_add_(y, x, A, B, 1.0)
    assert same_bits(y, before)
    with fastlora.use_backend("torch"):
        assert F.lora_linear(x, weight, A, B, 1.0).shape == (4, 6)


def test_ops_missing_in_triton_run_elsewhere_logged_once(device, on_triton, caplog, monkeypatch):
    monkeypatch.setattr(dispatch, "_logged", set())
    args = [t.to(device) for t in operands(multi_add)]
    with caplog.at_level(logging.WARNING, "fastlora"):
        for _ in range(2):
            F.multi_lora_linear(*args, IDS.to(device), SCALINGS.to(device))
    said = [r.message for r in caplog.records]
    assert len(said) == len(set(said))
    assert any("has no group_rows" in message for message in said)


def test_mixed_devices_are_refused_before_choosing_backend(on_triton):
    x, weight, A, B = operands(linear)
    with pytest.raises(ValueError, match="lora_A: expected the device cpu, got meta"):
        F.lora_linear(x, weight, A.to("meta"), B, 1.0)


WITHOUT = """
import torch, fastlora
from fastlora import functional as F
print(fastlora.backend("lora_linear", "cpu"))
try:
    with fastlora.use_backend("triton"):
        pass
except RuntimeError as error:
    print(error)
x, A = torch.ones(2, 3), torch.ones(1, 3)
try:
    F.lora_linear(x, torch.ones(4, 3), A, torch.ones(4, 1), 1.0)
except RuntimeError as error:
    print(error)
"""


def test_triton_needs_a_gpu_or_an_interpreter():
    """Unasked, plain torch runs; forced, an error says what is missing."""
    plain = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    hidden = {**plain, "CUDA_VISIBLE_DEVICES": ""}
    outputs = [
        forks.run(WITHOUT, env=env) for env in (hidden, {**hidden, "FASTLORA_BACKEND": "triton"})
    ]
    reason = availability.no_gpu() or "no CUDA GPU was found"
    missing = f"{reason}, and TRITON_INTERPRET=1 was not set at the start"
    lines = outputs[0].stdout.splitlines()
    unasked = "torch" if availability.unusable("cpu") else "cpu"
    assert lines == [unasked, f"backend 'triton' cannot be used: {missing}"]
    assert f"'triton' was asked for but cannot run lora_linear: {missing}" in outputs[1].stderr


class Gpu:
    """A stand-in for a CUDA device: the choice looks at its type alone."""

    type, index = "cuda", 0


def test_triton_runs_unasked_only_where_verified(rows_of_a_gpu, monkeypatch, caplog):
    monkeypatch.setattr(dispatch._asked, "name", None)
    monkeypatch.setattr(dispatch, "_logged", set())
    monkeypatch.setattr("fastlora.kernels.tile.launch.arch_of", lambda device: 90)
    real, cpu, half = REAL_CANNOT, torch.device("cpu"), (torch.bfloat16, torch.bfloat16)
    monkeypatch.setattr(
        availability,
        "cannot",
        lambda backend, device, *a: real(backend, cpu if backend == "triton" else device, *a),
    )
    monkeypatch.setattr(availability, "_INTERPRETED", True)
    gpu = Gpu()
    if not torch.cuda.is_available():
        assert dispatch.choose("lora_linear", gpu, *half, 513) == "torch", "nothing is looked up"
    monkeypatch.setattr(availability, "no_gpu", lambda: None)
    assert dispatch.choose("lora_linear", gpu, *half, 8) == "torch"
    rows_of_a_gpu(("lora_linear", "bf16", "two_pass"))
    assert dispatch.choose("lora_linear", gpu, *half, 8) == "torch", "its backward was not verified"
    rows_of_a_gpu(("lora_linear_backward", "bf16", "two_pass"))
    assert dispatch.choose("lora_linear", gpu, *half, 8) == "triton"
    assert dispatch.choose("lora_linear", gpu, torch.float16, torch.float16, 8) == "torch"
    assert dispatch.choose("lora_linear", gpu, torch.bfloat16, torch.float32, 8) == "torch"
    assert dispatch.choose("lora_add_", gpu, *half, 8) == "torch"
    assert dispatch.choose("merge_", gpu) == "torch"
    assert dispatch.choose("lora_linear", cpu, *half, 8) in ("cpu", "torch")
    with caplog.at_level(logging.WARNING, "fastlora"):
        for _ in range(2):
            assert dispatch.choose("lora_linear", gpu, *half, 513) == "torch"
    assert [r.message for r in caplog.records] == [
        "lora_linear runs unfused: Triton kernels take ranks up to 512, got 513"
    ]
