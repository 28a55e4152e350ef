"""Many adapters served over HTTP by Ray Serve, in OpenAI's format.

A request's `model` is "<base>:<adapter>", or "<base>" for the base model. Every replica holds the
base and a few adapters, and runs any mix of them in one batch; Serve prefers a replica that has the
request's adapter loaded. Without --model: a small untrained Llama and three random adapters.

    python examples/serve_ray.py [--model DIR --adapters DIR] [--replicas 2] [--port 8000]
    curl localhost:8000/v1/completions -H "content-type: application/json" \
        -d '{"model": "small-llama:alice", "prompt": "Once", "max_tokens": 8, "stream": true}'

The folder of adapters has one in it for each, named as the adapter, with PEFT's files.
"""

import argparse
import asyncio
import copy
import logging
import os
import secrets
import signal
import socket
import tempfile
import threading
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ray
import torch
import transformers
from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response, StreamingResponse
from openai_format import Completion, Refused, Text, choice, describe_errors, server_sent
from ray import serve
from ray.serve.handle import DeploymentHandle

import fastlora
from fastlora.adapter_files import CONFIG_NAME, check_name
from fastlora.demo.model import byte_tokenizer, small_llama
from fastlora.serving import Request

# This file has no deferred annotations: FastAPI cannot resolve those of a class that Ray pickles.
logger = logging.getLogger("ray.serve")
app = describe_errors(FastAPI())


class Replica:
    """The base model with slots for adapters, and the engine that batches what is asked of it."""

    def __init__(self, model: str, adapters: str | None, slots: int, rank: int, rows: int) -> None:
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))  # the CPUs Ray gave it
        base = transformers.AutoModelForCausalLM.from_pretrained(
            model, local_files_only=True, dtype="auto"
        )
        base.to("cuda" if torch.cuda.is_available() else "cpu").eval()
        ends = base.generation_config.eos_token_id
        self.ends = set(ends) if isinstance(ends, list) else {ends}
        self.server = fastlora.MultiLoRAModel(base, max_adapters=slots, max_rank=rank)
        self.engine = self.server.engine(max_rows=rows)
        self.name = serve.get_replica_context().replica_id.unique_id
        # One for each request that Serve lets in; what they do is wait for tokens.
        self.threads = ThreadPoolExecutor(2 * rows)

        @serve.multiplexed(max_num_models_per_replica=slots)
        async def load(adapter: str) -> SimpleNamespace:
            try:
                folder = Path(str(adapters), check_name(adapter))
                await asyncio.to_thread(self.server.load_adapter, folder, adapter)
            except (OSError, ValueError) as error:
                raise RuntimeError(f"adapter {adapter} cannot be loaded: {error}") from error
            # Serve evicts it by calling __del__: an attribute, not a method, which the garbage
            # collector would call again, perhaps after the adapter has been loaded once more.
            return SimpleNamespace(__del__=partial(self.server.unload_adapter, adapter, wait=True))

        self.load = load

    async def complete(
        self, ids: list[int], adapter: str | None, how: dict[str, Any]
    ) -> AsyncIterator[str | int]:
        """Yields this replica's name as the request begins, its tokens, then why it ended.

        Raises ValueError, before anything was yielded, when the engine refuses the request.
        """
        if adapter is not None:
            # Shielded: a client that leaves must not stop a load half-way.
            await asyncio.shield(asyncio.ensure_future(self.load(adapter)))
        # Nothing is awaited between the two, so that nothing can be evicted in between.
        handle = self.engine.submit(Request(input_ids=ids, adapter_name=adapter, **how))
        loop, tokens, count = asyncio.get_running_loop(), iter(handle), 0
        try:
            yield self.name
            while (
                token := await loop.run_in_executor(self.threads, next, tokens, None)
            ) is not None:
                count += 1
                if token not in self.ends:
                    yield token
            yield handle.finish_reason
        finally:
            handle.cancel()  # changes nothing once it has ended
            logger.info(f"{adapter or 'base'}: {count} tokens, {handle.finish_reason}")

    def __del__(self) -> None:
        if hasattr(self, "engine"):
            self.engine.close()


