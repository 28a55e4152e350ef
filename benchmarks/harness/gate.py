"""Correctness before speed: every provider against the float64 oracle, or it is not timed.

On sampled rows (and features, for gradients), an output's relative error may be at most twice that
of unfused torch on the same operands, plus a constant for the dtype.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

from benchmarks.harness.truth import oracle
from benchmarks.harness.work import YARDSTICK, Absent, Case, Outputs

# Relative norms: what is allowed beyond twice the yardstick's, and the most that the yardstick may
# show itself.
ALLOWANCE = {"fp32": 1e-6, "fp16": 3e-4, "bf16": 2e-3}
_YARDSTICK_LIMIT = {"fp32": 1e-5, "fp16": 3e-3, "bf16": 2e-2}


@dataclass
class Verdict:
    """What the gate says of one provider. errors: by output, (relative error, bound)."""

    status: str  # ok, failed, error, absent
    reason: str = ""
    errors: dict[str, tuple[float, float]] = field(default_factory=dict)


def check(case: Case, seed: int) -> dict[str, Verdict]:
    """A verdict on every provider of the case, the yardstick first."""
    case = case.work.gated(case)
    order = sorted(case.providers, key=lambda name: name != YARDSTICK)
    truths: dict[str, Outputs] = {}
    verdicts: dict[str, Verdict] = {}
    for name in order:
        verdicts[name] = _verdict(case, seed, name, truths, verdicts.get(YARDSTICK))
    return {name: verdicts[name] for name in case.providers}


def _verdict(
    case: Case,
    seed: int,
    provider: str,
    truths: dict[str, Outputs],
    yardstick: Verdict | None,
) -> Verdict:
    try:
        errors = _errors(case, seed, provider, truths)
    except Absent as absent:
        return Verdict("absent", str(absent))
    except Exception as error:
        return Verdict("error", f"{type(error).__name__}: {error}")
    if yardstick is None:
        limit = case.work.yardstick_factor * _YARDSTICK_LIMIT[case.dtype]
        return _judge(errors, dict.fromkeys(errors, limit))
    if yardstick.status != "ok":
        return Verdict("error", "unfused torch, which errors are judged by, did not pass")
    allowed = {k: 2 * yardstick.errors[k][0] + ALLOWANCE[case.dtype] for k in errors}
    return _judge(errors, allowed)


def _errors(case: Case, seed: int, provider: str, truths: dict[str, Outputs]) -> dict[str, float]:
    call = case.providers[provider](case, case.work.operands(case, seed))
    torch.manual_seed(seed)
    got = case.work.sample(case, call())
    key = case.work.truth(case, provider)
    if key not in truths:
        operands = case.work.operands(case, seed)
        torch.manual_seed(seed)
        truths[key] = case.work.expected(case, operands, provider)
    want = truths[key]
    if got.keys() != want.keys() or any(got[k].shape != want[k].shape for k in want):
        shapes = [{k: tuple(t.shape) for k, t in side.items()} for side in (got, want)]
        raise ValueError(f"outputs {shapes[0]} where {shapes[1]} were expected")
    return {k: oracle.relative_error(got[k], want[k]) for k in want}


def _judge(errors: dict[str, float], bounds: dict[str, float]) -> Verdict:
    measured = {k: (error, bounds[k]) for k, error in errors.items()}
    over = [k for k, error in errors.items() if not (math.isfinite(error) and error <= bounds[k])]
    if not over:
        return Verdict("ok", errors=measured)
    said = ", ".join(f"{k}: error {errors[k]:.2e} over {bounds[k]:.2e}" for k in over)
    return Verdict("failed", said, measured)
