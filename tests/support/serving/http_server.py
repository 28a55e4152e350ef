"""A tiny model with adapters behind a real HTTP server in a thread, and what each writes alone."""

from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

import fastlora
from fastlora import LoRAConfig, MultiLoRAModel
from fastlora.demo.model import make_byte_tokenizer
from fastlora.serving.http.folder import Folder
from fastlora.serving.http.keys import Keys
from fastlora.serving.http.server import Server, listen
from fastlora.serving.http.service import Service
from fastlora.serving.http.settings import Settings
from tests.support.models import llama, randomise_lora

NAMES = ("alice", "bob", "carol")
PATIENCE = 60.0
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'developer' %}{{ raise_exception('no developers') }}"
    "{% endif %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
)


def tokenizer() -> Any:
    made = make_byte_tokenizer()
    made.chat_template = TEMPLATE
    return made


VOCABULARY = len(tokenizer())


def base(**options: Any) -> Any:
    return llama(vocab_size=VOCABULARY, max_position_embeddings=4096, **options)


def save_adapters(folder: Path, names: tuple[str, ...] = NAMES) -> None:
    for seed, name in enumerate(names):
        torch.manual_seed(seed)
        config = LoRAConfig(r=4, target_modules="all-linear")
        adapted = randomise_lora(fastlora.replace_linear(base(), config), 0.5)
        fastlora.save_adapter(adapted, folder / name)


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    text: str

    @property
    def body(self) -> Any:
        return json.loads(self.text)

    @property
    def error(self) -> dict[str, Any]:
        return self.body["error"]

    @property
    def events(self) -> list[Any]:
        """Of a stream, without its last one."""
        *events, last, nothing = self.text.split("\n\n")
        assert (last, nothing) == ("data: [DONE]", ""), self.text
        return [json.loads(event.removeprefix("data: ")) for event in events]


class Running(NamedTuple):
    """A running server. local: the same model and adapters, called directly."""

    service: Service
    server: Server
    port: int
    folder: Path
    local: MultiLoRAModel

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)

    def ask(self, path: str, body: Any = None, method: str | None = None, **headers: str) -> Answer:
        data = body if isinstance(body, (str, bytes, type(None))) else json.dumps(body)
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        if data is not None:
            named = {"Content-Type": "application/json"} | named
        with closing(self.connect()) as connection:
            connection.request(method or ("GET" if data is None else "POST"), path, data, named)
            response = connection.getresponse()
            said = {name.lower(): value for name, value in response.getheaders()}
            return Answer(response.status, said, response.read().decode())

    def complete(self, model: str, **fields: Any) -> Answer:
        return self.ask("/v1/completions", completion(model, **fields))

    def expected(self, adapter: str | None, prompt: list[int], new: int) -> list[int]:
        ids = torch.tensor([prompt])
        settings: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        whole = self.local.generate(ids, adapter_names=[adapter], max_new_tokens=new, **settings)
        return whole[0, len(prompt) :].tolist()


PROMPT = list(b"Once upon")


def completion(model: str, **fields: Any) -> dict[str, Any]:
    usual = {"model": model, "prompt": PROMPT, "max_tokens": 8, "temperature": 0}
    return usual | fields


@contextmanager
def running(
    folder: Path, keys: Keys | None = None, rows: int = 4, length: int = 1024, **settings: Any
) -> Iterator[Running]:
    """Serves the adapters in ``folder``, loaded when they are first used, until the block ends."""
    served = MultiLoRAModel(base(), max_adapters=2, max_rank=4)
    local = MultiLoRAModel(base(), max_adapters=8, max_rank=4)
    for name in NAMES:
        local.load_adapter(folder / name, name)
    allowed = Settings(**{"name": "tiny", "grace": 5.0} | settings)
    options = {"max_rows": rows, "max_length": length}
    service = Service(served, tokenizer(), Folder(folder), allowed, keys or Keys(), **options)
    listener = listen("127.0.0.1", 0)
    ready = threading.Event()
    server = Server(service, listener, ready.set)
    port = listener.getsockname()[1]
    thread = threading.Thread(target=server.run_until_stopped, name="served")
    thread.start()
    try:
        assert ready.wait(PATIENCE)
        yield Running(service, server, port, folder, local)
    finally:
        if thread.is_alive():
            server.stop()
            server.stop()
        thread.join(PATIENCE)
        assert not thread.is_alive()
