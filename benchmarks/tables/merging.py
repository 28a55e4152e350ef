"""``python -m benchmarks.tables.merging TABLE``: the tables of docs/merging.md that need no turns.

receipt: its bytes; fidelity: how much of a delta arrives; both of normal numbers. combine: three
adapters of a layer made one. checkpoint: a model's files merged by fastlora and by PEFT, a process
each, imports included. Prints Markdown; what is wrong is not timed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fastlora
from benchmarks.harness import machine
from fastlora import functional as F
from fastlora.adapters.combine import combine
from fastlora.functional.fidelity import LOW_GAIN, measure
from fastlora.functional.receipt import Adapter

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
R, ADAPTERS, ROUNDS = 16, 3, 15


def print_row(*cells: str) -> None:
    print(f"| {' | '.join(cells)} |", flush=True)


def print_heading(*cells: str) -> None:
    print_row(*cells)
    print("|---" * len(cells) + "|")


def draw_layer(size: int, dtype: torch.dtype, ratio: float) -> tuple[Tensor, list[Adapter]]:
    """Draws a weight (size, size) and a float32 adapter whose |d| / |W| is ratio."""
    torch.manual_seed(0)
    weight = (torch.randn(size, size) * size**-0.5).to(dtype)
    A, B = torch.randn(R, size) * size**-0.5, torch.randn(size, R) * ratio * R**-0.5
    return weight, [(A, B, 1.0)]


def print_receipts(options: argparse.Namespace) -> None:
    ratios = (0.001, 0.01, 0.1, 1.0)
    print_heading(r"\|d\|/\|W\|", *(f"{ratio:g}" for ratio in ratios))
    for dtype in DTYPES:
        cells = []
        for ratio in ratios:
            weight, adapters = draw_layer(options.size, dtype, ratio)
            before = weight.clone()
            merge_receipt = F.merge_(weight, adapters)
            held = sum(t.nbytes for t in merge_receipt.parts) / weight.nbytes
            F.unmerge_(weight, merge_receipt)
            if not torch.equal(weight, before):
                raise RuntimeError(f"{dtype}, {ratio}: the weight did not come back")
            cells.append(f"{100 * held:.2g} %")
        print_row(str(dtype).removeprefix("torch."), *cells)


def print_fidelity(options: argparse.Namespace) -> None:
    print_heading(r"\|d\|/\|W\|", *(str(dtype).removeprefix("torch.") for dtype in DTYPES))
    for ratio in (0.0001, 0.001, 0.003, 0.01, 0.1, 1.0):
        cells = []
        for dtype in DTYPES:
            before, adapters = draw_layer(options.size, dtype, ratio)
            after = before.clone()
            F.merge_(after, adapters, receipt=False)
            result = measure(before, after, adapters)
            gain = f"{result.gain:.2f}" if result.gain >= LOW_GAIN else f"**{result.gain:.2f}**"
            cells.append(f"{gain} / {result.error:.2g} / {result.changed:.0%}".replace("%", " %"))
        print_row(f"{ratio:g}", *cells)


def print_combining(options: argparse.Namespace) -> None:
    torch.manual_seed(0)
    size, weights, names = options.size, [0.7, -0.4, 0.5], [str(i) for i in range(ADAPTERS)]
    adapters = [(torch.randn(R, size), torch.randn(size, R), 2.0) for _ in names]
    model = make_peft_model(adapters, names)
    print_heading("type", "fastlora, ms", "PEFT, ms")
    for kind in ("cat", "linear", "svd", "ties", "ties_svd"):

        def ours(kind: str = kind) -> Adapter:
            return combine(adapters, weights, kind, density=0.5)

        def theirs(kind: str = kind) -> None:
            model.add_weighted_adapter(names, weights, "new", kind, density=0.5)

        A, B, scaling = ours()
        theirs()
        linear = model.model.linear
        want = linear.scaling["new"] * linear.lora_B["new"].weight @ linear.lora_A["new"].weight
        off = float((scaling * B @ A - want).norm() / want.norm())
        if not off < 1e-3:
            raise RuntimeError(f"{kind}: {off:.1e} from PEFT's")
        samples: list[tuple[float, float]] = []
        rounds = 3 if kind.endswith("_svd") else ROUNDS
        for _ in range(rounds):
            model.delete_adapter("new")
            samples.append((time_call(ours), time_call(theirs)))
        model.delete_adapter("new")
        print_row(kind, *(f"{statistics.median(each):.3g}" for each in zip(*samples, strict=True)))


def make_peft_model(adapters: Sequence[Adapter], names: Sequence[str]) -> Any:
    """Makes PEFT's model of one linear layer with these adapters."""
    from peft import LoraConfig
    from peft.tuners.lora import LoraModel

    (A, B, scaling), *_ = adapters
    model = nn.Module()
    model.linear = nn.Linear(A.shape[1], B.shape[0], bias=False)
    config = LoraConfig(r=R, lora_alpha=scaling * R, target_modules=["linear"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT of a model with several adapters
        model = LoraModel(model, {names[0]: config}, names[0])
        for name in names[1:]:
            model.peft_config[name] = config
            model.inject_adapter(model.model, name)
    for name, (A, B, _) in zip(names, adapters, strict=True):
        model.model.linear.lora_A[name].weight.data.copy_(A)
        model.model.linear.lora_B[name].weight.data.copy_(B)
    return model


def time_call(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - began)


# A Llama of untrained numbers in bfloat16, in shards of a tenth or so, and an adapter for it.
BASE = """
import sys, torch, transformers
from peft import LoraConfig, get_peft_model
folder, layers, size, shard = sys.argv[1], *map(int, sys.argv[2:])
torch.manual_seed(0)
config = transformers.LlamaConfig(
    hidden_size=size, intermediate_size=11 * size // 4, num_hidden_layers=layers,
    num_attention_heads=16, num_key_value_heads=4, vocab_size=32000, tie_word_embeddings=False,
)
model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
model.save_pretrained(folder + "/base", max_shard_size=shard)
lora = LoraConfig(r=16, target_modules="all-linear", init_lora_weights=False)
get_peft_model(model, lora).save_pretrained(folder + "/adapter")
"""
FASTLORA = """
import sys
from fastlora.commands.main import main
folder, out = sys.argv[1:3]
command = ["merge", folder + "/base", folder + "/adapter", "--out", out]
if main([*command, "--report", folder + "/report.json"]):
    raise SystemExit(1)
"""
PEFT = """
import sys, torch, transformers
from peft import PeftModel
folder, out, shard = sys.argv[1:4]
model = transformers.AutoModelForCausalLM.from_pretrained(folder + "/base", dtype=torch.bfloat16)
model = PeftModel.from_pretrained(model, folder + "/adapter").merge_and_unload()
model.save_pretrained(out, max_shard_size=int(shard))
"""
# Reads this process's own memory: what wait() reports of a child includes its parent's.
PEAK = """
lines = open("/proc/self/status").read().splitlines()
print("peak", next(line.split()[1] for line in lines if line.startswith("VmHWM")))
"""


def print_checkpoint(options: argparse.Namespace) -> None:
    env = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    shard = str(500_000_000)

    def run(script: str, *arguments: str) -> tuple[float, float]:
        """Returns seconds and GB of a process."""
        command = [sys.executable, "-c", script + PEAK, *arguments]
        began = time.perf_counter()
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        took = time.perf_counter() - began
        if done.returncode:
            raise RuntimeError(done.stderr)
        return took, int(done.stdout.split()[-1]) * 1024 / 1e9

    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        run(BASE, folder, str(options.layers), str(options.size), shard)
        files = list(Path(folder, "base").glob("*.safetensors"))
        total = sum(path.stat().st_size for path in files) / 1e9
        samples_of: dict[str, list[tuple[float, float]]] = {"fastlora merge": [], "PEFT": []}
        for turn in range(options.rounds):
            for (name, samples), script in zip(samples_of.items(), (FASTLORA, PEFT), strict=True):
                samples.append(run(script, folder, f"{folder}/{name} {turn}", shard))
        layers = json.loads(Path(folder, "report.json").read_text())["layers"]
        if not all(0.98 < layer["gain"] < 1.02 for layer in layers.values()):
            raise RuntimeError("fastlora merge: a layer's gain is not 1")
    print_heading(f"{total:.2g} GB, {len(layers)} linears, {len(files)} files", "s", "GB at most")
    for name, samples in samples_of.items():
        seconds, peaks = (sorted(each) for each in zip(*samples, strict=True))
        print_row(name, f"{seconds[0]:.1f} to {seconds[-1]:.1f}", f"{peaks[-1]:.2f}")


TABLES = {
    "receipt": print_receipts,
    "fidelity": print_fidelity,
    "combine": print_combining,
    "checkpoint": print_checkpoint,
}
SIZES = {"combine": 1024}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("--size", type=int, help="K and N; the hidden size of the model")
    parser.add_argument("--threads", metavar="N", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--layers", type=int, default=20, help="of the model")
    parser.add_argument("--rounds", type=int, default=3, help="of whole processes")
    parser.add_argument("--folder", type=Path, help="where the model's files are made")
    options = parser.parse_args(arguments)
    options.size = options.size or SIZES.get(options.table, 2048)
    if options.threads:
        torch.set_num_threads(options.threads)
    threads, backend = torch.get_num_threads(), fastlora.backend("merge_", "cpu")
    device = machine.find_device_name("cpu")
    print(f"{device}, torch {torch.__version__}, {threads} threads, {backend}")
    TABLES[options.table](options)


if __name__ == "__main__":
    main()
