"""A thousand adapters on one small Llama: requests as they come, each for a tenant's own adapter.

Random adapters of ranks 4, 8 and 16 for every linear are written in PEFT's files and loaded. A few
popular ones get most of the requests (Zipf); those on the device change as requests need. Requests
have prompts and answers of different lengths and join and leave one running batch.

The base model alone serves the same requests the same way; PEFT, with every adapter it needs loaded
beforehand, serves the first of them in batches, which end with their longest. The tokens of some
requests are first compared with those of a model that has their adapter alone.

    python examples/serve_many_adapters.py [--adapters 1000] [--resident 64] [--requests 400]
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import peft
import torch
import transformers
from torch import Tensor, nn

import fastlora
from fastlora.adapters import files as adapter_files
from fastlora.demo.model import clone, make_small_llama
from fastlora.demo.settings import FULL
from fastlora.serving import Request

VOCABULARY = 256
RANKS = (4, 8, 16)
CHECKED = 6


def write_adapters(base: nn.Module, folder: Path, count: int) -> list[str]:
    """Writes folders of ``count`` random adapters; returns their names."""
    shapes = {
        name: module.weight.shape
        for name, module in base.named_modules()
        if isinstance(module, nn.Linear) and not name.endswith("lm_head")
    }
    draw, names = torch.Generator().manual_seed(0), [f"tenant-{i:04d}" for i in range(count)]
    for i, name in enumerate(names):
        r = RANKS[i % len(RANKS)]
        tensors = {}
        for layer, (N, K) in shapes.items():
            tensors[f"{layer}.lora_A.weight"] = torch.randn(r, K, generator=draw) * K**-0.5
            tensors[f"{layer}.lora_B.weight"] = torch.randn(N, r, generator=draw) * r**-0.5 * 0.1
        config = fastlora.LoRAConfig(r=r, lora_alpha=2 * r, target_modules="all-linear")
        adapter_files.write(folder / name, config, tensors)
    return names


def draw_requests(names: Sequence[str], options: argparse.Namespace) -> list[Request]:
    """Draws requests by Zipf's law: the i-th adapter has 1 / i as many as the first."""
    draw = random.Random(0)
    weights = [1 / (i + 1) ** options.zipf for i in range(len(names))]
    popular = draw.sample(list(names), len(names))
    return [
        Request(
            [draw.randrange(VOCABULARY) for _ in range(draw.randint(8, 48))],
            name,
            max_new_tokens=draw.randint(options.tokens // 4, options.tokens),
            eos_token_id=(),
            request_id=i,
        )
        for i, name in enumerate(draw.choices(popular, weights, k=options.requests))
    ]


@dataclass
class Served:
    """Results of requests: tokens of each, seconds to its first and to its last."""

    seconds: float = 0.0
    tokens: dict[object, list[int]] = field(default_factory=dict)
    first: dict[object, float] = field(default_factory=dict)
    last: dict[object, float] = field(default_factory=dict)

    def row(self, name: str) -> str:
        total = sum(map(len, self.tokens.values()))
        parts = [f"{name:<12}{total / self.seconds:>9.0f}"]
        for times in (self.last, self.first):
            parts += [
                f"{compute_percentile(times.values(), p):>8.2f}" for p in (50, 95, 99) if times
            ]
        return "".join(parts)


def compute_percentile(values: Iterator[float] | Sequence[float], p: int) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) * p // 100, len(ordered) - 1)]


def stream(server: fastlora.MultiLoRAModel, requests: Sequence[Request], rows: int) -> Served:
    """Serves one running batch of ``rows``, with as many requests waiting."""
    served, taken = Served(), {}

    def arriving() -> Iterator[Request]:
        for request in requests:
            taken[request.request_id] = time.perf_counter()
            served.tokens[request.request_id] = []
            yield request

    start = time.perf_counter()
    for event in server.stream(arriving(), max_rows=rows, max_length=256):
        if event.error is not None:
            raise event.error
        which, now = event.request.request_id, time.perf_counter()
        if event.token is not None:
            served.tokens[which].append(event.token)
            served.first.setdefault(which, now - taken[which])
        if event.finish_reason is not None:
            served.last[which] = now - taken[which]
    served.seconds = time.perf_counter() - start
    return served


