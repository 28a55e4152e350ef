"""The command line: ``fastlora info`` and ``fastlora demo``, also as ``python -m fastlora``."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import platform
import sys
from collections.abc import Sequence

import torch

import fastlora
from fastlora import dispatch, ops


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; the exit code is 0 when it did what it says."""
    parser = argparse.ArgumentParser(prog="fastlora", description="LoRA in drop-in torch modules.")
    parser.add_argument("--version", action="version", version=f"fastlora {fastlora.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("info", help="what runs here: versions, devices, backends and why not")
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
    from fastlora.demo import run

    return run(options.model, options.data, quick=options.quick, seed=options.seed)


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
        built = torch.version.cuda
        reason = "no GPU was found" if built else "this torch is built without CUDA"
        lines.append(f"  cuda   not usable: {reason}")
    lines += ["", "backends"]
    for name in dispatch.BACKENDS:
        reason = dispatch.unusable(name)
        lines.append(f"  {name:<6} " + ("usable" if reason is None else f"not usable: {reason}"))
    asked = os.environ.get("FASTLORA_BACKEND")
    lines += [f"  FASTLORA_BACKEND={asked}"] if asked else []
    lines += ["", "ops"]
    for name in ops.SCHEMAS:
        lines.append(f"  {name:<28} {_chosen(name)}")
    return "\n".join(lines)


def _version(name: str) -> str:
    if importlib.util.find_spec(name) is None:
        return "not installed"
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "of unknown version"


def _chosen(op: str) -> str:
    try:
        return dispatch.choose(op, torch.device("cpu"))
    except (RuntimeError, ValueError) as error:
        return f"cannot run: {error}"


if __name__ == "__main__":
    sys.exit(main())
