"""``fastlora check``: every op, on the user's own device, against its formula.

What passes on a GPU, an (op, dtype, path) at a time, becomes a row of ``verified.json``, by which
``dispatch`` chooses the kernels.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fastlora.commands.check.judging import DTYPES, WrongResult
from fastlora.commands.check.linear import Case, Subject, list_cases
from fastlora.commands.check.merge import MergeCase, MergeSubject, list_merge_cases
from fastlora.commands.check.multi import MultiCase, MultiSubject, list_multi_cases
from fastlora.commands.check.stamps import Stamps, is_lost
from fastlora.ops import availability, dispatch
from fastlora.ops.run import run_gradients
from fastlora.ops.table import OPS

# Data of each kind of op, and its cases.
_SUBJECTS: dict[str, tuple[Any, Any]] = {
    "linear": (Subject, list_cases),
    "multi": (MultiSubject, list_multi_cases),
    "packed": (MultiSubject, list_multi_cases),
    "merge": (MergeSubject, list_merge_cases),
}
CHECKED = tuple(name for name, op in OPS.items() if op.kind in _SUBJECTS)
MERGES = tuple(name for name, op in OPS.items() if op.kind == "merge")
BACKENDS = tuple(reversed(availability.BACKENDS))
# The CUDA kernels' paths to ops of a kind.
_CUDA = {
    "linear": ("cuda_one_pass", "cuda_two_pass", "cuda_overlapped"),
    "multi": ("cuda_decode",),
    "packed": ("cuda_decode",),
    "merge": ("cuda_in_place",),
}
# The one path of merging.
IN_PLACE = "in_place"
_IN_PLACES = (IN_PLACE, "cuda_in_place")


class NotTaken(Exception):
    """A call that the CUDA kernels refuse: no verdict on them."""


def list_paths(backend: str) -> tuple[str | None, ...]:
    """Lists the backend's paths; None alone stands for a backend without any."""
    if backend == "cuda":
        from fastlora.backends.cuda import paths

        return paths.PATHS
    if backend != "triton":
        return (None,)
    from fastlora.commands.kernels import choice

    return choice.EVERY_PATH


def can_run(
    op: str, path: str | None, case: Case | MultiCase | MergeCase, name: str, device: torch.device
) -> bool:
    """Whether the path can run the case, and the case is one for this op."""
    if isinstance(case, MergeCase) or path in _IN_PLACES:
        return isinstance(case, MergeCase) and path in (None, *_IN_PLACES)
    backward = op.endswith("_backward")
    if not backward and not case.weight:
        return False
    if (
        isinstance(case, MultiCase)
        and not op.startswith("packed")
        and (case.slices, case.page) != (1, 0)
    ):
        return False
    if path is not None and path.startswith("cuda_"):
        return "cuda" in OPS[op].backends and path in _CUDA[OPS[op].kind]
    if path is None:
        return True
    from fastlora.commands.kernels import choice, launch, ledger

    M, K, N, R = case[:4]
    dtype = DTYPES[name][0]
    inner, outer = (N, K) if backward else (K, N)
    weight = case.weight and not op.endswith("add_")
    problem = ledger.Problem(M, inner, outer, R, dtype.itemsize, weight)
    first = dtype == torch.float16
    if isinstance(case, MultiCase):
        problem = problem._replace(slots=case.S)
    elif case.dropout:
        problem = problem._replace(masked="y" if backward else "x")
        first = first or backward
    return choice.possible(path, problem, launch.arch_of(device), first)


def check(
    device: torch.device,
    backends: Sequence[str],
    *,
    names: Sequence[str] | None = None,
    ops: Sequence[str] | None = None,
    quick: bool = False,
    folder: Path | None = None,
    seed: int | None = None,
    say: Callable[[str], None] = print,
) -> bool:
    """Checks the backends and stamps what passed; returns whether all did.

    names, ops: default all of them.
    """
    gpu = device.type == "cuda"
    seed = secrets.randbits(32) if seed is None else seed
    device_name = torch.cuda.get_device_name(device) if gpu else "CPU"
    say(f"fastlora check on {device} ({device_name}), data of seed {seed}")
    stamps = Stamps(device, folder, quick) if {"triton", "cuda"} & set(backends) else None
    say(f"{'backend':<8} {'path':<15} {'dtype':<10} {'checks':>6}  worst error over allowed")
    passed = True
    for name in names or [name for name in DTYPES if gpu or name != "tf32"]:
        with set_fp32_precision(name):
            by_op = _draw_subjects(ops or CHECKED, name, device, seed, quick)
            for backend in backends:
                for path in list_paths(backend):
                    failures, dead = _check_path(backend, path, name, device, by_op, stamps, say)
                    passed = passed and not failures
                    if dead:
                        say("CUDA does not recover from this in one process: stopped here")
                        return False
    if stamps is not None:
        say(stamps.summarize())
    say("all passed" if passed else "FAILED")
    return passed


