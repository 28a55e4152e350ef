"""The command line: ``fastlora info``, ``check``, ``tune``, ``merge``, ``bench`` and ``demo``.

Also as ``python -m fastlora``.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import importlib.util
import os
import platform
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

import fastlora
from fastlora.backends import native
from fastlora.commands import merge as merge_command
from fastlora.commands.check import run as selftest
from fastlora.commands.check.linear import DTYPES
from fastlora.commands.tune import jobs
from fastlora.commands.tune import run as tuning
from fastlora.ops import availability, dispatch
from fastlora.ops.table import OPS


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; the exit code is 0 when it did what it says."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments[:1] == ["bench"]:  # it has a parser of its own
        return bench(arguments[1:])
    parser = argparse.ArgumentParser(prog="fastlora", description="LoRA in drop-in torch modules.")
    parser.add_argument("--version", action="version", version=f"fastlora {fastlora.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("info", help="what runs here: versions, devices, backends and why not")
    _add_check(commands.add_parser("check", help="test the kernels on this device, and use them"))
    _add_tune(commands.add_parser("tune", help="time the kernels' tile shapes on this GPU"))
    merge_command.add(commands.add_parser("merge", help="merge adapters into a model's files"))
    commands.add_parser("bench", help="measure beside torch and PEFT, in a checkout")
    demo = commands.add_parser(
        "demo", help="train, compare with PEFT, serve and merge, on real text"
    )
    demo.add_argument("--model", metavar="PATH", help="a local transformers causal language model")
    demo.add_argument("--data", metavar="FILE", help="a text file to fine-tune it on")
    demo.add_argument("--quick", action="store_true", help="at toy sizes, in half a minute")
    demo.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    if options.command == "info":
        print(info())
        return 0
    if options.command == "check":
        return check(options)
    if options.command == "tune":
        return tune(options)
    if options.command == "merge":
        return merge_command.merge(options)
    from fastlora.demo import run

    return run(options.model, options.data, quick=options.quick, seed=options.seed)


def bench(arguments: Sequence[str]) -> int:
    """``benchmarks/`` of the checkout that this package lies in; exit code 2 where it is not."""
    checkout = Path(fastlora.__file__).resolve().parent.parent
    if not (checkout / "benchmarks" / "cases.py").exists():
        return _refused(
            "bench",
            "benchmarks come with the sources: expected fastlora in a checkout, or "
            f"installed from one with `pip install -e .`; this one lies in {checkout}",
        )
    # In front: anybody may have installed a package of that name.
    sys.path.insert(0, str(checkout))
    return importlib.import_module("benchmarks.cli").main(arguments, "fastlora bench")


def _add_check(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", type=_device, help="default: the GPU, if there is one")
    parser.add_argument("--backend", choices=selftest.BACKENDS, help="default: all that run there")
    parser.add_argument("--dtype", choices=DTYPES, action="append", help="may be repeated")
    parser.add_argument(
        "--op", choices=selftest.CHECKED, action="append", metavar="OP", help="may be repeated"
    )
    parser.add_argument("--quick", action="store_true", help="small shapes; stamps nothing")
    parser.add_argument("--save", type=Path, metavar="DIR", help="default: the cache folder")
    parser.add_argument("--seed", type=int, help="of the data, to repeat a failure")


def _add_tune(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", type=_device, help="default: the first GPU")
    parser.add_argument("--shapes", type=_shape, nargs="+", metavar="M,K,N,R", help="of layers")
    plain = [name for name in DTYPES if "+" not in name]
    parser.add_argument("--dtype", choices=plain, action="append", help="default: bf16")
    parser.add_argument("--kernel", choices=jobs.KERNELS, action="append", help="without the paths")
    parser.add_argument("--quick", action="store_true", help="three small shapes, one round")
    parser.add_argument("--save", type=Path, metavar="DIR", help="default: the cache folder")


def _device(text: str) -> torch.device:
    try:
        return torch.device(text)
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(f"expected cpu or cuda[:N], got {text!r}") from error


def _missing(device: torch.device) -> str | None:
    """Why there is no such device here, or None."""
    if device.type == "cpu" and not device.index:
        return None
    if device.type != "cuda":
        return f"expected cpu or cuda[:N], got {device}"
    count = torch.cuda.device_count()
    if availability.no_gpu() is None and (device.index or 0) >= count:
        return f"there are {count} CUDA GPUs, got {device}"
    return availability.no_gpu()


def _shape(text: str) -> tuple[int, int, int, int]:
    try:
        M, K, N, R = (int(size) for size in text.split(","))
    except ValueError:
        M = K = N = R = 0
    if min(M, K, N, R) < 1:
        raise argparse.ArgumentTypeError(f"expected M,K,N,R of 1 or more, got {text!r}")
    return M, K, N, R


def check(options: argparse.Namespace) -> int:
    """Exit code 0: all passed; 1: not all; 2: what was asked for does not run here."""
    gpu = torch.cuda.is_available()
    device = options.device or torch.device("cuda" if gpu else "cpu")
    reason = _missing(device)
    if reason is not None:
        return _refused("check", reason)
    reasons = {name: availability.cannot(name, device) for name in selftest.BACKENDS}
    if options.backend and reasons[options.backend] is not None:
        return _refused("check", f"backend {options.backend!r}: {reasons[options.backend]}")
    backends = [options.backend] if options.backend else list(selftest.BACKENDS)
    unchecked = {name: reasons[name] for name in backends if reasons[name] is not None}
    try:
        passed = selftest.check(
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
    for name, why in unchecked.items():
        print(f"{name} was not checked: {why}")
    return 0 if passed else 1


def tune(options: argparse.Namespace) -> int:
    """Exit code 0: timed; 1: a candidate was wrong; 2: nothing to time on."""
    device = options.device or torch.device("cuda")
    if device.type != "cuda":
        return _refused("tune", f"expected a CUDA device to time on, got {device}")
    reason = _missing(device) or availability.cannot("triton", device)
    if reason is not None:
        return _refused("tune", reason)
    shapes = options.shapes or (tuning.QUICK if options.quick else tuning.SHAPES)
    try:
        with torch.cuda.device(device):
            right = tuning.tune(
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
    return 0 if right else 1


def _refused(command: str, reason: str) -> int:
    print(f"fastlora {command}: {reason}", file=sys.stderr)
    return 2


def info() -> str:
    """What fastlora can and cannot use on this machine, and why, a line each."""
    lines = [f"fastlora {fastlora.__version__} at {os.path.dirname(fastlora.__file__)}"]
    lines.append(
        f"python   {platform.python_version()} on {platform.system()} {platform.machine()}"
    )
    lines += [
        f"{name:<8} {_version(name)}"
        for name in ("torch", "triton", "numpy", "safetensors", "peft", "transformers")
    ]
    lines += ["", "devices"]
    lines.append(
        f"  cpu    {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    )
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(index)
            lines.append(
                f"  cuda:{index} {torch.cuda.get_device_name(index)}, compute {major}.{minor}"
            )
    else:
        lines.append(f"  cuda   not usable: {availability.no_gpu()}")
    lines += ["", "backends"]
    for name in availability.BACKENDS:
        reason = availability.unusable(name)
        usable = "usable"
        if name == "cpu" and reason is None:
            usable += f", with {native.instruction_set()} of {native.available()}"
        lines.append(f"  {name:<6} " + (usable if reason is None else f"not usable: {reason}"))
    asked = os.environ.get("FASTLORA_BACKEND")
    lines += [f"  FASTLORA_BACKEND={asked}"] if asked else []
    lines += ["", "kernels", f"  cpu    runs lora_linear on {_chosen('lora_linear')}"]
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        lines += _verified(torch.device("cuda", index))
    records = importlib.import_module("fastlora.kernels.choose.records")
    lines.append(f"  rows of this machine's checks and timings: {records.cache_folder()}")
    lines += ["", "ops on CPU tensors"]
    for name in OPS:
        lines.append(f"  {name:<28} {_chosen(name)}")
    return "\n".join(lines)


def _version(name: str) -> str:
    if importlib.util.find_spec(name) is None:
        return "not installed"
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "of unknown version"


def _verified(device: torch.device) -> list[str]:
    """Which backend a GPU's layers run on, and what was verified there."""
    backends: dict[str, list[str]] = {}
    for name, (dtype, lora_dtype) in DTYPES.items():
        if name != "tf32":  # that is how fp32 is multiplied, by torch's setting
            chosen = _chosen("lora_linear", device, dtype, lora_dtype)
            backends.setdefault(chosen, []).append(name)
    said = [f"{backend} ({', '.join(names)})" for backend, names in backends.items()]
    lines = [f"  {device} runs lora_linear on {', '.join(said)}"]
    major, minor = torch.cuda.get_device_capability(device)
    modules = {"triton": "fastlora.kernels.choose.choice", "cuda": "fastlora.backends.cuda.paths"}
    usable = [m for name, m in modules.items() if availability.cannot(name, device) is None]
    if not usable:
        return lines
    of = [importlib.import_module(module).verified for module in usable]
    found = verified_lines(
        lambda op, dtype: tuple(p for f in of for p in f(op, dtype, 10 * major + minor))
    )
    found = found or ["nothing is verified here, so plain torch runs; `fastlora check` verifies"]
    return lines + [f"         {line}" for line in found]


def verified_lines(verified: Callable[[str, str], tuple[str, ...]]) -> list[str]:
    """A line an op: its verified paths, with the dtypes that share them."""
    lines = []
    for op in selftest.CHECKED:
        dtypes: dict[tuple[str, ...], list[str]] = {}
        for dtype in DTYPES:
            dtypes.setdefault(verified(op, dtype), []).append(dtype)
        said = [
            f"{', '.join(paths)} ({', '.join(names)})" for paths, names in dtypes.items() if paths
        ]
        lines += [f"verified {op}: {'; '.join(said)}"] if said else []
    return lines


def _chosen(
    op: str,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
    lora_dtype: torch.dtype | None = None,
) -> str:
    try:
        with dispatch.quietly():
            return dispatch.choose(op, device or torch.device("cpu"), dtype, lora_dtype)
    except (RuntimeError, ValueError) as error:
        return f"cannot run: {error}"


if __name__ == "__main__":
    sys.exit(main())
