"""Peak memory of a call beyond what was held before it, as torch counts it.

The call's outputs are included. On a CPU torch's profiler counts, which sees tensors and not what a
library allocates itself: fastlora's native one allocates M x R factors and a strip of output a
thread. ``benchmarks.tables.peak`` measures whole processes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch


def measure_peak(call: Callable[[], object], device: str) -> int:
    """Returns the most bytes that a call holds beyond those held before."""
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, profile_memory=True, acc_events=True) as profile:
        call()
    results = profile.profiler
    assert results is not None
    assert results.kineto_results is not None
    events = [e for e in results.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most
