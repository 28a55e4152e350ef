"""What ``fastlora tune`` times: each kernel on one product's operands, each op of a layer."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from fastlora.commands.check.linear import SCALING, Subject

# In the order of timing: what runs beside a product is timed with the product's own best config.
KERNELS = ("one_pass", "shrink", "gemm", "gemm_tma", "shrink_beside", "expand", "gradient")
# M, K, N, R
Shape = tuple[int, int, int, int]


class Job(NamedTuple):
    """A kernel on one product's operands."""

    launch: Callable[..., None]  # takes config=
    # By the names of ``answers``; filled anew from the second tensor, with NaN if there is none.
    results: Mapping[str, tuple[Tensor, Tensor | None]]
    base: Callable[[], object]
    key: Shape  # as ``choice.config_of`` asks for it
    decides: tuple[int, ...]  # the dimensions that its time depends on


def jobs(subject: Subject, device: torch.device) -> dict[str, Job]:
    """The kernels that can run the product x (M, K) by weight.T (K, N)."""
    kernel = {
        name: getattr(importlib.import_module(f"fastlora.kernels.linear.{name}"), name)
        for name in ("one_pass", "shrink", "gemm", "expand", "gradient")
    }
    launch = importlib.import_module("fastlora.kernels.tile.launch")
    fits_tma = importlib.import_module("fastlora.kernels.linear.gemm").fits_tma
    choice = importlib.import_module("fastlora.kernels.choose.choice")
    ledger = importlib.import_module("fastlora.kernels.choose.ledger")
    M, K, N, R = key = subject.case[:4]
    t, unfused = subject.tensors, subject.unfused
    x, w, a, b = t["x"], t["weight"].T, t["lora_A"], t["lora_B"].T
    y, out, h_out = t["y"].clone(), torch.empty_like(a), torch.empty_like(unfused["h"])
    h, g, scaled = unfused["h"], t["dy"] @ t["lora_B"], torch.empty_like(unfused["h"])
    # As ``Product.first`` has it: float16 takes h unscaled.
    first = x.dtype == torch.float16
    gemm = partial(
        kernel["gemm"], x, w, y, h if first else SCALING * h, b, SCALING,
        programs=launch.programs_of(device), first=first,
    )  # fmt: skip
    product, fresh = partial(torch.matmul, x, w), {"y": (y, None)}
    found = {
        "shrink": Job(
            partial(kernel["shrink"], x, a, h_out, scaled=scaled, factor=SCALING),
            {"h": (h_out, None), "scaled h": (scaled, None)}, partial(torch.matmul, x, a.T),
            key, (M, K, R),
        ),
        "gemm": Job(partial(gemm, tma=False), fresh, product, key, key),
        "expand": Job(
            partial(kernel["expand"], y, h, b, SCALING, add=True),
            {"y added to": (y, t["y"])}, partial(torch.matmul, h, b), key, (M, N, R),
        ),
        "gradient": Job(
            partial(kernel["gradient"], x, g, out, SCALING),
            {"dlora_A": (out, None)}, partial(torch.matmul, g.T, x), (M, M, K, R), (M, K, R),
        ),
    }  # fmt: skip
    arch = launch.arch_of(device)
    problem = ledger.Problem(*key, x.itemsize, lora_size=a.itemsize)
    if choice.possible("one_pass", problem, arch, first):
        one_pass = partial(kernel["one_pass"], x, w, a, b, y, h_out, SCALING)
        found["one_pass"] = Job(one_pass, {**fresh, "h": (h_out, None)}, product, key, key)
    if arch < 90:
        return _ordered(found)
    tma = fits_tma(x, w, y)
    if tma:
        found["gemm_tma"] = Job(partial(gemm, tma=True), fresh, product, key, key)
    if first:
        return _ordered(found)
    # Under the interpreter one after the other, which is what it computes alike.
    overlap = not launch.interpreted()

    def beside(*, config: object) -> None:
        kernel["shrink"](x, a, h_out, config, scaled=scaled, factor=SCALING, overlap=overlap)
        best = choice.config_of("gemm_tma" if tma else "gemm", problem, x.dtype, device)
        kernel["gemm"](
            x, w, y, scaled, b, SCALING, best,
            tma=tma, programs=launch.programs_of(device), first=False, overlap=overlap,
        )  # fmt: skip

    found["shrink_beside"] = Job(beside, {**fresh, "h": (h_out, None)}, product, key, key)
    return _ordered(found)


def _ordered(found: dict[str, Job]) -> dict[str, Job]:
    return {name: found[name] for name in KERNELS if name in found}


class Op(NamedTuple):
    """An op on one layer's operands."""

    call: Callable[..., object]  # takes path=
    base: Callable[[], object]
    key: Shape  # as ``choice.path_of`` asks for it
    weight: bool


def layer_ops(subject: Subject) -> dict[str, Op]:
    """The ops of a layer, backward as LoRA needs it."""
    lora = importlib.import_module("fastlora.backends.triton.linear")
    M, K, N, R = key = subject.case[:4]
    t, h, dropped = subject.tensors, subject.unfused["h"], (SCALING, 0.0, None)
    A, B, x, weight, dy = t["lora_A"], t["lora_B"], t["x"], t["weight"], t["dy"]
    y, own = t["y"].clone(), torch.empty_like(h)
    needs = [True, False, False, True, True, False]
    forward = partial(lora.lora_linear, x, weight, None, A, B, None, *dropped)
    add = partial(lora.lora_add_, y, own, x, A, B, None, *dropped)
    backward = partial(lora.lora_linear_backward, dy, x, weight, A, B, h, *dropped, needs)
    product = partial(torch.matmul, x, weight.T)
    return {
        "lora_linear": Op(forward, product, key, True),
        "lora_add_": Op(add, product, key, False),
        "lora_linear_backward": Op(backward, partial(torch.matmul, dy, weight), (M, N, K, R), True),
    }