@serve.deployment(
    max_ongoing_requests=1000,
    graceful_shutdown_wait_loop_s=0.1,
    ray_actor_options={"num_cpus": 0},
)
@serve.ingress(app)
class OpenAI:
    """Reads requests, sends each where its adapter is, and writes what comes back."""

    def __init__(
        self, replicas: DeploymentHandle, base: str, model: str, adapters: str | None
    ) -> None:
        self.replicas, self.base = replicas, base
        self.folder = None if adapters is None else Path(adapters)
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(model, local_files_only=True)
        self.config = transformers.AutoConfig.from_pretrained(model, local_files_only=True)

    @app.get("/v1/models")
    def models(self) -> dict[str, Any]:
        names = sorted(entry.name for entry in self.folder.iterdir()) if self.folder else []
        served = [self.base, *(f"{self.base}:{name}" for name in names if self.has(name))]
        card = {"object": "model", "created": 0, "owned_by": "fastlora"}
        return {"object": "list", "data": [{"id": name, **card} for name in served]}

    @app.post("/v1/completions")
    async def completions(self, asked: Completion) -> Response:
        adapter, ids = self.adapter(asked.model), self.prompt(asked)
        choices = self.choices(ids, adapter, asked.how())
        try:
            replica = await anext(choices)
        except ValueError as error:
            raise Refused(400, None, str(error)) from error
        head = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": asked.model,
        }
        headers = {"X-Replica": replica}
        if asked.stream:
            events = server_sent(head, choices)
            return StreamingResponse(events, media_type="text/event-stream", headers=headers)
        parts = [part async for part in choices]
        tokens = [token for part in parts for token in part["token_ids"]]
        text = "".join(part["text"] for part in parts)
        usage = {"prompt_tokens": len(ids), "completion_tokens": len(tokens)}
        usage["total_tokens"] = len(ids) + len(tokens)
        whole = [choice(text, tokens, parts[-1]["finish_reason"])]
        return JSONResponse(head | {"choices": whole, "usage": usage}, headers=headers)

    async def choices(
        self, ids: list[int], adapter: str | None, how: dict[str, Any]
    ) -> AsyncGenerator[Any]:
        """Yields the replica's name as the request begins, then a choice for each token."""
        replicas = self.replicas.options(multiplexed_model_id=adapter or "", stream=True)
        answer, text = replicas.complete.remote(ids, adapter, how), Text(self.tokenizer)
        try:
            yield await anext(answer)
            async for item in answer:
                if isinstance(item, int):
                    yield choice(text.add([item]), [item])
                else:
                    yield choice(text.add([], last=True), [], item)
        finally:
            answer.cancel()  # whoever asked may have left

    def adapter(self, model: str) -> str | None:
        """The adapter that ``model`` names, None for the base."""
        if model == self.base:
            return None
        name = model.removeprefix(f"{self.base}:")
        if name == model or not self.has(name):
            raise Refused(404, "model", f"there is no {model!r}; GET /v1/models lists them")
        return name

    def has(self, name: str) -> bool:
        """Whether the folder has that adapter; what is no name of an adapter is never a path."""
        try:
            check_name(name)
        except ValueError:
            return False
        return self.folder is not None and (self.folder / name / CONFIG_NAME).is_file()

    def prompt(self, asked: Completion) -> list[int]:
        """The prompt's tokens, which the model knows and has room for."""
        ids = asked.prompt
        ids = self.tokenizer(ids)["input_ids"] if isinstance(ids, str) else ids
        size, room = self.config.vocab_size, self.config.max_position_embeddings
        if not ids or not all(0 <= i < size for i in ids):
            raise Refused(400, "prompt", f"expected one or more tokens from 0 to {size - 1}")
        if len(ids) + asked.max_tokens > room:
            left = f"{room} less the prompt's {len(ids)}"
            raise Refused(400, "max_tokens", f"expected at most {left}, got {asked.max_tokens}")
        return ids


