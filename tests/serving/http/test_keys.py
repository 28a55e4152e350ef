"""Keys: files that others could read are refused, and a key is good for its own adapters alone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fastlora.serving.http.keys import Keys, read_keys
from fastlora.serving.http.refusals import Refused
from fastlora.serving.http.server import check_address, is_loopback
from tests.support.serving.http_server import running

ALICE, ALL, ADMIN = "alice-" * 4, "everything-" * 3, "administer-" * 3
FILE = {
    "admin": ADMIN,
    "keys": [{"key": ALICE, "adapters": ["alice"]}, {"key": ALL, "adapters": "*"}],
}


def write(path: Path, content: Any = FILE, mode: int = 0o600) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    path.chmod(mode)
    return path


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@pytest.fixture(scope="module")
def locked(adapters: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    path = write(tmp_path_factory.mktemp("keys") / "keys.json")
    with running(adapters, read_keys(path, {}), under_way_per_key=2) as server:
        yield server


def complete(server: Any, model: str, key: str, **fields: Any) -> Any:
    body = {"model": model, "prompt": [1], "max_tokens": 1} | fields
    return server.ask("/v1/completions", body, **bearer(key))


def test_key_is_good_for_its_own_adapters(locked):
    assert complete(locked, "alice", ALICE).status == 200
    assert complete(locked, "tiny", ALICE).status == 200
    other, absent = (complete(locked, name, ALICE) for name in ("bob", "nobody"))
    assert (other.status, absent.status) == (404, 404)
    assert other.text.replace("bob", "nobody") == absent.text
    assert complete(locked, "bob", ALL).status == 200


def test_models_lists_what_the_key_may_use(locked):
    def listed(key: str) -> set[str]:
        return {card["id"] for card in locked.ask("/v1/models", **bearer(key)).body["data"]}

    assert listed(ALICE) == {"tiny", "alice"}
    assert listed(ALL) == listed(ADMIN) == {"tiny", "alice", "bob", "carol", "broken"}
    assert locked.ask("/v1/models/bob", **bearer(ALICE)).status == 404


@pytest.mark.parametrize("header", [None, "", "Bearer", f"Basic {ALL}", f"Bearer {ALL}x", ALL])
def test_wrong_key_is_answered_with_401(locked, header):
    headers = {} if header is None else {"Authorization": header}
    for path in ("/v1/models", "/metrics"):
        answer = locked.ask(path, **headers)
        assert (answer.status, answer.error["type"]) == (401, "authentication_error")
        assert answer.headers["www-authenticate"] == "Bearer"
        assert ALL not in answer.text
    assert locked.ask("/health", **headers).status == 200


def test_admin_key_loads_and_does_not_write(locked):
    assert complete(locked, "alice", ADMIN).status == 403
    assert locked.ask("/metrics", **bearer(ADMIN)).status == 200
    assert locked.ask("/metrics", **bearer(ALL)).status == 403
    body = {"lora_name": "x", "lora_path": "alice"}
    assert locked.ask("/v1/load_lora_adapter", body, **bearer(ALL)).status == 403


def test_key_with_too_much_under_way_waits_and_others_go_on(locked):
    refused = complete(locked, "alice", ALICE, n=3)
    assert (refused.status, refused.error["type"]) == (429, "rate_limit_error")
    assert int(refused.headers["retry-after"]) >= 1
    assert complete(locked, "alice", ALICE, n=2).status == 200


def test_identify_looks_at_every_key(monkeypatch):
    """However early it has found the right one."""
    import hmac

    compared = []
    monkeypatch.setattr(
        hmac, "compare_digest", lambda a, b: bool(compared.append((a, b))) or a == b
    )
    path_less = {"FASTLORA_API_KEY": ALL, "FASTLORA_ADMIN_KEY": ADMIN}
    keys = read_keys(None, path_less)
    assert keys.identify(f"Bearer {ALL}").writes
    assert keys.identify(f"bearer {ADMIN}").administers
    assert len(compared) == 4
    assert all(len(a) == len(b) == 32 for a, b in compared)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660])
def test_keys_file_that_others_can_read_is_refused(tmp_path, mode):
    with pytest.raises(ValueError, match=f"mode {mode:o}"):
        read_keys(write(tmp_path / "keys", mode=mode), {})


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        {"other": 1},
        {"admin": "short"},
        {"admin": "spaces in it, so many"},
        {"keys": {}},
        {"keys": [{"key": ALL}]},
        {"keys": [{"key": ALL, "adapters": "alice"}]},
        {"keys": [{"key": ALL, "adapters": ["../x"]}]},
        {"admin": ALL, "keys": [{"key": ALL, "adapters": "*"}]},
    ],
)
def test_wrong_keys_file_is_refused_without_naming_keys(tmp_path, content):
    with pytest.raises(ValueError) as caught:
        read_keys(write(tmp_path / "keys", content), {})
    assert ALL not in str(caught.value)


def test_address_beyond_this_machine_wants_keys():
    admin_alone = read_keys(None, {"FASTLORA_ADMIN_KEY": ADMIN})
    for host in ("0.0.0.0", "::", "192.0.2.1", "example.org"):
        assert not is_loopback(host)
        for keys in (Keys(), admin_alone):
            with pytest.raises(ValueError, match="host: expected keys"):
                check_address(host, keys)
        check_address(host, read_keys(None, {"FASTLORA_API_KEY": ALL}))
    for host in ("127.0.0.1", "::1", "localhost"):
        check_address(host, Keys())


def test_unknown_key_is_nobody_where_none_is_asked_for():
    assert Keys().identify("Bearer none").writes
    with pytest.raises(Refused):
        read_keys(None, {"FASTLORA_API_KEY": ALL}).identify("Bearer none")
