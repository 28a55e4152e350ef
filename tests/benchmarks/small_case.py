"""Tiny benchmark cases with custom providers, and their lines."""

from torch.nn import functional as nnf

from benchmarks.harness import measurement
from benchmarks.harness.case import Case, Ceilings
from benchmarks.harness.terminal import Plain
from benchmarks.suites.linear import SCALING, Linear
from benchmarks.suites.multi import Multi

SIZES = {"K": 40, "N": 56, "R": 4}
SEEN = Ceilings(1e10, dict.fromkeys(("fp32", "fp16", "bf16"), 1e11))


def linear_case(**providers) -> Case:
    """A tiny forward case with these providers beside base, unfused torch and fastlora."""
    work = Linear(backward=False)
    work.providers = {k: work.providers[k] for k in ("base", "torch", "fastlora")} | providers
    return Case(work, "cpu", "fp32", {"M": 9, **SIZES})


def lines_of(case: Case) -> dict[str, dict]:
    measured = list(measurement.measure(case, SEEN, seconds=0.02))
    Plain(1).case(case.name, measured)
    return {line["provider"]: line for line in measured}


def correct_output(o):
    return nnf.linear(o["x"], o["weight"]) + o["x"] @ o["lora_A"].T @ o["lora_B"].T * SCALING


def case_of(work, dtype="fp32", **changes) -> Case:
    """A tiny case of one adapter, or of many."""
    rows = {"M": 9} if isinstance(work, Linear) else {"T": 9, "S": 3}
    if isinstance(work, Multi) and work.phase == "prefill":
        rows = {"B": 3, "L": 21, "S": 2}
    load = "" if isinstance(work, Linear) else "distinct"
    return Case(work, "cpu", dtype, {**rows, **SIZES}, **{"workload": load, **changes})
