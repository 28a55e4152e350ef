"""Correctness before speed: every provider against the float64 oracle, or it is not timed.

On sampled rows (and features, for gradients), an output's relative error may be at most twice that
of unfused torch on the same operands, plus a constant for the dtype.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from benchmarks.harness.case import YARDSTICK, Absent, Case, Operands, Outputs, copy_operands
from benchmarks.harness.oracle import oracle

# Relative norms: what is allowed beyond twice the yardstick's, and the most that the yardstick may
# show itself.
ALLOWANCE = {"fp32": 1e-6, "fp16": 3e-4, "bf16": 2e-3}
_YARDSTICK_LIMIT = {"fp32": 1e-5, "fp16": 3e-3, "bf16": 2e-2}


@dataclass
class Verdict:
    """Verdict on one provider. errors: (relative error, bound) by output."""

    status: str  # ok, failed, error, absent
    reason: str = ""
    errors: dict[str, tuple[float, float]] = field(default_factory=dict)


def check(case: Case, seed: int) -> dict[str, Verdict]:
    """Judges every provider of the case, the yardstick first."""
    case = case.work.gated(case)
    order = sorted(case.providers, key=lambda name: name != YARDSTICK)
    try:
        session = _Session(case, seed, case.work.operands(case, seed))
    except Absent as absent:
        return dict.fromkeys(case.providers, Verdict("absent", str(absent)))
    verdicts: dict[str, Verdict] = {}
    for name in order:
        verdicts[name] = _judge_provider(session, name, verdicts.get(YARDSTICK))
    return {name: verdicts[name] for name in case.providers}


@dataclass
class _Session:
    """Operands and right results of a case, computed once; ``whole``: the yardstick's outputs."""

    case: Case
    seed: int
    operands: Operands
    truths: dict[str, Outputs] = field(default_factory=dict)
    whole: Outputs = field(default_factory=dict)


def _judge_provider(session: _Session, provider: str, yardstick: Verdict | None) -> Verdict:
    case = session.case
    try:
        errors = _compute_errors(session, provider)
    except Absent as absent:
        return Verdict("absent", str(absent))
    except Exception as error:
        return Verdict("error", f"{type(error).__name__}: {error}")
    if yardstick is None:
        limit = case.work.yardstick_factor * _YARDSTICK_LIMIT[case.dtype]
        return _judge(errors, dict.fromkeys(errors, limit))
    if yardstick.status != "ok":
        return Verdict("error", "unfused torch, which errors are judged by, did not pass")
    theirs = {k: error for k, (error, _) in yardstick.errors.items()}
    allowed = {k: 2 * theirs[k] + ALLOWANCE[case.dtype] for k in errors if k in theirs}
    # From the yardstick itself: as far as both may be from the truth.
    beside = {k: theirs[k] + allowed[k] for k in allowed}
    return _judge(errors, allowed | {_name_whole(k): bound for k, bound in beside.items()})


def _compute_errors(session: _Session, provider: str) -> dict[str, float]:
    """Computes errors of samples from the truth, and of whole outputs from the yardstick's."""
    case, work = session.case, session.case.work
    call = case.providers[provider](case, copy_operands(session.operands))
    torch.manual_seed(session.seed)
    outputs = call()
    got, key = work.sample(case, outputs), work.truth(case, provider)
    if key not in session.truths:
        torch.manual_seed(session.seed)
        session.truths[key] = work.expected(case, copy_operands(session.operands), provider)
    want = session.truths[key]
    if got.keys() != want.keys() or any(got[k].shape != want[k].shape for k in want):
        shapes = [{k: tuple(t.shape) for k, t in side.items()} for side in (got, want)]
        raise ValueError(f"outputs {shapes[0]} where {shapes[1]} were expected")
    errors = {k: oracle.relative_error(got[k], want[k]) for k in want}
    if provider == YARDSTICK:
        session.whole = {k: t.detach().clone() for k, t in outputs.items()}
    elif key == work.truth(case, YARDSTICK):
        whole = session.whole.items()
        errors |= {
            _name_whole(k): _compute_distance(outputs[k], t) for k, t in whole if k in errors
        }
    return errors


def _name_whole(output: str) -> str:
    return f"{output}, all of it"


def _compute_distance(got: Tensor, want: Tensor) -> float:
    """Computes the relative distance of whole outputs, in float32: samples miss rows between."""
    want = want.float()
    off = got.detach().reshape(want.shape).float() - want
    return float(off.norm() / want.norm().clamp(min=1e-30))


def _judge(errors: dict[str, float], bounds: dict[str, float]) -> Verdict:
    measured = {k: (error, bounds[k]) for k, error in errors.items()}
    over = [k for k, error in errors.items() if not (math.isfinite(error) and error <= bounds[k])]
    if not over:
        return Verdict("ok", errors=measured)
    text = ", ".join(f"{k}: error {errors[k]:.2e} over {bounds[k]:.2e}" for k in over)
    return Verdict("failed", text, measured)
