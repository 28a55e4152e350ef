"""The device's bandwidth and flops at best, measured in the same run as the figures.

Bandwidth is the better of a copy's (bytes read and written) and a sum's (bytes read), of buffers
that no cache holds; flops are those of the library's product of square matrices, by dtype. Medians
of five, after one that warms up: a figure above its ceiling is noise, or a cache.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterable

import torch

from benchmarks.harness.case import DTYPES, Ceilings
from benchmarks.harness.timer import make_clock

_ROUNDS = 5
# Past every cache; products large enough that cases do not go past them, as they did by a tenth and
# more with 1536 on two cores.
_BYTES = {"cpu": 256 * 2**20, "cuda": 2**30}
_SIZE = {"cpu": 3072, "cuda": 8192}


def measure(device: str, dtypes: Iterable[str]) -> Ceilings:
    """Measures the ceilings for these dtypes; without fp16 instructions one takes seconds."""
    return Ceilings(
        _measure_bandwidth(device), {dtype: _measure_flops(device, dtype) for dtype in dtypes}
    )


def _measure_bandwidth(device: str) -> float:
    source, target = (torch.ones(_BYTES[device] // 4, device=device) for _ in range(2))
    copied = 2 * source.nbytes / _time(lambda: target.copy_(source), device)
    summed = source.nbytes / _time(lambda: source.sum(), device)
    return max(copied, summed)


def _measure_flops(device: str, dtype: str) -> float:
    size = _SIZE[device]
    a, b = (torch.randn(size, size, device=device, dtype=DTYPES[dtype]) for _ in range(2))
    return 2 * size**3 / _time(lambda: a @ b, device)


def _time(call: Callable[[], object], device: str) -> float:
    clock, samples = make_clock(device), []
    clock.warm_up("", call)
    for _ in range(_ROUNDS):
        clock.sample("", *[call] * clock.TURN)
        samples.append(clock.read()[""][0] / 1e3)
    return statistics.median(samples)


def main() -> None:
    """Prints the ceilings as JSON, for the process that runs the cases."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("device", choices=("cpu", "cuda"))
    parser.add_argument("dtypes", nargs="+", choices=tuple(DTYPES))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(json.dumps(measure(options.device, options.dtypes)._asdict()))


if __name__ == "__main__":
    main()
