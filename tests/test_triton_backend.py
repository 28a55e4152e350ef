"""The backend "triton" as a user meets it: chosen, refused, compiled, checkpointed, captured."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as nnf
from torch.utils.checkpoint import checkpoint

import fastlora
from fastlora import dispatch
from fastlora import functional as F
from fastlora.modules import FastLoRALinear
from tests.calls import (
    IDS,
    MULTI,
    RANKS,
    SCALINGS,
    SINGLE,
    K,
    M,
    N,
    R,
    S,
    add,
    linear,
    merge_calls,
    multi_add,
    multi_linear,
    operands,
    rand,
)
from tests.helpers import assert_near, same_bits, signed

pytest.importorskip("triton", reason="triton is not installed")

from fastlora.kernels import choice, records

ops = torch.ops.fastlora
ROOT = Path(__file__).resolve().parent.parent
singles = pytest.mark.parametrize("f", SINGLE)


@pytest.fixture
def on_triton(device: torch.device):
    reason = dispatch.cannot("triton", device)
    if reason is not None:
        pytest.skip(reason)
    with fastlora.use_backend("triton"):
        yield


@pytest.fixture
def on_cuda() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU here")
    return torch.device("cuda")


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


def raw_calls(device):
    x, weight, A, B = (t.to(device) for t in operands(linear))
    y, h, dy, bias = (rand(M, n).to(device) for n in (N, R, N, 1))
    bias, seed = rand(N).to(device), torch.tensor(7, device=device)
    plain, dropped = (0.5, 0.0, None), (0.5, 0.25, seed)
    return {
        "lora_linear": [
            (x, weight, None, A, B, None, *plain),
            (x, weight, bias, A, B, bias, *dropped),
        ],
        "lora_add_": [(y, h, x, A, B, None, *plain), (y, h, x, A, B, bias, *dropped)],
        "lora_linear_backward": [
            (dy, x, weight, A.T.contiguous().T, B.T.contiguous().T, h, *plain, [True] * 6),
            (dy, x, weight, A, B, h, *plain, [True] * 6),
            (dy, x, None, A, B, h, *dropped, [True, False, False] * 2),
        ],
        **multi_calls(device),
    }


def multi_calls(device):
    x, weight, As, Bs = (t.to(device) for t in operands(multi_linear))
    y, h, dy = (rand(M, n).to(device) for n in (N, R, N))
    groups = F.group_rows(IDS.to(device), S)
    own = (SCALINGS.to(device), RANKS.to(device), rand(M).to(device))
    some, every = (*groups.tensors, own[0], None, None), (*groups.tensors, *own)
    # Pages of two ranks, for each of two slices.
    table = torch.tensor([[2, 0], [1, -1]], dtype=torch.int32, device=device)
    pages = (rand(3, 4, K).to(device), rand(3, N, 2).to(device), table, [1, N])
    return {
        "multi_lora_linear": [
            (x, weight, None, As, Bs, *some),
            (x, weight, rand(N).to(device), As, Bs, *every),
        ],
        "multi_lora_add_": [(y, h, x, As, Bs, *some), (y, h, x, As, Bs, *every)],
        "multi_lora_linear_backward": [
            (dy, x, weight, As, Bs, h, *some, [True] * 5),
            (dy, x, None, As, Bs, h, *every, [True, False, False, True, False]),
        ],
        "packed_lora_linear": [
            (x, weight, None, As, Bs, None, [N], *some),
            (x, weight, None, *pages, *every),
        ],
        "packed_lora_add_": [(y, x, As, Bs, None, [N], *some), (y, x, *pages, *every)],
    }


@pytest.mark.parametrize("op", dispatch.OPS["triton"])
def test_opcheck(op, device, on_triton):
    for args in (raw_calls(device) | merge_calls(device, "triton"))[op]:
        torch.library.opcheck(getattr(ops, op), (*args, "triton"))


def test_the_list_of_its_ops_is_true(on_triton):
    from fastlora.kernels import backend

    calls = {*raw_calls("cpu"), *merge_calls("cpu", "triton")}
    assert calls == set(dispatch.OPS["triton"])
    for op in dispatch.OPS["triton"]:
        assert dispatch.implementation(op, "triton") is getattr(backend, op)


def test_in_place_writes_bump_versions(device, on_triton):
    y, h, *rest = raw_calls(device)["lora_add_"][0]
    before = (y._version, h._version)
    ops.lora_add_(y, h, *rest, "triton")
    assert y._version > before[0]
    assert h._version > before[1]
    with torch.inference_mode():
        ops.lora_add_(y.clone(), h.clone(), *rest, "triton")


@pytest.mark.parametrize(
    "f, p", [(f, p) for f in SINGLE + MULTI for p in (0.0, 0.4)[: 2 - (f in MULTI)]]
)
def test_as_the_backend_torch(f, p, device, on_triton):
    """Same mask from the same seed, same values and gradients, under autograd and torch.func."""
    options = {"dropout_p": p, "training": True} if p and f is not SINGLE[2] else {}
    results = []
    for name in ("torch", "triton"):
        args = [t.to(device).clone().requires_grad_() for t in seeded_operands(f)]
        with fastlora.use_backend(name):
            torch.manual_seed(5)
            y = f(*args, **options)
            y.sin().sum().backward()
            grad = torch.func.grad(lambda A, a=args: f(*a[:2], A, a[3]).sum())(args[2].detach())
        results.append([y, grad, *(t.grad for t in args)])
    for ours, theirs in zip(*results, strict=True):
        assert_near(ours, theirs)


def seeded_operands(f):
    torch.manual_seed(11)
    return operands(f)


@pytest.mark.parametrize("f", SINGLE + MULTI)
def test_compile(f, device, on_triton):
    """Fullgraph, forward and backward, at several batch sizes; what eager gives."""
    torch.compiler.reset()
    compiled = torch.compile(f, fullgraph=True)
    for rows in (4, 6, 9):
        results = []
        args = operands(f, rows=rows)
        for run in (compiled, f):
            leaves = [t.to(device).clone().requires_grad_() for t in args]
            y = run(*leaves)
            y.sin().sum().backward()
            results.append([y, *(t.grad for t in leaves)])
        for ours, eager in zip(*results, strict=True):
            assert_near(ours, eager)


def test_compiling_asks_for_verified_rows_once(rows_of_a_gpu, monkeypatch):
    """The reading of files is not traced: its answer is a constant of the graph."""
    torch.compiler.reset()
    rows_of_a_gpu(("lora_linear", "fp32", "one_pass"), ("lora_linear_backward", "fp32", "one_pass"))
    monkeypatch.setattr("fastlora.kernels.launch.arch_of", lambda device: 90)

    @torch.compile(fullgraph=True, backend="eager")
    def chosen(x):
        return x + len(dispatch.verified_paths("lora_linear", x.device, x.dtype))

    assert torch.equal(chosen(torch.zeros(2)), torch.ones(2))


@pytest.mark.parametrize("f", [linear, add])
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_keeps_the_mask(f, reentrant, device, on_triton):
    """Forward runs again in backward, from the generator's saved state: the same seed, so mask."""
    options = {"dropout_p": 0.5, "training": True}
    results = []
    for through in (lambda *a: f(*a, **options), None):
        args = [t.to(device).clone().requires_grad_() for t in seeded_operands(f)]
        torch.manual_seed(3)
        if through is None:
            y = checkpoint(lambda *a: f(*a, **options), *args, use_reentrant=reentrant)
        else:
            y = through(*args)
        y.square().sum().backward()
        results.append([y, *(t.grad for t in args)])
    for ours, want in zip(*results, strict=True):
        assert same_bits(ours, want)


