"""``python -m benchmarks.tables.model_merge``: an 8B model's linears merged, for good and not.

On a GPU by default, with 32 decoder layers as Llama 3 8B has them, in bfloat16; with --layers and
--device cpu anywhere. Prints a Markdown table: milliseconds by the device's clock and as a share of
copying's bandwidth, after the result was found right.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from fastlora import functional as F
from fastlora.functional.fidelity import measure
from fastlora.functional.receipt import Adapter

# (N, K) of q, k, v, o, gate, up and down.
LINEARS = (
    (4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096),
    (14336, 4096), (14336, 4096), (4096, 14336),
)  # fmt: skip
R, SCALING, SHARE = 16, 2.0, 0.05
ROUNDS = 7


def draw_model(layers: int, device: str, divide: int) -> tuple[list[Tensor], list[list[Adapter]]]:
    """Draws weights (N, K) and an adapter each, |d| / |W| = SHARE."""
    torch.manual_seed(0)
    kind = {"device": device, "dtype": torch.bfloat16}
    weights, adapters = [], []
    for N, K in [(N // divide, K // divide) for N, K in LINEARS] * layers:
        weights.append(torch.randn(N, K, **kind).mul_(K**-0.5))
        A = torch.randn(R, K, **kind).mul_(K**-0.5)
        B = torch.randn(N, R, **kind).mul_(SHARE / SCALING * R**-0.5)
        adapters.append([(A, B, SCALING)])
    return weights, adapters


def time_call(call: Callable[[], object], device: str) -> float:
    """Returns the milliseconds of one call."""
    if device == "cpu":
        began = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - began)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--divide", type=int, default=1, help="every size by this much")
    options = parser.parse_args(arguments)
    weights, adapters = draw_model(options.layers, options.device, options.divide)
    moved = 2 * sum(w.nbytes for w in weights)

    def check(before: Tensor) -> None:
        fidelity = measure(before, weights[-1], adapters[-1])
        if not 0.98 < fidelity.gain < 1.02:
            raise RuntimeError(f"the merge is wrong: {fidelity}")

    def addmm() -> None:
        for weight, ((A, B, scaling),) in zip(weights, adapters, strict=True):
            weight.addmm_(B, A, alpha=scaling)

    def copy_weights() -> None:
        for weight in weights:
            weight.mul_(1)

    held: list = []
    ways: dict[str, Callable[[], object]] = {
        "read and written, nothing more": copy_weights,
        "W.addmm_, one after another": addmm,
        "fastlora, for good": lambda: F.foreach_merge_(weights, adapters, receipt=False),
        "fastlora, with receipts": lambda: held.append(F.foreach_merge_(weights, adapters)),
        "fastlora, swapped": lambda: held.append(
            F.foreach_swap_(weights, held.pop(), [[(-A, B, s)] for ((A, B, s),) in adapters])
        ),
        "fastlora, unmerged": lambda: F.foreach_unmerge_(weights, held.pop()),
    }
    before = weights[-1].clone()
    F.foreach_merge_(weights, adapters, receipt=False)
    check(before)
    samples: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(ROUNDS + 1):
        for name, call in ways.items():
            samples[name].append(time_call(call, options.device))
    size = moved / 2**31
    print(
        f"| {len(weights)} linears, {size:.2f} GiB in bfloat16, R = {R} | ms | bandwidth | share |"
    )
    print("|---|---|---|---|")
    # The first round compiled and warmed up.
    medians = {name: statistics.median(each[1:]) for name, each in samples.items()}
    for name, ms in medians.items():
        share = medians["read and written, nothing more"] / ms
        print(f"| {name} | {ms:.2f} | {moved / ms / 1e9:.3f} TB/s | {share:.0%} |")


if __name__ == "__main__":
    main()
