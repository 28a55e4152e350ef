"""What every op must compute, one token at a time in float64, written from the formulas.

Independent of ``fastlora``: it imports torch alone, shares no code with
``fastlora.backends.torch`` and is never fast. Inputs of any floating dtype are widened
exactly; results are float64. Shape letters: T tokens, K in_features, N out_features, R rank, S
slots.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def _wide(t: Tensor) -> Tensor:
    return t.detach().to("cpu", torch.float64)


def lora_linear(
    x: Tensor,
    weight: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    *,
    bias: Tensor | None = None,
    lora_bias: Tensor | None = None,
    keep: Tensor | None = None,
    keep_scale: float = 1.0,
) -> Tensor:
    """x (T, K) to (T, N); ``keep`` (T, K) is the dropout mask, ``weight=None`` gives the delta."""
    out = []
    for t in range(x.shape[0]):
        token = _wide(x[t])
        seen = token if keep is None else token * _wide(keep[t]) * keep_scale
        row = _wide(lora_B) @ (_wide(lora_A) @ seen) * scaling
        if weight is not None:
            row = row + _wide(weight) @ token
        if bias is not None:
            row = row + _wide(bias)
        if lora_bias is not None:
            row = row + scaling * _wide(lora_bias)
        out.append(row)
    return torch.stack(out) if out else torch.zeros(0, lora_B.shape[0], dtype=torch.float64)


def lora_linear_grads(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    *,
    keep: Tensor | None = None,
    keep_scale: float = 1.0,
) -> dict[str, Tensor]:
    """Gradients of ``(lora_linear(x, …) * dy).sum()``, summed token by token."""
    A, B = _wide(lora_A), _wide(lora_B)
    (R, K), N = A.shape, B.shape[0]
    zeros = {"weight": (N, K), "bias": (N,), "lora_A": (R, K), "lora_B": (N, R), "lora_bias": (N,)}
    grads = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in zeros.items()}
    dx = torch.zeros(x.shape[0], K, dtype=torch.float64)
    for t in range(x.shape[0]):
        token, up = _wide(x[t]), _wide(dy[t])
        mask = torch.ones(K, dtype=torch.float64) if keep is None else _wide(keep[t]) * keep_scale
        seen = token * mask
        dx[t] = scaling * mask * (A.T @ (B.T @ up))
        if weight is not None:
            dx[t] += _wide(weight).T @ up
        grads["weight"] += torch.outer(up, token)
        grads["bias"] += up
        grads["lora_A"] += scaling * torch.outer(B.T @ up, seen)
        grads["lora_B"] += scaling * torch.outer(up, A @ seen)
        grads["lora_bias"] += scaling * up
    return {"x": dx, **grads}


def multi_lora_linear(
    x: Tensor,
    weight: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    adapter_ids: Tensor,
    scalings: Tensor,
    *,
    bias: Tensor | None = None,
    ranks: Tensor | None = None,
    row_scales: Tensor | None = None,
) -> Tensor:
    """Rows of x (T, K) to (T, N), each through its own adapter; id -1 adds nothing."""
    N = lora_B.shape[1]
    out = torch.zeros(x.shape[0], N, dtype=torch.float64)
    for t in range(x.shape[0]):
        token, slot = _wide(x[t]), int(adapter_ids[t])
        if weight is not None:
            out[t] += _wide(weight) @ token
        if bias is not None:
            out[t] += _wide(bias)
        if slot < 0:
            continue
        r = lora_A.shape[1] if ranks is None else int(ranks[slot])
        factor = float(scalings[slot]) * (1.0 if row_scales is None else float(row_scales[t]))
        out[t] += factor * (_wide(lora_B[slot, :, :r]) @ (_wide(lora_A[slot, :r]) @ token))
    return out


def multi_lora_grads(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    adapter_ids: Tensor,
    scalings: Tensor,
    *,
    ranks: Tensor | None = None,
    row_scales: Tensor | None = None,
) -> dict[str, Tensor]:
    """Gradients of ``(multi_lora_linear(x, …) * dy).sum()`` for x, lora_A, lora_B."""
    dx = torch.zeros(x.shape[0], x.shape[1], dtype=torch.float64)
    dA = torch.zeros(lora_A.shape, dtype=torch.float64)
    dB = torch.zeros(lora_B.shape, dtype=torch.float64)
    for t in range(x.shape[0]):
        token, up, slot = _wide(x[t]), _wide(dy[t]), int(adapter_ids[t])
        if weight is not None:
            dx[t] += _wide(weight).T @ up
        if slot < 0:
            continue
        r = lora_A.shape[1] if ranks is None else int(ranks[slot])
        A, B = _wide(lora_A[slot, :r]), _wide(lora_B[slot, :, :r])
        factor = float(scalings[slot]) * (1.0 if row_scales is None else float(row_scales[t]))
        dx[t] += factor * (A.T @ (B.T @ up))
        dA[slot, :r] += factor * torch.outer(B.T @ up, token)
        dB[slot, :, :r] += factor * torch.outer(up, A @ token)
    return {"x": dx, "lora_A": dA, "lora_B": dB}


def merge(weight: Tensor, adapters: Sequence[tuple[Tensor, Tensor, float]]) -> Tensor:
    """``weight + sum(scaling * lora_B @ lora_A)``, row by row."""
    rows = []
    for n in range(weight.shape[0]):
        row = _wide(weight[n])
        for lora_A, lora_B, scaling in adapters:
            row = row + scaling * (_wide(lora_B[n]) @ _wide(lora_A))
        rows.append(row)
    return torch.stack(rows) if rows else torch.zeros(weight.shape, dtype=torch.float64)


def swap(
    weight: Tensor,
    old: Sequence[tuple[Tensor, Tensor, float]],
    new: Sequence[tuple[Tensor, Tensor, float]],
) -> Tensor:
    """``weight - sum of old's deltas + sum of new's``, row by row; old's are merged in weight.

    What a swap gives, but for the rounding that merging ``old`` left in weight and a swap undoes.
    """
    rows = []
    for n in range(weight.shape[0]):
        row = _wide(weight[n])
        for sign, adapters in ((-1.0, old), (1.0, new)):
            for lora_A, lora_B, scaling in adapters:
                row = row + sign * scaling * (_wide(lora_B[n]) @ _wide(lora_A))
        rows.append(row)
    return torch.stack(rows) if rows else torch.zeros(weight.shape, dtype=torch.float64)


def relative_error(got: Tensor, want: Tensor) -> float:
    """``‖got - want‖ / ‖want‖`` in float64 (the plain norm of ``got`` where ``want`` is zero)."""
    error, size = torch.linalg.norm(_wide(got) - _wide(want)), torch.linalg.norm(_wide(want))
    return float(error / size) if size > 0 else float(error)