def test_training_follows_the_backend_torch(device, on_triton):
    """A small model's losses, step by step; the environment's variable decides."""
    losses = {name: trained_elsewhere(name, device) for name in ("torch", "triton")}
    assert losses["torch"][-1] < 0.5 * losses["torch"][0]
    torch.testing.assert_close(*map(torch.tensor, losses.values()), rtol=1e-4, atol=1e-5)


def trained_elsewhere(backend: str, device: torch.device) -> list[float]:
    code = (
        "import fastlora, tests.test_triton_backend as t\n"
        f"assert fastlora.backend('lora_linear', {str(device)!r}) == {backend!r}\n"
        f"print(t.train({str(device)!r}))"
    )
    env = {**os.environ, "FASTLORA_BACKEND": backend, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def train(device: str) -> list[float]:
    """Dropout, both biases and two layers of other shapes; nothing but the adapters is trained."""
    torch.manual_seed(0)
    model = nn.Sequential(
        FastLoRALinear(24, 40, r=4, lora_alpha=8, lora_dropout=0.1, lora_bias=True),
        nn.GELU(),
        FastLoRALinear(40, 10, r=4, lora_alpha=8, use_rslora=True, bias=False),
    ).to(device)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora" in name)
    x = signed(32, 24, dtype=torch.float32, device=torch.device(device))
    target = (torch.arange(32) % 10).to(device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    losses = []
    for _ in range(25):
        loss = nnf.cross_entropy(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


# What a forced backend refuses, nothing having been computed.
@pytest.mark.parametrize(
    "change, message",
    [
        ({"dtype": torch.float64}, "float16, bfloat16 and float32, got torch.float64"),
        ({"R": 513}, "ranks up to 512, got 513"),
    ],
)
def test_what_it_cannot_run_is_an_error_where_forced(change, message, device, on_triton):
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


def test_ops_that_it_lacks_run_elsewhere_and_say_so_once(device, on_triton, caplog, monkeypatch):
    monkeypatch.setattr(dispatch, "_said", set())
    args = [t.to(device) for t in operands(multi_add)]
    with caplog.at_level(logging.WARNING, "fastlora"):
        for _ in range(2):
            F.multi_lora_linear(*args, IDS.to(device), SCALINGS.to(device))
    said = [r.message for r in caplog.records]
    assert len(said) == len(set(said))
    assert any("has no group_rows" in message for message in said)


def test_mixed_devices_are_refused_before_a_backend_is_asked(on_triton):
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


def test_without_a_gpu_and_an_interpreter():
    """Unasked, plain torch runs; forced, an error says what is missing."""
    plain = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    hidden = {**plain, "CUDA_VISIBLE_DEVICES": ""}
    outputs = [
        subprocess.run([sys.executable, "-c", WITHOUT], env=env, capture_output=True, text=True)
        for env in (hidden, {**hidden, "FASTLORA_BACKEND": "triton"})
    ]
    reason = dispatch.no_gpu() or "no CUDA GPU was found"
    missing = f"{reason}, and TRITON_INTERPRET=1 was not set at the start"
    lines = outputs[0].stdout.splitlines()
    unasked = "torch" if dispatch.unusable("cpu") else "cpu"
    assert lines == [unasked, f"backend 'triton' cannot be used: {missing}"]
    assert f"'triton' was asked for but cannot run lora_linear: {missing}" in outputs[1].stderr


class Gpu:
    """A stand-in for a CUDA device: the choice looks at its type alone."""

    type, index = "cuda", 0


def test_unasked_it_runs_where_it_was_verified(rows_of_a_gpu, monkeypatch, caplog):
    monkeypatch.setattr(dispatch._asked, "name", None)
    monkeypatch.setattr(dispatch, "_said", set())
    monkeypatch.setattr("fastlora.kernels.launch.arch_of", lambda device: 90)
    real, cpu, half = REAL_CANNOT, torch.device("cpu"), (torch.bfloat16, torch.bfloat16)
    monkeypatch.setattr(
        dispatch,
        "cannot",
        lambda backend, device, *a: real(backend, cpu if backend == "triton" else device, *a),
    )
    monkeypatch.setattr(dispatch, "_INTERPRETED", True)
    gpu = Gpu()
    if not torch.cuda.is_available():
        assert dispatch.choose("lora_linear", gpu, *half, 513) == "torch", "nothing is looked up"
    monkeypatch.setattr(dispatch, "no_gpu", lambda: None)
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


REAL_CANNOT = dispatch.cannot


@pytest.mark.cuda
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("rows", [1, 48, 700])
def test_cuda_graphs_follow_adapters_changed_in_place(p, rows, on_cuda):
    """Captured once, replayed after lora_A, lora_B and x were written: and a new mask each time."""
    kind = {"dtype": torch.bfloat16, "device": on_cuda}
    x, weight = signed(rows, 256, **kind), signed(384, 256, **kind)
    A, B = (signed(*shape, dtype=torch.float32, device=on_cuda) for shape in ((16, 256), (384, 16)))
    leaves = [t.requires_grad_() for t in (x, A, B)]

    def step():
        y = F.lora_linear(x, weight, A, B, 0.5, dropout_p=p, training=True)
        return [y, *torch.autograd.grad(y, leaves, torch.ones_like(y))]

    with fastlora.use_backend("triton"):
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = step()
        for _ in range(2):
            with torch.no_grad():
                for t in leaves:
                    t.normal_()
            graph.replay()
            if not p:
                for ours, want in zip(out, step(), strict=True):
                    assert same_bits(ours, want)
        first = out[0].clone()
        graph.replay()
        assert same_bits(first, out[0]) == (p == 0.0)