def run_in_batches(model: peft.PeftModel, requests: Sequence[Request], rows: int) -> Served:
    """Serves batches of ``rows``, each as long as its longest answer."""
    served = Served()
    start = time.perf_counter()
    ended = [start, start]
    for at in range(0, len(requests), rows):
        batch = requests[at : at + rows]
        longest = max(len(request.input_ids) for request in batch)
        ids = torch.zeros(len(batch), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, request in enumerate(batch):
            ids[row, -len(request.input_ids) :] = torch.tensor(request.input_ids)
            mask[row, -len(request.input_ids) :] = 1
        new = max(request.max_new_tokens for request in batch)
        written = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=new, min_new_tokens=new,
            pad_token_id=0, do_sample=False,
            adapter_names=[request.adapter_name for request in batch],
        )[:, longest:].tolist()  # fmt: skip
        now = time.perf_counter()
        for request, tokens in zip(batch, written, strict=True):
            served.tokens[request.request_id] = tokens[: request.max_new_tokens]
            served.last[request.request_id] = now - ended[-2]
        ended.append(now)
    served.seconds = ended[-1] - start
    return served


def check(base: nn.Module, folder: Path, requests: Sequence[Request], served: Served) -> None:
    """Raises where a request's tokens are not those of a model that has its adapter alone."""
    for request in requests[:CHECKED]:
        model = fastlora.load_adapter(clone(base), folder / str(request.adapter_name))
        ids = torch.tensor([request.input_ids])
        expected = generate_greedily(model, ids, request.max_new_tokens)
        if served.tokens[request.request_id] != expected:
            raise SystemExit(f"request {request.request_id} got other tokens than its adapter's")


def generate_greedily(model: nn.Module, ids: Tensor, count: int) -> list[int]:
    written = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=count,
        min_new_tokens=count, pad_token_id=0, do_sample=False,
    )  # fmt: skip
    return written[0, ids.shape[1] :].tolist()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--adapters", type=int, default=1000)
    parser.add_argument("--resident", type=int, default=64, help="on the device at a time")
    parser.add_argument("--requests", type=int, default=400)
    parser.add_argument("--peft-requests", type=int, default=96, help="of them, for PEFT")
    parser.add_argument("--rows", type=int, default=32, help="in the running batch")
    parser.add_argument("--tokens", type=int, default=64, help="new ones a request, at most")
    parser.add_argument("--zipf", type=float, default=1.0, help="exponent; 0: all alike")
    parser.add_argument("--hidden", type=int, default=FULL.hidden, help="a multiple of 32")
    parser.add_argument("--layers", type=int, default=FULL.layers)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()

    base = make_small_llama(options.hidden, options.layers, VOCABULARY, seed=0).eval()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        names = write_adapters(base, folder, options.adapters)
        server = fastlora.MultiLoRAModel(
            clone(base), max_adapters=options.resident, max_rank=max(RANKS)
        )
        start = time.perf_counter()
        for name in names:
            server.load_adapter(folder / name, name)
        seconds = time.perf_counter() - start
        each = 1e3 * seconds / len(names)
        print(f"{len(names)} adapters loaded in {seconds:.1f} s, {each:.1f} ms each")

        requests = draw_requests(names, options)
        different = {str(request.adapter_name) for request in requests}
        stream(server, requests[: options.rows], options.rows)  # warm
        before = server.bank.stats()
        served = stream(server, requests, options.rows)
        after = server.bank.stats()
        check(base, folder, requests, served)
        print(
            f"{len(requests)} requests for {len(different)} adapters, {options.rows} rows at a time"
        )
        hits, misses = after.hits - before.hits, after.misses - before.misses
        print(
            f"{hits / (hits + misses):.0%} of them found their adapter on the device, which has "
            f"{after.resident} in {after.device_bytes_used / 1e6:.1f} MB; copies in the host's "
            f"memory: {after.copied} in {after.host_bytes_used / 1e6:.0f} MB\n"
        )
        plain = [
            Request(r.input_ids, max_new_tokens=r.max_new_tokens, eos_token_id=(), request_id=i)
            for i, r in enumerate(requests)
        ]
        alone = stream(server, plain, options.rows)
        few = requests[: options.peft_requests]
        theirs = load_peft(clone(base), folder, sorted({str(r.adapter_name) for r in few}))
        batched = run_in_batches(theirs, few, options.rows)
    same = sum(served.tokens[i] == tokens for i, tokens in batched.tokens.items())
    print("                    seconds a request            to its first token")
    print("            tokens/s     p50     p95     p99     p50     p95     p99")
    for name, each in (("fastlora", served), ("base model", alone), ("PEFT", batched)):
        print(each.row(name))
    print(f"\nPEFT wrote the same tokens for {same} of {len(few)} requests")


def load_peft(base: nn.Module, folder: Path, names: Sequence[str]) -> peft.PeftModel:
    first, *others = names
    model = peft.PeftModel.from_pretrained(base, str(folder / first), adapter_name=first)
    for name in others:
        model.load_adapter(str(folder / name), name)
    return model.eval()


if __name__ == "__main__":
    main()
