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
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import ray
import torch
import transformers
from openai_ingress import OpenAI
from pydantic import BaseModel, DirectoryPath, Field, ValidationError
from ray import serve

import fastlora
from fastlora.adapters.files import check_name
from fastlora.serving import Request, Stream

logger = logging.getLogger("ray.serve")


class Settings(BaseModel):
    """Settings of the command line and of ``serve run``."""

    model: DirectoryPath = Field(description="with a model and its tokenizer")
    adapters: DirectoryPath | None = Field(None, description="with a folder for each adapter")
    replicas: int = 2
    cpus: int = Field(1, description="of a replica")
    gpus: float = Field(0, description="of a replica, or what part of one")
    slots: int = Field(8, description="for adapters in a replica")
    rank: int = Field(16, description="the highest of an adapter")
    rows: int = Field(32, description="that a replica runs at a time")
    length: int | None = Field(None, description="tokens of a request, its prompt included")


class Replica:
    """Base model with slots for adapters, and the engine that batches requests."""

    def __init__(self, settings: Settings) -> None:
        torch.set_num_threads(settings.cpus)
        base = transformers.AutoModelForCausalLM.from_pretrained(
            settings.model, local_files_only=True, dtype="auto"
        )
        base.to("cuda" if torch.cuda.is_available() else "cpu").eval()
        ends = base.generation_config.eos_token_id
        self.ends = set(ends) if isinstance(ends, list) else {ends}
        self.server = fastlora.MultiLoRAModel(
            base, max_adapters=settings.slots, max_rank=settings.rank
        )
        self.engine = self.server.engine(max_rows=settings.rows, max_length=settings.length)
        self.name = serve.get_replica_context().replica_id.unique_id
        # A thread for each request that Serve lets in: reading tokens is waiting for them.
        self.readers = ThreadPoolExecutor(2 * settings.rows)

        @serve.multiplexed(max_num_models_per_replica=settings.slots)
        async def load(adapter: str) -> SimpleNamespace:
            try:
                folder = Path(str(settings.adapters), check_name(adapter))
                await asyncio.to_thread(self.server.load_adapter, folder, adapter)
            except (OSError, ValueError) as error:
                raise RuntimeError(f"adapter {adapter} cannot be loaded: {error}") from error
            logger.info(f"loaded {adapter}, has {len(self.server.adapters)}")
            # Serve evicts it by calling __del__: an attribute, not a method, which the garbage
            # collector would call again, perhaps after the adapter has been loaded once more.
            return SimpleNamespace(__del__=partial(self.server.unload_adapter, adapter, wait=True))

        self.load = load

    async def begin(self, ids: list[int], adapter: str | None, settings: dict[str, Any]) -> Stream:
        request = Request(input_ids=ids, adapter_name=adapter, **settings)
        if adapter is not None:
            await self.load(adapter)
        # Nothing is awaited in between, so that nothing is evicted in between.
        return self.engine.submit(request)

    async def complete(
        self, ids: list[int], adapter: str | None, settings: dict[str, Any]
    ) -> AsyncIterator[str | int]:
        """Yields this replica's name as the request begins, its tokens, then why it ended.

        Raises ValueError, before anything was yielded, when the engine refuses the request.
        """
        # Shielded: a client that leaves must not stop a load half-way. Its stream is then dropped,
        # which cancels it.
        handle = await asyncio.shield(asyncio.ensure_future(self.begin(ids, adapter, settings)))
        items: asyncio.Queue[Any] = asyncio.Queue()
        post = partial(asyncio.get_running_loop().call_soon_threadsafe, items.put_nowait)

        def read() -> None:
            count = 0
            try:
                for token in handle:
                    count += 1
                    post(token)
                post(handle.finish_reason)
            except Exception as error:
                post(error)
            logger.info(f"{adapter or 'base'}: {count} tokens, {handle.finish_reason}")

        self.readers.submit(read)
        try:
            yield self.name
            while isinstance(item := await items.get(), int):
                if item not in self.ends:
                    yield item
            if isinstance(item, Exception):
                raise item
            yield item
        finally:
            handle.cancel()  # changes nothing once it has ended

    def __del__(self) -> None:
        if hasattr(self, "engine"):
            self.engine.close()


def application(settings: Settings) -> serve.Application:
    """The replicas and, before them, the HTTP side."""
    model = settings.model.resolve()
    adapters = settings.adapters and settings.adapters.resolve()
    replicas = serve.deployment(
        Replica,
        num_replicas=settings.replicas,
        max_ongoing_requests=2 * settings.rows,
        graceful_shutdown_wait_loop_s=0.1,
        graceful_shutdown_timeout_s=5,
        ray_actor_options={"num_cpus": settings.cpus, "num_gpus": settings.gpus},
    ).bind(settings.model_copy(update={"model": model, "adapters": adapters}))
    return OpenAI.bind(replicas, model, adapters)


def save_demo(folder: Path) -> tuple[str, str]:
    """Saves the demo's model, untrained, and three random adapters; returns their folders."""
    from fastlora.demo.model import make_byte_tokenizer, make_small_llama

    model, adapters, tokenizer = folder / "small-llama", folder / "adapters", make_byte_tokenizer()
    base = make_small_llama(192, 4, len(tokenizer), seed=0)
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
def reserve_port(host: str, port: int) -> Iterator[int]:
    """Reserves that port, or a free one for 0, so that from here on only Serve listens on it.

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
def run_ray(cpus: int, folder: str) -> Iterator[None]:
    """Runs a Ray on this machine alone, with its files in ``folder``; closes it in the end."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex())  # or it leaves one in the home
    ray.init(
        "local",
        num_cpus=cpus,
        object_store_memory=100 << 20,  # little passes through it
        include_dashboard=False,
        _node_ip_address="127.0.0.1",
        _temp_dir=folder,
    )
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    try:
        yield
    finally:
        started = psutil.Process().children(recursive=True)
        serve.shutdown()
        ray.shutdown()
        # Ray gives its own processes a second; those that they have started may stay for a minute.
        for process in psutil.wait_procs(started, timeout=5)[1]:
            process.kill()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    for name, field in Settings.model_fields.items():
        parser.add_argument(f"--{name}", help=field.description, default=argparse.SUPPRESS)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000, help="0: any that is free")
    options = vars(parser.parse_args(argv))
    host, port = options.pop("host"), options.pop("port")
    with (
        tempfile.TemporaryDirectory(prefix="fastlora-") as folder,
        reserve_port(host, port) as port,
    ):
        if "model" not in options:
            options["model"], options["adapters"] = save_demo(Path(folder))
        try:
            settings = Settings.model_validate(options)
        except ValidationError as error:
            parser.error(str(error))
        with run_ray(settings.replicas * settings.cpus, folder), suppress(KeyboardInterrupt):
            serve.start(http_options={"host": host, "port": port})
            serve.run(application(settings))
            print(f"{settings.model.name} is served at http://{host}:{port}/v1", flush=True)
            threading.Event().wait()


if __name__ == "__main__":
    main()
