"""A small model with adapters and a running examples/serve_ray.py, for its tests."""

from __future__ import annotations

import copy
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import fastlora
from fastlora.demo.model import make_byte_tokenizer

ROOT = Path(__file__).resolve().parents[2]
NAMES = ["alice", "bob", "carol", "dave", "eve"]  # more than the slots of both replicas
SPARE = [f"spare{i}" for i in range(6)]  # each for one test alone
SLOTS, ROWS, ROOM = 2, 4, 20_000
PROMPT, NEW, SHORT = list(b"Once upon a time"), 24, 6
PATIENCE = 300  # seconds: how long something may take before it counts as hung
MARK = "FASTLORA_TEST_RUN"
TOKENIZER = make_byte_tokenizer()
END = len(TOKENIZER)


class Answer(NamedTuple):
    status: int
    replica: str | None
    body: dict[str, Any]

    @property
    def tokens(self) -> list[int]:
        return self.body["choices"][0]["token_ids"]

    @property
    def ended(self) -> str:
        return self.body["choices"][0]["finish_reason"]


class Server(NamedTuple):
    """A running server, and ``local``: the same model and adapters in this process."""

    process: subprocess.Popen[bytes]
    log: Path
    port: int
    mark: str  # in the environment of every process that it has started
    temporary: Path  # for all its files
    local: fastlora.MultiLoRAModel

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)

    def post(self, body: Any) -> Answer:
        with closing(self.connect()) as connection:
            send(connection, body)
            response = connection.getresponse()
            replica = response.getheader("X-Replica")
            return Answer(response.status, replica, json.loads(response.read()))

    def greedy(self, adapter: str | None, **more: Any) -> Answer:
        return self.post(completion_request(adapter) | more)

    def expected(
        self, adapter: str | None, prompt: list[int] = PROMPT, new: int = NEW
    ) -> tuple[list[int], str]:
        """What ``generate`` makes of it: tokens without the one that ends them, why they end."""
        ids = torch.tensor([prompt])
        out = self.local.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            adapter_names=[adapter],
            max_new_tokens=new,
            do_sample=False,
        )
        tokens = out[0, len(prompt) :].tolist()
        return (tokens[:-1], "stop") if tokens[-1] == END else (tokens, "length")


def completion_request(adapter: str | None) -> dict[str, Any]:
    model = "small" if adapter is None else f"small:{adapter}"
    return {"model": model, "prompt": PROMPT, "max_tokens": NEW, "temperature": 0}


def send(connection: http.client.HTTPConnection, body: Any) -> None:
    text = body if isinstance(body, str) else json.dumps(body)
    connection.request("POST", "/v1/completions", text, {"Content-Type": "application/json"})


@torch.no_grad()
def save_all(folder: Path) -> fastlora.MultiLoRAModel:
    """A small model and adapters that differ much, saved; all of them served in this process."""
    torch.manual_seed(0)
    settings = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=END + 1,
        max_position_embeddings=2 * ROOM,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=END,
        pad_token_id=0,
    )
    base = LlamaForCausalLM(settings).eval()
    local = fastlora.MultiLoRAModel(copy.deepcopy(base), len(NAMES + SPARE), max_rank=4)
    config = fastlora.LoRAConfig(r=4, target_modules="all-linear")
    adapted = fastlora.replace_linear(copy.deepcopy(base), config)
    for name in [*NAMES, *SPARE]:
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.3)
        fastlora.save_adapter(adapted, folder / "adapters" / name)
        local.load_adapter(folder / "adapters" / name, adapter_name=name)
    (folder / "adapters" / "notes").mkdir()
    (folder / "adapters" / "broken").mkdir()
    (folder / "adapters" / "broken" / "adapter_config.json").write_text("{}")

    # What carol comes to after SHORT tokens is what END looks like: she stops, others go on.
    ids = torch.tensor([PROMPT])
    ids = local.generate(ids, adapter_names=["carol"], max_new_tokens=SHORT, do_sample=False)
    said = local(ids, adapter_names=["carol"], output_hidden_states=True)
    state = said.hidden_states[-1][0, -1]
    for model in (base, local.model):
        model.lm_head.weight[END] = 1.3 * said.logits[0, -1].max() / state.dot(state) * state
    base.save_pretrained(folder / "small")
    TOKENIZER.save_pretrained(folder / "small")
    return local


def wait_for(ready: Callable[[], Any], log: Path) -> Any:
    """What ``ready`` returns, as soon as that is true; the log if it never is."""
    deadline = time.monotonic() + PATIENCE
    while not (found := ready()):
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)
    return found


@contextmanager
def running_server(folder: Path) -> Iterator[Server]:
    """examples/serve_ray.py with two replicas, on a free port, its log in ``folder``."""
    local, log, mark = save_all(folder), folder / "log", uuid.uuid4().hex
    command = [sys.executable, str(ROOT / "examples" / "serve_ray.py"), "--port=0"]
    command += [f"--model={folder / 'small'}", f"--adapters={folder / 'adapters'}"]
    command += ["--replicas=2", f"--slots={SLOTS}", "--rank=4"]
    command += [f"--rows={ROWS}", f"--length={ROOM}"]
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": "", MARK: mark}
    environment["RAY_DEDUP_LOGS"] = "0"  # or lines that resemble each other are held back
    # Ray's sockets need a short path.
    with tempfile.TemporaryDirectory(dir="/tmp") as temporary, log.open("w") as out:
        environment["TMPDIR"] = temporary
        process = subprocess.Popen(command, env=environment, stdout=out, stderr=out)

        def port() -> str | None:
            assert process.poll() is None, log.read_text()
            said = re.search(r"small is served at http://127.0.0.1:(\d+)/v1", log.read_text())
            return said and said[1]

        try:
            at = int(wait_for(port, log))
            yield Server(process, log, at, mark, Path(temporary), local)
        finally:
            stop(process)
            for left in processes_with(mark):
                with suppress(ProcessLookupError):
                    os.kill(left, signal.SIGKILL)


def stop(process: subprocess.Popen) -> int:
    """Asks it to stop, which closes Ray; its exit code."""
    process.terminate()
    try:
        return process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def processes_with(mark: str) -> list[int]:
    """Processes, by number, that have inherited the mark; none where there is no /proc."""
    wanted = f"{MARK}={mark}".encode()
    folders = [folder for folder in Path("/proc").glob("[0-9]*") if wanted in _environ(folder)]
    return [int(folder.name) for folder in folders]


def _environ(folder: Path) -> bytes:
    try:
        return (folder / "environ").read_bytes()
    except OSError:  # it has ended meanwhile, or is another user's
        return b""
