"""Calls that ``fastlora tune`` times: each kernel on one product's operands, each op of a layer."""

from __future__ import annotations

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


class KernelCall(NamedTuple):
    """A kernel on one product's operands, without its config."""

    launch: Callable[..., None]  # takes config=
    # By the names of ``compute_answers``; filled anew from the second tensor, with NaN without one.
    results: Mapping[str, tuple[Tensor, Tensor | None]]
    base: Callable[[], object]
    key: Shape  # as ``choice.config_of`` asks for it
    decides: tuple[int, ...]  # the dimensions that its time depends on


def make_kernel_calls(subject: Subject, device: torch.device) -> dict[str, KernelCall]:
    """Makes a call of each kernel that can run the product x (M, K) by weight.T (K, N)."""
    from fastlora.commands import kernels
    from fastlora.commands.kernels import choice, launch, ledger

    M, K, N, R = key = subject.case[:4]
    t, unfused = subject.tensors, subject.unfused
    x, w, a, b = t["x"], t["weight"].T, t["lora_A"], t["lora_B"].T
    y, out, h_out = t["y"].clone(), torch.empty_like(a), torch.empty_like(unfused["h"])
    h, g, scaled = unfused["h"], t["dy"] @ t["lora_B"], torch.empty_like(unfused["h"])
    # As ``Product.first`` has it: float16 takes h unscaled.
    first = x.dtype == torch.float16
    shrink, programs = kernels.shrink.shrink, launch.programs_of(device)
    gemm = partial(
        kernels.gemm.gemm, x, w, y, h if first else SCALING * h, b, SCALING,
        programs=programs, first=first,
    )  # fmt: skip
    product, fresh = partial(torch.matmul, x, w), {"y": (y, None)}
    calls = {
        "shrink": KernelCall(
            partial(shrink, x, a, h_out, scaled=scaled, factor=SCALING),
            {"h": (h_out, None), "scaled h": (scaled, None)}, partial(torch.matmul, x, a.T),
            key, (M, K, R),
        ),
        "gemm": KernelCall(partial(gemm, tma=False), fresh, product, key, key),
        "expand": KernelCall(
            partial(kernels.expand.expand, y, h, b, SCALING, add=True),
            {"y added to": (y, t["y"])}, partial(torch.matmul, h, b), key, (M, N, R),
        ),
        "gradient": KernelCall(
            partial(kernels.gradient.gradient, x, g, out, SCALING),
            {"dlora_A": (out, None)}, partial(torch.matmul, g.T, x), (M, M, K, R), (M, K, R),
        ),
    }  # fmt: skip
    arch = launch.arch_of(device)
    problem = ledger.Problem(*key, x.itemsize, lora_size=a.itemsize)
    if choice.possible("one_pass", problem, arch, first):
        one_pass = partial(kernels.one_pass.one_pass, x, w, a, b, y, h_out, SCALING)
        calls["one_pass"] = KernelCall(one_pass, {**fresh, "h": (h_out, None)}, product, key, key)
    if arch < 90:
        return _sort_by_kernel(calls)
    tma = kernels.gemm.fits_tma(x, w, y)
    if tma:
        calls["gemm_tma"] = KernelCall(partial(gemm, tma=True), fresh, product, key, key)
    if first:
        return _sort_by_kernel(calls)
    # Under the interpreter one after the other, which is what it computes alike.
    overlap = not launch.interpreted()

    def shrink_beside(*, config: object) -> None:
        shrink(x, a, h_out, config, scaled=scaled, factor=SCALING, overlap=overlap)
        best = choice.config_of("gemm_tma" if tma else "gemm", problem, x.dtype, device)
        kernels.gemm.gemm(
            x, w, y, scaled, b, SCALING, best,
            tma=tma, programs=programs, first=False, overlap=overlap,
        )  # fmt: skip

    results = {**fresh, "h": (h_out, None)}
    calls["shrink_beside"] = KernelCall(shrink_beside, results, product, key, key)
    return _sort_by_kernel(calls)


def _sort_by_kernel(calls: dict[str, KernelCall]) -> dict[str, KernelCall]:
    return {name: calls[name] for name in KERNELS if name in calls}


class OpCall(NamedTuple):
    """An op on one layer's operands, without its path."""

    call: Callable[..., object]  # takes path=
    base: Callable[[], object]
    key: Shape  # as ``choice.path_of`` asks for it
    weight: bool


def make_op_calls(subject: Subject) -> dict[str, OpCall]:
    """Makes a call of each op of a layer, backward as LoRA needs it."""
    from fastlora.commands.kernels import linear_ops

    M, K, N, R = key = subject.case[:4]
    t, h, dropped = subject.tensors, subject.unfused["h"], (SCALING, 0.0, None)
    A, B, x, weight, dy = t["lora_A"], t["lora_B"], t["x"], t["weight"], t["dy"]
    y, h_out = t["y"].clone(), torch.empty_like(h)
    needs = [True, False, False, True, True, False]
    forward = partial(linear_ops.lora_linear, x, weight, None, A, B, None, *dropped)
    add = partial(linear_ops.lora_add_, y, h_out, x, A, B, None, *dropped)
    backward = partial(linear_ops.lora_linear_backward, dy, x, weight, A, B, h, *dropped, needs)
    product = partial(torch.matmul, x, weight.T)
    return {
        "lora_linear": OpCall(forward, product, key, True),
        "lora_add_": OpCall(add, product, key, False),
        "lora_linear_backward": OpCall(
            backward, partial(torch.matmul, dy, weight), (M, N, K, R), True
        ),
    }
