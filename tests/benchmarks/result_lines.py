"""Made-up lines of results, as ``benchmarks/harness/measurement.py`` writes them."""

import json
import re
from pathlib import Path

CASE = "linear-forward-bf16-M1-K64-N64-R4"


def line(provider, low=1.0, middle=1.0, high=1.0, *, case=CASE, suite="linear", **fields):
    """A provider that was timed; its ratio's median and interval."""
    ratio = {"p20": low, "p50": middle, "p80": high}
    return {
        **_identity(provider, case, suite),
        "status": "ok",
        "reason": None,
        "gate": {"y": {"error": 0.001, "bound": 0.004}},
        "flops": 8192,
        "bytes": 8448,
        "device_name": "Some CPU",
        "threads": 2,
        "versions": {"fastlora": "0.1.0", "torch": "2.13.0", "peft": None},
        "commit": "a" * 40,
        "seed": 0,
        "backend": "cpu",
        "method": "as one does",
        "ceilings": {"bandwidth": 3.2e10, "flops": {"bf16": 3.7e11}},
        "clock": "wall",
        "rounds": 20,
        "calls": 1,
        "ms": {q: 2.5 * r for q, r in ratio.items()},
        "cpu_ms": {"p20": 1.0, "p50": 1.0, "p80": 1.0},
        "ratio": {**ratio, "low": low, "high": high},
        "tflops": 0.01 / middle,
        "gbps": 12.5 / middle,
        "share": 0.5 / middle,
        "limit": 1.01,
        "peak_bytes": 1_500_000,
        "clocks": {"load": 0.5, "mhz": 2600.0},
        "quick": False,
        **fields,
    }


def not_timed(provider, status, reason, case=CASE):
    """One that did not pass or was not there, or, with None, a case's process that died."""
    return {**_identity(provider, case, "linear"), "status": status, "reason": reason}


def write_lines(folder: Path, *lines, suite="linear") -> Path:
    (folder / f"{suite}.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
    return folder


def _identity(provider, case, suite):
    return {
        "suite": suite,
        "case": case,
        "device": "cpu",
        "dtype": "bf16",
        "lora_dtype": "bf16",
        "shape": {k: int(v) for k, v in re.findall(r"-([A-Z])(\d+)", case)},
        "workload": None,
        "dropout": 0.0,
        "timestamp": "2026-01-02T03:04:05+00:00",
        "provider": provider,
    }
