"""Keys: who may write with which adapters, and who may load and unload them."""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastlora.adapters.files import check_name
from fastlora.serving.http.refusals import Refused

_LEAST_LENGTH = 16
_MAX_BYTES = 1 << 20
_ENVIRONMENT = {"FASTLORA_API_KEY": False, "FASTLORA_ADMIN_KEY": True}


@dataclass(frozen=True)
class Caller:
    """Who asks. adapters: those that it may use, None: all. account: counts what is under way."""

    account: str
    adapters: frozenset[str] | None = None
    writes: bool = True
    administers: bool = False

    def may_use(self, adapter: str) -> bool:
        return self.adapters is None or adapter in self.adapters


class Keys:
    """Keys by their digests; without any for writing, everybody who reaches the server may write.

    A key is compared with all of them, each in constant time.
    """

    def __init__(self, callers: Sequence[tuple[str, Caller]] = ()) -> None:
        self._salt = secrets.token_bytes(32)
        self._callers = [(self._digest(key), caller) for key, caller in callers]
        self.required = any(caller.writes for _, caller in self._callers)
        self._anybody = Caller("")

    def identify(self, header: str | None) -> Caller:
        """Returns who sent this Authorization header; Refused (401) where nobody did."""
        if header is None:
            if self.required:
                raise _refuse("expected the header `Authorization: Bearer KEY`")
            return self._anybody
        scheme, _, key = header.partition(" ")
        digest, found = self._digest(key.strip()), None
        for own, caller in self._callers:
            if hmac.compare_digest(own, digest):
                found = caller
        if found is not None and scheme.lower() == "bearer":
            return found
        # Clients send some key even to a server that has none.
        if not self.required:
            return self._anybody
        raise _refuse("expected a key of this server")

    def _digest(self, key: str) -> bytes:
        return hmac.new(self._salt, key.encode("utf-8", "surrogateescape"), hashlib.sha256).digest()


def read_keys(path: Path | None, environment: Mapping[str, str]) -> Keys:
    """Reads keys from a file, and FASTLORA_API_KEY and FASTLORA_ADMIN_KEY.

    The file is JSON: {"admin": KEY, "keys": [{"key": KEY, "adapters": [NAME, ...] or "*"}]}. Raises
    OSError, or ValueError where others than its owner may read it, or it is another; neither names
    a key.
    """
    callers = [] if path is None else _parse(path, _read_private(path))
    for name, admin in _ENVIRONMENT.items():
        if name in environment:
            callers.append((_check_key(name, environment[name]), _make_caller(name, None, admin)))
    if len({key for key, _ in callers}) < len(callers):
        raise ValueError("keys: expected different ones, got one twice")
    return Keys(callers)


def _make_caller(account: str, adapters: frozenset[str] | None, admin: bool = False) -> Caller:
    return Caller(account, adapters, writes=not admin, administers=admin)


def _read_private(path: Path) -> bytes:
    with path.open("rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"keys: expected a file, got {path}")
        if status.st_mode & 0o077:
            raise ValueError(
                f"keys: {path} can be read by others (mode {status.st_mode & 0o777:o}): chmod 600"
            )
        data = file.read(_MAX_BYTES + 1)
    if len(data) > _MAX_BYTES:
        raise ValueError(f"keys: expected at most {_MAX_BYTES} bytes, {path} has more")
    return data


def _parse(path: Path, data: bytes) -> list[tuple[str, Caller]]:
    try:
        values: Any = json.loads(data)
    except (ValueError, RecursionError):
        raise ValueError(f"keys: expected JSON in {path}") from None
    if not isinstance(values, dict) or not values.keys() <= {"admin", "keys"}:
        raise ValueError(f'keys: expected {{"admin": ..., "keys": [...]}} in {path}')
    callers = []
    if "admin" in values:
        callers.append((_check_key("admin", values["admin"]), _make_caller("admin", None, True)))
    entries = values.get("keys", [])
    if not isinstance(entries, list):
        raise ValueError(f"keys: expected a list of keys in {path}")
    for number, entry in enumerate(entries):
        where = f"keys[{number}]"
        if not isinstance(entry, dict) or entry.keys() != {"key", "adapters"}:
            raise ValueError(f'{where}: expected {{"key": ..., "adapters": [...]}} in {path}')
        adapters = entry["adapters"]
        if adapters == "*":
            names = None
        elif isinstance(adapters, list):
            names = frozenset(check_name(name) for name in adapters)
        else:
            raise ValueError(f'{where}.adapters: expected a list of names, or "*", in {path}')
        callers.append((_check_key(where, entry["key"]), _make_caller(where, names)))
    return callers


def _check_key(where: str, key: object) -> str:
    if (
        not isinstance(key, str)
        or len(key) < _LEAST_LENGTH
        or not key.isascii()
        or not key.isprintable()
        or " " in key
    ):
        raise ValueError(
            f"{where}: expected a key of {_LEAST_LENGTH} characters or more, ASCII without spaces"
        )
    return key


def _refuse(why: str) -> Refused:
    return Refused(401, "Authorization", why, {"WWW-Authenticate": "Bearer"})
