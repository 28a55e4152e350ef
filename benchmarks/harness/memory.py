"""What a call holds at most beyond what was there before it, by torch's own account.

Its outputs are part of that. On a CPU the profiler keeps the account, which sees torch's tensors
and not what a library takes from the system by itself: fastlora's native one for M x R factors, and
a strip of output a thread. ``benchmarks.tables.peak`` measures whole processes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch


def peak(call: Callable[[], object], device: str) -> int:
    """Bytes that a call holds at most beyond those that were held before."""
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
