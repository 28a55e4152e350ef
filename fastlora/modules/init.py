"""What adapters start from: ``init_lora_weights``.

Some of it moves a part of the base's weight W (N, K) into the adapter: ``scaling * B @ A`` with A
(r, K), B (N, r) is that part, the residual ``W - scaling * B @ A`` takes W's place, and the layer
computes what it did. References: PiSSA: Meng et al. 2024 (the largest singular values); OLoRA:
Büyükakyüz 2024 (the first columns and rows of a QR decomposition).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fastlora.backends.dtypes import UP_TO_FLOAT32
from fastlora.backends.merge_lists import errors
from fastlora.backends.merge_lists.undo import Undo
from fastlora.config import parse_iterations
from fastlora.functional.checks.merge import own_elements
from fastlora.modules.merging import Mergeable

# As in PEFT, which takes the decompositions in float32.


@torch.no_grad()
def init_lora(lora_A: Tensor, lora_B: Tensor, how: bool | str) -> None:
    """Draws lora_A (r, K), lora_B (N, r) in place as ``init_lora_weights=how`` says."""
    if how == "orthogonal":
        _orthogonal(lora_A, lora_B)
        return
    if how == "gaussian":
        nn.init.normal_(lora_A, std=1 / lora_A.shape[0])
    else:
        nn.init.kaiming_uniform_(lora_A, a=math.sqrt(5))
    if how is False:
        nn.init.kaiming_uniform_(lora_B, a=math.sqrt(5))
    else:
        nn.init.zeros_(lora_B)


@torch.no_grad()
def split_bases(layers: Mapping[str, Mergeable], how: str, undo: Undo) -> None:
    """Moves a part of every layer's weight into its adapter; ``undo`` gives the weights back.

    Everything is computed before anything is written: meanwhile the weights exist twice. Raises
    TypeError or ValueError, naming the layer, where a weight cannot be split.
    """
    parts = {}
    for name, layer in layers.items():
        with errors.named([name]):
            parts[name] = _split(layer, how)
    for name, layer in layers.items():
        lora_A, lora_B, residual = parts.pop(name)
        # Detached: it may be given back where gradients are recorded.
        matrix = layer.matrix.detach()
        undo.push(matrix.copy_, matrix.clone())
        layer.lora_A.copy_(lora_A)
        layer.lora_B.copy_(lora_B)
        matrix.copy_(residual)


def _split(layer: Mergeable, how: str) -> tuple[Tensor, Tensor, Tensor]:
    if how == "olora" and layer.fan_in_fan_out:
        raise ValueError(
            "init_lora_weights: 'olora' is not for Conv1D, whose weight PEFT decomposes "
            "untransposed: its adapter would fit no file"
        )
    return decomposed(layer.matrix, layer.lora_A.shape[0], layer.scaling, how)


def decomposed(weight: Tensor, r: int, scaling: float, how: str) -> tuple[Tensor, Tensor, Tensor]:
    """lora_A (r, K), lora_B (N, r) in float32, and the residual in the weight's dtype.

    weight (N, K), which is not changed: float16, bfloat16 or float32, r at most min(N, K). Products
    and their order are PEFT's, so that both leave the same residual.
    """
    _check(weight, r, how)
    wide = weight.detach().to(torch.float32)
    if how == "olora":
        Q, R = torch.linalg.qr(wide)
        A, B = R[:r], Q[:, :r]
    else:
        A, B = _principal(wide, r, scaling, parse_iterations(how))
    residual = (wide - scaling * B @ A).to(weight.dtype)
    if not all(bool(t.isfinite().all()) for t in (A, B, residual)):
        raise ValueError(
            f"init_lora_weights: {how!r} at a scaling of {scaling:g} would give values that are "
            "not finite"
        )
    return A, B, residual


def _principal(wide: Tensor, r: int, scaling: float, niter: int | None) -> tuple[Tensor, Tensor]:
    if niter is None:
        U, S, Vh = torch.linalg.svd(wide, full_matrices=False)
    else:
        U, S, V = torch.svd_lowrank(wide, r, niter=niter)
        Vh = V.T
    root = torch.sqrt(S[:r] / scaling)
    return root[:, None] * Vh[:r], U[:, :r] * root


def _check(weight: Tensor, r: int, how: str) -> None:
    N, K = own_elements(weight)
    if weight.dtype not in UP_TO_FLOAT32:
        raise TypeError(
            f"init_lora_weights: {how!r} takes a weight of float16, bfloat16 or float32, got "
            f"{weight.dtype}"
        )
    if r > min(N, K):
        raise ValueError(
            f"init_lora_weights: {how!r} takes r of at most {min(N, K)} out of a weight of shape "
            f"{(N, K)}, got {r}"
        )
    if weight.is_meta:
        raise ValueError(f"init_lora_weights: {how!r} takes a weight that has values, got meta")
    if not bool(weight.isfinite().all()):
        raise ValueError(f"init_lora_weights: {how!r} takes a weight of finite numbers")


def _orthogonal(lora_A: Tensor, lora_B: Tensor) -> None:
    """Of the rows of a random rotation every other one for A, the others for B: B @ A is zero."""
    (r, K), N = lora_A.shape, lora_B.shape[0]
    if r % 2:
        raise ValueError(f"init_lora_weights: 'orthogonal' takes an even r, got {r}")
    if lora_A.is_meta:
        return
    # On the CPU and in this order, as PEFT draws them.
    rotation = torch.linalg.qr(torch.randn(r, r, device="cpu"))[0]
    lora_A.copy_((torch.randn(K, r // 2, device="cpu") @ rotation[0::2]).T / 10)
    lora_B.copy_(torch.randn(r // 2, N, device="cpu").T @ rotation[1::2] / 10)
