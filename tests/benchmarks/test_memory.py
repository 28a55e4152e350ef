"""measure_peak counts the most bytes that a call holds."""

import torch

from benchmarks.harness import memory


def test_measure_peak_counts_most_bytes_held():
    def call():
        kept = [torch.empty(1000, 1000) for _ in range(3)]
        del kept[1:]
        kept.append(torch.empty(500, 1000))

    assert 12e6 <= memory.measure_peak(call, "cpu") < 12.1e6
