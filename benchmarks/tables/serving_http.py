"""Measures what HTTP costs: the engine's tokens a second in process and over loopback, interleaved.

    python -m benchmarks.tables.serving_http [--rounds 5] [--streams 32] [--tokens 64]

One server process holds an untrained Llama and an adapter for each stream. The client is another
process with all streams in one event loop. Both write the same: prompts of 32 tokens, greedily, no
end before the last token. A round is one run of each; printed are medians over the rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

PROMPT = 32


async def _stream(port: int, adapter: str, tokens: int) -> tuple[float, int]:
    """Reads one stream; returns seconds to its first token, and how many there were."""
    body = {"model": adapter, "prompt": list(range(1, PROMPT + 1)), "max_tokens": tokens}
    body |= {"temperature": 0, "stream": True, "ignore_eos": True}
    data = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n"
    began, first, count = time.perf_counter(), 0.0, 0
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(head.encode() + b"Content-Type: application/json\r\n\r\n" + data)
    async for line in reader:
        if not line.startswith(b"data: "):
            continue
        if line == b"data: [DONE]\n":
            break
        first = first or time.perf_counter() - began
        count += sum(len(choice["token_ids"]) for choice in json.loads(line[6:])["choices"])
    writer.close()
    return first, count


async def _run_client(port: int, streams: int, tokens: int) -> dict[str, Any]:
    began = time.perf_counter()
    work = (_stream(port, f"a{i}", tokens) for i in range(streams))
    found = await asyncio.gather(*work)
    seconds = time.perf_counter() - began
    assert all(count == tokens for _, count in found), found
    return {"rate": streams * tokens / seconds, "first": [first for first, _ in found]}


def _make_service(options: argparse.Namespace, folder: Path) -> Any:
    """Makes the service, its adapters saved under ``folder`` and loaded."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import fastlora
    from fastlora.demo.model import make_byte_tokenizer
    from fastlora.serving.http.folder import Folder
    from fastlora.serving.http.keys import Keys
    from fastlora.serving.http.service import Service
    from fastlora.serving.http.settings import Settings

    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": options.hidden,
        "intermediate_size": options.hidden * 8 // 3,
        "num_hidden_layers": options.layers,
        "num_attention_heads": options.hidden // 64,
        "vocab_size": 32000,
    }
    model: Any = LlamaForCausalLM(LlamaConfig(**sizes)).to(torch.bfloat16).eval()
    config = fastlora.LoRAConfig(r=16, target_modules="all-linear", init_lora_weights=False)
    adapted = fastlora.replace_linear(LlamaForCausalLM(LlamaConfig(**sizes)), config)
    for i in range(options.streams):
        fastlora.save_adapter(adapted.to(torch.bfloat16), folder / f"a{i}")
    del adapted
    server = fastlora.MultiLoRAModel(model, max_adapters=options.streams, max_rank=16)
    sizes = {"max_rows": options.streams, "max_length": PROMPT + options.tokens}
    settings = Settings(name="base")
    service = Service(server, make_byte_tokenizer(), Folder(folder), settings, Keys(), **sizes)
    service.adapters.preload()
    return service


def _run_in_process(service: Any, streams: int, tokens: int) -> float:
    """Returns tokens a second of the engine alone, read from its own streams."""
    from fastlora.serving import Request

    began = time.perf_counter()
    handles = [
        service.engine.submit(
            Request(range(1, PROMPT + 1), f"a{i}", max_new_tokens=tokens, eos_token_id=())
        )
        for i in range(streams)
    ]
    count = sum(len(handle.result()) for handle in handles)
    return count / (time.perf_counter() - began)


def _run_over_loopback(port: int, options: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.tables.serving_http", "--client", str(port)]
    command += [f"--streams={options.streams}", f"--tokens={options.tokens}"]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def _name_cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "an unknown CPU"
    return next((line.split(":")[1].strip() for line in lines if "model name" in line), "unknown")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    sizes = {"rounds": 5, "streams": 32, "tokens": 64, "hidden": 1024, "layers": 6}
    for name, value in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--client", type=int, metavar="PORT", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.client is not None:
        print(json.dumps(asyncio.run(_run_client(options.client, options.streams, options.tokens))))
        return
    import torch

    from fastlora.serving.http.server import Server, listen

    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        service = _make_service(options, Path(folder))
        listener, ready = listen("127.0.0.1", 0), threading.Event()
        port = listener.getsockname()[1]
        server = Server(service, listener, ready.set)
        thread = threading.Thread(target=server.run_until_stopped)
        thread.start()
        try:
            ready.wait()
            report(service, port, options)
        finally:
            server.stop()
            thread.join()


def report(service: Any, port: int, options: argparse.Namespace) -> None:
    """Runs the rounds, after one that is not counted, and prints what they took."""
    own, http, first = [], [], []
    for number in range(options.rounds + 1):
        rate = _run_in_process(service, options.streams, options.tokens)
        found = _run_over_loopback(port, options)
        if number:
            own.append(rate)
            http.append(found["rate"])
            first += found["first"]
            over = f"{found['rate']:.0f} over loopback"
            print(f"round {number}: {rate:.0f} in process, {over}", flush=True)
    ratios = [h / o for h, o in zip(http, own, strict=True)]
    cuts = statistics.quantiles(first, n=100)
    print(f"{_name_cpu()}, {options.threads} threads, {options.streams} streams")
    rates = f"{statistics.median(own):.0f}, over loopback {statistics.median(http):.0f}"
    print(f"tokens/s in process {rates}")
    spread = f"{min(ratios):.3f} to {max(ratios):.3f}"
    print(f"ratio, median of {len(ratios)}: {statistics.median(ratios):.3f} ({spread})")
    print(f"time to first token: p50 {cuts[49] * 1e3:.0f} ms, p99 {cuts[98] * 1e3:.0f} ms")


if __name__ == "__main__":
    main()
