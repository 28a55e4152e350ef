"""``python -m benchmarks.tables.serving``: tokens a second, and what a cold adapter costs.

Rows of one batch want 1, 8 or 64 different adapters: the base model alone, PEFT with
``adapter_names``, ``MultiLoRAModel.generate`` and an engine's running batch write as many tokens,
in turns. First their logits must agree with PEFT's, and the engine's tokens with ``generate``'s.
Then rows are written while adapters arrive that are not on the device (in the host's memory, or on
disk alone), beside the same run with adapters that are there. Prints Markdown.
"""

from __future__ import annotations

import argparse
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import Tensor, nn

import fastlora
from benchmarks.harness import machine
from benchmarks.harness.timer import compute_ratios, compute_spread
from fastlora.adapters import files as adapter_files
from fastlora.demo.model import clone, make_small_llama
from fastlora.serving import Request

VOCABULARY = 256
# Relative norms of logits: sums in another order, operands rounded to another dtype.
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}


def write_adapters(base: nn.Module, folder: Path, count: int, r: int) -> list[str]:
    """Writes adapters of every linear but the head, in PEFT's files; returns their names."""
    draw = torch.Generator().manual_seed(1)
    linears = {n: m for n, m in base.named_modules() if isinstance(m, nn.Linear)}
    config = fastlora.LoRAConfig(r=r, lora_alpha=2 * r, target_modules="all-linear")
    for i in range(count):
        tensors = {}
        for name, linear in linears.items():
            if not name.endswith("lm_head"):
                N, K = linear.weight.shape
                tensors[f"{name}.lora_A.weight"] = torch.randn(r, K, generator=draw) * K**-0.5
                tensors[f"{name}.lora_B.weight"] = torch.randn(N, r, generator=draw) * 0.1
        adapter_files.write(folder / f"a{i}", config, tensors)
    return [f"a{i}" for i in range(count)]


def load_peft(base: nn.Module, folder: Path, names: list[str]) -> peft.PeftModel:
    model = peft.PeftModel.from_pretrained(clone(base), str(folder / names[0]), names[0])
    for name in names[1:]:
        model.load_adapter(str(folder / name), name)
    return model.eval()


def check(
    server: fastlora.MultiLoRAModel, theirs: nn.Module, ids: Tensor, names: list[str]
) -> None:
    """Raises where a row's logits are not PEFT's."""
    with torch.no_grad():
        want = theirs(input_ids=ids, adapter_names=names).logits.double()
    got = server(input_ids=ids, adapter_names=names).logits.double()
    error = float((got - want).norm() / want.norm())
    kind = str(next(server.parameters()).dtype).removeprefix("torch.")
    if not error <= TOLERANCE[kind]:
        raise RuntimeError(f"logits are {error:.2g} from PEFT's, at most {TOLERANCE[kind]}")


def stream(engine: Any, ids: list[list[int]], names: list[str], tokens: int) -> list[list[int]]:
    """Returns what an engine writes for rows that all come at once."""
    handles = [
        engine.submit(Request(row, name, max_new_tokens=tokens, eos_token_id=()))
        for row, name in zip(ids, names, strict=True)
    ]
    return [handle.result() for handle in handles]


