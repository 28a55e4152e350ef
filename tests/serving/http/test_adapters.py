"""Adapters come and go while the server runs, behind the admin's key."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from fastlora.serving.http.keys import read_keys
from tests.support.serving.http_server import NAMES, PROMPT, Answer, running, save_adapters

ADMIN = "administer-" * 3


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Any]:
    save_adapters(tmp_path / "adapters")
    shutil.copytree(tmp_path / "adapters" / "alice", tmp_path / "outside")
    with running(tmp_path / "adapters", read_keys(None, {"FASTLORA_ADMIN_KEY": ADMIN})) as server:
        yield server


def change(server: Any, what: str, **body: Any) -> Answer:
    return server.ask(f"/v1/{what}_lora_adapter", body, Authorization=f"Bearer {ADMIN}")


def tokens(server: Any, model: str) -> list[int]:
    return server.complete(model).body["choices"][0]["token_ids"]


def test_loaded_adapter_is_served_and_unloaded_one_is_not(server):
    shutil.copytree(server.folder / "bob", server.folder / "new")
    assert server.complete("new").status == 404
    assert change(server, "load", lora_name="new", lora_path="new").status == 200
    assert tokens(server, "new") == server.expected("bob", PROMPT, 8)
    assert "new" in server.ask("/v1/models").text
    assert change(server, "unload", lora_name="new").status == 200
    assert server.complete("new").status == 404
    assert change(server, "unload", lora_name="new").status == 404
    assert change(server, "load", lora_name="new", lora_path="carol").status == 200
    assert tokens(server, "new") == server.expected("carol", PROMPT, 8)


def test_known_adapter_is_replaced_only_when_asked_to(server):
    refused = change(server, "load", lora_name="alice", lora_path="bob")
    assert (refused.status, refused.error["param"]) == (400, "lora_name")
    assert tokens(server, "alice") == server.expected("alice", PROMPT, 8)
    body = {"lora_name": "alice", "lora_path": "bob", "load_inplace": True}
    assert change(server, "load", **body).status == 200
    assert tokens(server, "alice") == server.expected("bob", PROMPT, 8)


@pytest.mark.parametrize("path", ["../outside", "/etc", "..", "link", "absent", "", "alice/../bob"])
def test_path_that_is_no_name_in_the_folder_is_refused(server, path):
    (server.folder / "link").symlink_to(server.folder.parent / "outside")
    answer = change(server, "load", lora_name="new", lora_path=path)
    assert (answer.status, answer.error["param"]) == (400, "lora_path")
    assert server.complete("new").status == 404


def test_name_of_the_base_and_odd_names_are_refused(server):
    for name in ("tiny", "a b", "", "a:b", "__base__"):
        answer = change(server, "load", lora_name=name, lora_path="alice")
        assert answer.status == 400, name


def test_adapters_are_loaded_at_first_use_and_once(server, monkeypatch):
    assert server.service.adapters._loaded == set()
    reads, read = [], server.service.adapters._read
    monkeypatch.setattr(
        server.service.adapters, "_read", lambda *args: (reads.append(args[0]), read(*args))
    )
    with ThreadPoolExecutor(8) as threads:
        answers = [*threads.map(lambda _: tokens(server, "alice"), range(8))]
    assert answers == [server.expected("alice", PROMPT, 8)] * 8
    assert reads == ["alice"]


def test_running_request_keeps_an_adapter_that_is_unloaded(server):
    with ThreadPoolExecutor(1) as threads:
        tokens(server, "alice")
        asked = threads.submit(server.complete, "alice", max_tokens=300)
        while not server.service.engine._loop.scheduler.running:
            pass
        assert change(server, "unload", lora_name="alice").status == 200
        assert server.complete("alice").status == 404
        answer = asked.result()
    assert answer.body["choices"][0]["token_ids"] == server.expected("alice", PROMPT, 300)


def test_more_adapters_than_slots_are_served_by_turns(server):
    for name in NAMES * 2:
        assert tokens(server, name) == server.expected(name, PROMPT, 8)
    assert server.service.adapters._server.bank.stats().evictions


def test_preload_loads_all_or_names_the_broken_one(server):
    adapters = server.service.adapters
    adapters.preload()
    assert adapters._loaded == set(NAMES)
    adapters._folders["gone"] = "gone"
    with pytest.raises(ValueError, match="adapter 'gone' cannot be loaded"):
        adapters.preload()
