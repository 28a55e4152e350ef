"""The command line: ``fastlora info``, ``check``, ``tune``, ``merge``, ``serve`` and others.

Also as ``python -m fastlora``.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

import fastlora
from fastlora.commands import info, merge, serve
from fastlora.commands.check import run as checking
from fastlora.commands.check.judging import DTYPES
from fastlora.commands.tune import calls
from fastlora.commands.tune import cpu as tuning_cpu
from fastlora.commands.tune import run as tuning
from fastlora.ops import availability


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code, 0 when it did what it says."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments[:1] == ["bench"]:  # it has a parser of its own
        return run_bench(arguments[1:])
    parser = argparse.ArgumentParser(prog="fastlora", description="LoRA in drop-in torch modules.")
    parser.add_argument("--version", action="version", version=f"fastlora {fastlora.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("info", help="what runs here: versions, devices, backends and why not")
    _add_check(commands.add_parser("check", help="test the kernels on this device, and use them"))
    _add_tune(
        commands.add_parser(
            "tune", help="time the kernels' tile shapes on a GPU, or the CPU's forms"
        )
    )
    merge.add_arguments(commands.add_parser("merge", help="merge adapters into a model's files"))
    serve.add_arguments(commands.add_parser("serve", help="serve a model with adapters over HTTP"))
    commands.add_parser("bench", help="measure beside torch and PEFT, in a checkout")
    _add_demo(
        commands.add_parser("demo", help="train, compare with PEFT, serve and merge, on real text")
    )
    options = parser.parse_args(arguments)
    if options.command == "info":
        print(info.describe_machine())
        return 0
    if options.command == "check":
        return run_check(options)
    if options.command == "tune":
        return run_tune(options)
    if options.command == "merge":
        return merge.run_merge(options)
    if options.command == "serve":
        return serve.run_serve(options)
    from fastlora.demo import run

    return run(options.model, options.data, quick=options.quick, seed=options.seed)


def run_bench(arguments: Sequence[str]) -> int:
    """Runs ``benchmarks/`` of the checkout that this package lies in; exit code 2 without one."""
    checkout = Path(fastlora.__file__).resolve().parent.parent
    if not (checkout / "benchmarks" / "cases.py").exists():
        return _refuse(
            "bench",
            "benchmarks come with the sources: expected fastlora in a checkout, or "
            f"installed from one with `pip install -e .`; this one lies in {checkout}",
        )
    # In front, since another package of that name may be installed.
    sys.path.insert(0, str(checkout))
    return importlib.import_module("benchmarks.cli").main(arguments, "fastlora bench")


def _add_check(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", type=_parse_device, help="default: the GPU, if there is one")
    parser.add_argument("--backend", choices=checking.BACKENDS, help="default: all that run there")
    parser.add_argument("--dtype", choices=DTYPES, action="append", help="may be repeated")
    parser.add_argument(
        "--op", choices=checking.CHECKED, action="append", metavar="OP", help="may be repeated"
    )
    parser.add_argument("--quick", action="store_true", help="small shapes; stamps nothing")
    parser.add_argument("--save", type=Path, metavar="DIR", help="default: the cache folder")
    parser.add_argument("--seed", type=int, help="of the data, to repeat a failure")


def _add_tune(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", type=_parse_device, help="default: the first GPU, else the CPU")
    parser.add_argument(
        "--shapes", type=_parse_shape, nargs="+", metavar="M,K,N,R", help="of layers"
    )
    plain = [name for name in DTYPES if "+" not in name]
    parser.add_argument("--dtype", choices=plain, action="append", help="default: bf16")
    parser.add_argument(
        "--kernel", choices=calls.KERNELS, action="append", help="without the paths"
    )
    parser.add_argument("--quick", action="store_true", help="three small shapes, one round")
    parser.add_argument("--save", type=Path, metavar="DIR", help="default: the cache folder")


def _add_demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", metavar="PATH", help="a local transformers causal language model"
    )
    parser.add_argument("--data", metavar="FILE", help="a text file to fine-tune it on")
    parser.add_argument("--quick", action="store_true", help="at toy sizes, in half a minute")
    parser.add_argument("--seed", type=int, default=0)


def _parse_device(text: str) -> torch.device:
    try:
        return torch.device(text)
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(f"expected cpu or cuda[:N], got {text!r}") from error


def _explain_missing(device: torch.device) -> str | None:
    """Says why there is no such device here; None where there is."""
    if device.type == "cpu" and not device.index:
        return None
    if device.type != "cuda":
        return f"expected cpu or cuda[:N], got {device}"
    count = torch.cuda.device_count()
    if availability.no_gpu() is None and (device.index or 0) >= count:
        return f"there are {count} CUDA GPUs, got {device}"
    return availability.no_gpu()


def _parse_shape(text: str) -> tuple[int, int, int, int]:
    try:
        M, K, N, R = (int(size) for size in text.split(","))
    except ValueError:
        M = K = N = R = 0
    if min(M, K, N, R) < 1:
        raise argparse.ArgumentTypeError(f"expected M,K,N,R of 1 or more, got {text!r}")
    return M, K, N, R


def run_check(options: argparse.Namespace) -> int:
    """Returns 0 where all passed, 1 where not, 2 where the device or backend does not run here."""
    gpu = torch.cuda.is_available()
    device = options.device or torch.device("cuda" if gpu else "cpu")
    reason = _explain_missing(device)
    if reason is not None:
        return _refuse("check", reason)
    reasons = {name: availability.cannot(name, device) for name in checking.BACKENDS}
    if options.backend and reasons[options.backend] is not None:
        return _refuse("check", f"backend {options.backend!r}: {reasons[options.backend]}")
    backends = [options.backend] if options.backend else list(checking.BACKENDS)
    unchecked = {name: reasons[name] for name in backends if reasons[name] is not None}
    try:
        passed = checking.check(
            device,
            [name for name in backends if name not in unchecked],
            names=options.dtype,
            ops=options.op,
            quick=options.quick,
            folder=options.save,
            seed=options.seed,
        )
    except KeyboardInterrupt:
        print("fastlora check: interrupted; the rows that were written are kept")
        return 130
    for name, reason in unchecked.items():
        print(f"{name} was not checked: {reason}")
    return 0 if passed else 1


def run_tune(options: argparse.Namespace) -> int:
    """Returns 0 when timed, 1 where a candidate was wrong, 2 where there is nothing to time on."""
    device = options.device or torch.device("cpu" if availability.no_gpu() else "cuda")
    if device.type == "cpu":
        return _tune_cpu(options)
    if device.type != "cuda":
        return _refuse("tune", f"expected a CUDA device or the CPU to time on, got {device}")
    reason = _explain_missing(device) or availability.cannot("triton", device)
    if reason is not None:
        return _refuse("tune", reason)
    shapes = options.shapes or (tuning.QUICK if options.quick else tuning.SHAPES)
    try:
        with torch.cuda.device(device):
            all_right = tuning.tune(
                device,
                shapes,
                dtypes=options.dtype or ["bf16"],
                kernels=options.kernel,
                folder=options.save,
                rounds=1 if options.quick else 3,
            )
    except KeyboardInterrupt:
        print("fastlora tune: interrupted; the shapes that were finished are kept")
        return 130
    return 0 if all_right else 1


def _tune_cpu(options: argparse.Namespace) -> int:
    reason = availability.unusable("cpu")
    if reason is not None:
        return _refuse("tune", reason)
    if options.shapes or options.kernel:
        return _refuse("tune", "--shapes and --kernel are of a GPU's kernels")
    threads = sorted({1, torch.get_num_threads()})
    dtypes = options.dtype or list(tuning_cpu.DTYPES)
    if unknown := sorted(set(dtypes) - set(tuning_cpu.DTYPES)):
        return _refuse("tune", f"--dtype {unknown[0]}: expected {', '.join(tuning_cpu.DTYPES)}")
    try:
        tuning_cpu.tune_cpu(dtypes, threads, options.save, quick=options.quick)
    except KeyboardInterrupt:
        print("fastlora tune: interrupted; the rows that were finished are kept")
        return 130
    return 0


def _refuse(command: str, reason: str) -> int:
    print(f"fastlora {command}: {reason}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