def time_in_turns(
    calls: dict[str, Callable[[], object]], rounds: int, device: str
) -> dict[str, list[float]]:
    """Returns seconds of each round but the first, which allocates."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for turn in range(rounds + 1):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            start = time.perf_counter()
            calls[name]()
            if device == "cuda":
                torch.cuda.synchronize()
            samples[name].append(time.perf_counter() - start)
    return {name: each[1:] for name, each in samples.items()}


def print_throughput(options: argparse.Namespace, dtype: torch.dtype) -> None:
    """Prints a table: tokens a second of a batch of ``rows``, over the base's and over PEFT's."""
    base = make_small_llama(options.hidden, options.layers, VOCABULARY, seed=0).to(dtype).eval()
    base = base.to(options.device)
    kind = str(dtype).removeprefix("torch.")
    rows, tokens = options.rows, options.tokens
    torch.manual_seed(0)
    ids = torch.randint(VOCABULARY, (rows, 16), device=options.device)
    settings = {
        "attention_mask": torch.ones_like(ids), "max_new_tokens": tokens, "min_new_tokens": tokens,
        "do_sample": False, "pad_token_id": 0,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        every = write_adapters(base, folder, min(64, rows), options.rank)
        theirs = load_peft(base, folder, every)
        server = fastlora.MultiLoRAModel(clone(base), len(every), options.rank)
        for name in every:
            server.load_adapter(folder / name, name)
    with server.engine(max_rows=rows, max_length=16 + tokens, step_tokens=16 * rows) as engine:
        for different in (n for n in (1, 8, 64) if n <= rows):
            names = [every[i % different] for i in range(rows)]
            check(server, theirs, ids, names)
            calls: dict[str, Callable[[], Any]] = {
                "base": partial(base.generate, ids, **settings),
                "PEFT": partial(theirs.generate, input_ids=ids, adapter_names=names, **settings),
                "fastlora, generate": partial(
                    server.generate, ids, adapter_names=names, **settings
                ),
                "fastlora, engine": partial(stream, engine, ids.tolist(), names, tokens),
            }
            written = calls["fastlora, generate"]()[:, 16:].tolist()
            if kind == "float32" and calls["fastlora, engine"]() != written:
                raise RuntimeError("the engine's tokens are not generate's")
            samples = time_in_turns(calls, options.rounds, options.device)
            for name, seconds in samples.items():
                if name == "base":
                    continue
                speed = rows * tokens / compute_spread(seconds)["p50"]
                over = [
                    compute_spread(compute_ratios(samples[other], seconds))
                    for other in ("base", "PEFT")
                ]
                print(
                    f"| {kind} | {different} | {name} | {speed:,.0f} | "
                    + " | ".join(f"{r['p50']:.2f} ({r['p20']:.2f} to {r['p80']:.2f})" for r in over)
                    + " |",
                    flush=True,
                )


class Arrivals:
    """Rows that are written while requests for other adapters come, one every ``every`` tokens."""

    def __init__(self, server: fastlora.MultiLoRAModel, options: argparse.Namespace) -> None:
        self.server, self.options = server, options

    def run(self, engine: Any, residents: list[str], arriving: list[str]) -> float:
        """Returns the seconds that the rows took, from first token to last."""
        length, every = self.options.cold_tokens, self.options.every
        handles = [
            engine.submit(Request([1, 2, 3], name, max_new_tokens=length, eos_token_id=()))
            for name in residents
        ]
        ends: list[float] = []

        def follow() -> None:
            for handle in handles:
                handle.result()
            ends.append(time.perf_counter())

        tokens = iter(handles[0])
        next(tokens)
        start = time.perf_counter()
        waiting = threading.Thread(target=follow)
        waiting.start()
        later = []
        for i, _ in enumerate(tokens):
            if i % every == 0 and len(later) < len(arriving):
                request = Request([1, 2], arriving[len(later)], max_new_tokens=1, eos_token_id=())
                later.append(engine.submit(request))
        waiting.join()
        for handle in later:
            handle.result()
        return ends[0] - start


def print_cold(options: argparse.Namespace) -> None:
    """Prints what adapters that are not on the device cost rows that are."""
    base = make_small_llama(options.hidden, options.layers, VOCABULARY, seed=0).eval()
    base = base.to(options.device)
    rows, comers = options.cold_rows, options.cold_tokens // options.every - 1
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        names = write_adapters(base, folder, rows + 2 * comers, options.rank)
        for tier, host_bytes in (("the host's memory", 4 << 30), ("disk", 0)):
            # Room for the rows and one set of comers: the other set is always somewhere else.
            server = fastlora.MultiLoRAModel(
                clone(base), rows + comers, options.rank, host_bytes=host_bytes
            )
            for name in names:
                server.load_adapter(folder / name, name)
            residents, sets = names[:rows], (names[rows : rows + comers], names[rows + comers :])
            for name in residents:
                server.pin_adapter(name)
            with server.engine(max_rows=rows + 2, max_length=options.cold_tokens + 8) as engine:
                run = Arrivals(server, options).run
                run(engine, residents, sets[0])
                times: dict[str, list[float]] = {"hot": [], "cold": []}
                for turn in range(options.rounds):
                    before = server.bank.stats().loads
                    times["cold"].append(run(engine, residents, sets[(turn + 1) % 2]))
                    between = server.bank.stats().loads
                    times["hot"].append(run(engine, residents, sets[(turn + 1) % 2]))
                    after = server.bank.stats().loads
                    if (between - before, after - between) != (comers, 0):
                        raise RuntimeError(
                            f"{between - before} and {after - between} adapters were loaded, "
                            f"expected {comers} and none"
                        )
            size = server.bank.stats().device_bytes_used / len(residents + sets[0])
            ratio = compute_spread(compute_ratios(times["cold"], times["hot"]))
            print(
                f"| {tier} | {size / 1e6:.2f} | {options.cold_tokens / comers:.0f} | "
                f"{ratio['p50']:.3f} ({ratio['p20']:.3f} to {ratio['p80']:.3f}) |",
                flush=True,
            )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--hidden", type=int, default=512, help="a multiple of 32")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=24, help="that each row writes")
    parser.add_argument("--cold-rows", type=int, default=16)
    parser.add_argument("--cold-tokens", type=int, default=200)
    parser.add_argument("--every", type=int, default=20, help="tokens between two cold adapters")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    sizes = f"hidden {options.hidden}, {options.layers} layers, rank {options.rank}"
    print(f"{machine.find_device_name(options.device)}, {options.threads} threads; {sizes}\n")
    print("| base | adapters | model | tokens/s | over the base (p20 to p80) | over PEFT |")
    print("|---|---|---|---|---|---|")
    for dtype in (torch.float32, torch.bfloat16):
        print_throughput(options, dtype)
    print(f"\n{options.cold_rows} rows, float32\n")
    print("| an adapter comes from | MB | every tokens | time over one that is there |")
    print("|---|---|---|---|")
    print_cold(options)


if __name__ == "__main__":
    main()
