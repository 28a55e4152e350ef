"""Batches for the functions of many adapters, and two ways to call them."""

import math

import torch
from torch import Tensor
from torch.nn import functional as nnf

from fastlora import functional as F
from tests.support.helpers import (
    multi_lora_linear,
    signed,
)

# Adapter ids as batches really have them.
WORKLOADS = {
    "distinct": lambda T, S: torch.arange(T) % S,
    "identical": lambda T, S: torch.full((T,), S - 1),
    "blocks": lambda T, S: torch.arange(T) * (S + 1) // T - 1,
    "skewed": lambda T, S: torch.where(torch.rand(T) < 0.8, 0, torch.arange(T) % (S + 1) - 1),
    "none": lambda T, S: torch.full((T,), -1),
}


def batch(lead, ids, N, K, R, S, dtype, lora_dtype, device) -> tuple[dict, dict]:
    """(tensors, routing): every adapter's delta about as large as the base product."""
    base, lora = {"dtype": dtype, "device": device}, {"dtype": lora_dtype, "device": device}
    tensors = {
        "x": signed(*lead, K, **base),
        "weight": signed(N, K, **base),
        "bias": signed(N, **base),
        "lora_A": signed(S, R, K, **lora),
        "lora_B": signed(S, N, R, **lora, size=1 / math.sqrt(max(R, 1))),
    }
    rows = lead[: ids if isinstance(ids, int) else ids.dim()]
    routing = {
        "adapter_ids": torch.randint(-1, S, rows) if isinstance(ids, int) else ids,
        "scalings": signed(S, dtype=torch.float32, device=device),
        "ranks": torch.randint(0, R + 1, (S,)),
        "row_scales": signed(*rows, dtype=torch.float32, device=device),
    }
    return tensors, {name: t.to(device) for name, t in routing.items()}


def call_linear(f, t: dict, routing: dict) -> Tensor:
    args = (t["x"], t["weight"], t["lora_A"], t["lora_B"])
    return f(*args, bias=t["bias"], **routing)


def call_add(f, t: dict, routing: dict) -> Tensor:
    if f is multi_lora_linear:
        return call_linear(f, t, routing)
    y = nnf.linear(t["x"], t["weight"], t["bias"])
    return F.multi_lora_add_(y, t["x"], t["lora_A"], t["lora_B"], **routing)