def demo(folder: Path) -> tuple[str, str]:
    """The library demo's model, untrained, and three random adapters; where they were saved."""
    model, adapters, tokenizer = folder / "small-llama", folder / "adapters", byte_tokenizer()
    base = small_llama(192, 4, len(tokenizer), seed=0)
    base.save_pretrained(model)
    tokenizer.save_pretrained(model)
    config = fastlora.LoRAConfig(r=8, target_modules="all-linear")
    for name in ("alice", "bob", "carol"):
        adapted = fastlora.replace_linear(copy.deepcopy(base), config)
        for parameter in adapted.parameters():
            if parameter.requires_grad:  # the adapter's
                torch.nn.init.normal_(parameter, std=0.1)
        fastlora.save_adapter(adapted, adapters / name)
    return str(model), str(adapters)


@contextmanager
def reserved(host: str, port: int) -> Iterator[int]:
    """That port, or a free one for 0, which from here on only Serve can listen on.

    Raises OSError when something listens on it. Serve's proxies share ports (SO_REUSEPORT), so
    that nothing would tell two servers on one apart.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((host, port))
        port = probe.getsockname()[1]
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        held.bind((host, port))
        yield port


@contextmanager
def running_ray(address: str, cpus: int, folder: Path) -> Iterator[None]:
    """Ray at ``address``, or one of our own for "local": its files in ``folder``, on loopback."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    own = {}
    if address == "local":
        # A token of its own, or Ray would leave one in the home folder.
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex())
        own = {
            "num_cpus": cpus,
            "object_store_memory": 100 << 20,  # little passes through it
            "include_dashboard": False,
            "_node_ip_address": "127.0.0.1",
            "_temp_dir": str(folder / "ray"),
        }
    ray.init(address, **own)
    try:
        yield
    finally:
        serve.shutdown()
        ray.shutdown()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", help="a directory with a model and its tokenizer")
    parser.add_argument("--adapters", help="a directory with a directory for each adapter")
    parser.add_argument("--name", help="of the base model in requests; default: its directory's")
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--cpus", type=int, default=1, help="of a replica")
    parser.add_argument("--gpus", type=float, default=0, help="of a replica, or a part of one")
    parser.add_argument("--slots", type=int, default=8, help="for adapters in a replica")
    parser.add_argument("--rank", type=int, default=16, help="the highest of an adapter")
    parser.add_argument("--rows", type=int, default=32, help="that a replica runs at a time")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000, help="0: any that is free")
    parser.add_argument(
        "--address", default="local", help="of a running Ray, which may be many machines"
    )
    options = parser.parse_args(argv)
    if options.adapters and not options.model:
        parser.error("--adapters: expected --model with it")

    with (
        tempfile.TemporaryDirectory(prefix="fastlora-") as folder,
        reserved(options.host, options.port) as port,
    ):
        model, adapters = options.model, options.adapters
        if model is None:
            model, adapters = demo(Path(folder))
        name = options.name or Path(model).resolve().name
        with running_ray(options.address, options.replicas * options.cpus, Path(folder)):
            signal.signal(signal.SIGTERM, signal.default_int_handler)  # stops as Ctrl-C does
            try:
                serve.start(http_options={"host": options.host, "port": port})
                replicas = serve.deployment(
                    Replica,
                    num_replicas=options.replicas,
                    max_ongoing_requests=2 * options.rows,
                    graceful_shutdown_wait_loop_s=0.1,
                    graceful_shutdown_timeout_s=5,
                    ray_actor_options={"num_cpus": options.cpus, "num_gpus": options.gpus},
                ).bind(model, adapters, options.slots, options.rank, options.rows)
                serve.run(OpenAI.bind(replicas, name, model, adapters))
                print(f"{name} is served at http://{options.host}:{port}/v1", flush=True)
                threading.Event().wait()
            except KeyboardInterrupt:
                print("stopping", flush=True)


if __name__ == "__main__":
    main()
