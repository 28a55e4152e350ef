"""The backend "triton" in use: trained, compiled, checkpointed, captured."""

import json
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
from fastlora import functional as F
from fastlora.modules.linear import FastLoRALinear
from tests.support.calls import MULTI, SINGLE, add, linear, operands
from tests.support.helpers import assert_near, same_bits, signed

pytest.importorskip("triton", reason="triton is not installed")

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def on_cuda() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU here")
    return torch.device("cuda")


@pytest.mark.parametrize(
    "f, p", [(f, p) for f in SINGLE + MULTI for p in (0.0, 0.4)[: 2 - (f in MULTI)]]
)
def test_triton_equals_torch_with_same_seed(f, p, device, on_triton):
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
def test_compiled_triton_function_equals_eager(f, device, on_triton):
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


@pytest.mark.parametrize("f", [linear, add])
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_keeps_the_triton_mask(f, reentrant, device, on_triton):
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


@pytest.mark.full  # gradients of one step are quick
def test_triton_training_has_losses_of_torch(device, on_triton):
    """A small model's losses, step by step; the environment's variable decides."""
    losses = {name: train_in_process(name, device) for name in ("torch", "triton")}
    assert losses["torch"][-1] < 0.5 * losses["torch"][0]
    torch.testing.assert_close(*map(torch.tensor, losses.values()), rtol=1e-4, atol=1e-5)


def train_in_process(backend: str, device: torch.device) -> list[float]:
    code = (
        "import fastlora, tests.backends.triton.test_training as t\n"
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


@pytest.mark.cuda
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("rows", [1, 48, 700])
def test_cuda_graph_follows_adapters_changed_in_place(p, rows, on_cuda):
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
