"""vLLM in its own processes: its server over HTTP, and many starts."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import openai
import pytest
import torch

from tests.integrations.vllm_engine.conftest import make_prompts
from tests.integrations.vllm_engine.engine import Engine, environment
from tests.integrations.vllm_engine.test_numbers import SLACK

STARTS = 20


def find_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture(scope="module")
def client(world) -> Iterator[openai.OpenAI]:
    """Of ``vllm serve`` with two adapters by name, on the loopback interface."""
    port, log = find_port(), world.folder / "server.log"
    modules = [f"{name}={path}" for name, path in zip("ab", world.adapters, strict=False)]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", str(world.model), "--served-model-name", "base", "--enforce-eager"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"]
    command += ["--enable-lora", "--max-loras", "2", "--max-lora-rank", "16"]
    command += ["--lora-modules", *modules, "--max-model-len", "128"]
    with log.open("w") as file:
        server = subprocess.Popen(
            command, stdout=file, stderr=file, env=environment(), cwd=world.folder
        )
    try:
        wait_for(f"http://127.0.0.1:{port}/health", server, log)
        yield openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")
        assert "Using PunicaWrapperFastLoRA" in log.read_text()
    finally:
        server.terminate()
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            server.kill()


def wait_for(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + 120
    while time.monotonic() < end and server.poll() is None:
        with suppress(OSError), urllib.request.urlopen(url, timeout=5):
            return
        time.sleep(0.5)
    raise AssertionError(log.read_text()[-3000:])


def test_model_field_names_the_adapter(client, world, exact):
    adapters = {"base": None, "a": world.adapters[0], "b": world.adapters[1]}
    for name, prompt in zip(adapters, make_prompts(3), strict=True):
        done = client.completions.create(
            model=name, prompt=prompt, max_tokens=5, temperature=0, logprobs=0,
            extra_body={"ignore_eos": True, "return_token_ids": True},
        )  # fmt: skip
        tokens = done.choices[0].token_ids
        want = exact(adapters[name], prompt + tokens)[len(prompt) - 1 :]
        got = torch.tensor(done.choices[0].logprobs.token_logprobs)
        expected = want[torch.arange(5), torch.tensor(tokens)]
        assert float((got - expected).abs().max()) <= SLACK[torch.float32]
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="c", prompt="w5", max_tokens=1)


def test_engine_starts_many_times_in_processes_of_its_own(world, exact, tmp_path):
    """vLLM's engine and worker load the plug-in each; every start answers with the adapter."""
    prompt, adapter = make_prompts(1), world.adapters[0]
    how = {"dtype": "float32", "max_loras": 1, "max_lora_rank": 16, "apart": True}
    for start in range(STARTS):
        engine = Engine(world.model, tmp_path / f"log{start}", **how)
        try:
            answer = engine.generate(prompt, [adapter], max_tokens=2)[0]
        finally:
            engine.close()
        want = exact(adapter, prompt[0] + answer["tokens"])[len(prompt[0]) - 1 :]
        got = torch.tensor(answer["logprobs"])
        expected = want[torch.arange(2), torch.tensor(answer["tokens"])]
        assert float((got - expected).abs().max()) <= SLACK[torch.float32], start
        assert "Using PunicaWrapperFastLoRA" in engine.log.read_text()