def _draw_subjects(
    ops: Sequence[str], name: str, device: torch.device, seed: int, quick: bool
) -> dict[str, Sequence[Any]]:
    """Draws the data of each op, the same whichever others are checked beside it."""
    drawn: dict[Any, Sequence[Any]] = {}
    by_op: dict[str, Sequence[Any]] = {}
    for op in (op for op in CHECKED if op in ops):
        subject, cases_of = _SUBJECTS[OPS[op].kind]
        if subject not in drawn:
            draw = torch.Generator().manual_seed(seed)
            of_device = cases_of(quick, device.type == "cuda")
            drawn[subject] = [subject(case, name, device, draw) for case in of_device]
        by_op[op] = drawn[subject]
    return by_op


def _check_path(
    backend: str, path: str | None, name: str, device: torch.device,
    by_op: Mapping[str, Sequence[Any]],
    stamps: Stamps | None, say: Callable[[str], None],
) -> tuple[list[str], bool]:  # fmt: skip
    """Checks a path and prints its line; returns its failures, and whether the device is lost."""
    checks, worst, failures, dead = 0, 0.0, [], False
    for op, subjects in by_op.items():
        if backend not in OPS[op].backends:
            continue
        function = _find_function(op, backend, path)
        before, failed, wrong = checks, len(failures), False
        for subject in subjects:
            if dead or not can_run(op, path, subject.case, name, device):
                continue
            checks += 1
            try:
                worst = max(worst, subject.judge(op, function))
            except NotTaken:
                checks -= 1
            except Exception as error:  # whatever a kernel raises, it has failed its check
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                failures.append(f"    {op} ({subject.case}): {reason}")
                dead = is_lost(device)
                # Too little memory, say, is no fault of the kernel, and stamps no failure.
                wrong = wrong or dead or isinstance(error, WrongResult)
        clean = len(failures) == failed
        if stamps is not None and path is not None and checks > before and (clean or wrong):
            stamps.note(op, name, path, passed=clean)
        if dead:
            break
    if checks:
        result = "FAILED" if failures else "passed"
        say(f"{backend:<8} {path or '-':<15} {name:<10} {checks:>6}  {worst:.2f} {result}")
        for failure in failures:
            say(failure)
    return failures, dead


def _find_function(op: str, backend: str, path: str | None) -> Any:
    """Returns what a subject judges; for merging all three ops, which undo each other."""
    if op in MERGES:
        return {name: dispatch.implementation(name, backend) for name in MERGES}
    if path is not None and path.startswith("cuda_"):
        return partial(_run_on_cuda, op, path)
    function = dispatch.implementation(op, backend)
    return function if path is None else partial(function, path=path)


def _run_on_cuda(op: str, path: str, *operands: Any) -> Any:
    """Runs what the CUDA kernels take, and on torch the gradients that they lack."""
    package = dispatch.package("cuda")
    reason = package.refuses(op, operands, path=path)
    if reason is not None:
        raise NotTaken(reason)
    if op not in package.GRADIENTS:
        return getattr(package, op)(*operands, path=path)
    others = dispatch.implementation(op, "torch")
    return run_gradients(op, package, others, operands, path=path)


@contextmanager
def set_fp32_precision(name: str) -> Iterator[None]:
    """Multiplies float32 as the dtype's name says; forgets choices made for other precisions."""
    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "tf32" if name == "tf32" else "ieee"
    _forget_choices()
    try:
        yield
    finally:
        matmul.fp32_precision = before
        _forget_choices()


def _forget_choices() -> None:
    if availability.unusable("triton") is None:
        from fastlora.commands.kernels import choice

        choice.forget()
