"""``Adapters``: which adapters of a folder a server knows; each is loaded when it is first used."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

from fastlora.adapters.files import check_name
from fastlora.serving.http.folder import AdapterError, Folder
from fastlora.serving.http.refusals import Refused
from fastlora.serving.model import MultiLoRAModel


class Adapters:
    """Adapters by name, with the folder that each lies in; used in one event loop alone.

    One at a time is read, so that memory holds no more than one beside the bank's copies.
    """

    def __init__(self, server: MultiLoRAModel, folder: Folder | None) -> None:
        self._server, self._folder = server, folder
        self._folders = {} if folder is None else {name: name for name in folder.list_names()}
        self._loaded: set[str] = set()
        self._loading: dict[str, asyncio.Task[None]] = {}
        self._thread = ThreadPoolExecutor(1, "fastlora-serve-adapters")
        self._changing = asyncio.Lock()

    @property
    def names(self) -> list[str]:
        return sorted(self._folders)

    def knows(self, name: str) -> bool:
        return name in self._folders

    def preload(self) -> None:
        """Loads all, before the first request; AdapterError, with its name, for one that fails."""
        for name, folder in self._folders.items():
            try:
                self._read(name, folder)
            except AdapterError as error:
                raise AdapterError(f"adapter {name!r} cannot be loaded: {error}") from None
            self._loaded.add(name)

    async def prepare(self, name: str) -> None:
        """Loads an adapter unless it is; Refused where it is unknown or cannot be loaded.

        A caller that leaves meanwhile does not stop it.
        """
        if name in self._loaded:
            return
        if name not in self._folders:
            raise refuse_unknown(name)
        task = self._loading.get(name)
        if task is None:
            task = asyncio.ensure_future(self._load(name, self._folders[name]))
            self._loading[name] = task
        try:
            await asyncio.shield(task)
        except AdapterError as error:
            raise Refused(500, "model", f"adapter {name!r} cannot be loaded: {error}") from None

    async def load(self, name: str, folder: str, *, replace: bool) -> None:
        """Makes an adapter known and loads it; under a known name only with ``replace``."""
        if self._folder is None:
            raise Refused(400, "lora_path", "the server was started without a folder of adapters")
        _check_name("lora_name", name)
        _check_name("lora_path", folder)
        async with self._changing:
            if name in self._folders and not replace:
                why = "an adapter of that name is known; load_inplace replaces it"
                raise Refused(400, "lora_name", why)
            await self._settle(name)
            try:
                await self._load(name, folder)
            except AdapterError as error:
                raise Refused(400, "lora_path", f"it cannot be loaded: {error}") from None
            self._folders[name] = folder

    async def unload(self, name: str) -> None:
        """Forgets an adapter: no request gets it from now on, those that run finish with it."""
        async with self._changing:
            if self._folders.pop(name, None) is None:
                raise Refused(404, "lora_name", f"there is no adapter {name!r}")
            await self._settle(name)
            if name in self._loaded:
                self._loaded.discard(name)
                await self._run(self._forget, name)

    def close(self) -> None:
        self._thread.shutdown(wait=True)
        if self._folder is not None:
            self._folder.close()

    async def _settle(self, name: str) -> None:
        """Waits for a first use that is loading it."""
        if task := self._loading.get(name):
            await asyncio.wait([task])

    async def _load(self, name: str, folder: str) -> None:
        try:
            await self._run(self._read, name, folder)
            self._loaded.add(name)
        finally:
            self._loading.pop(name, None)

    async def _run(self, work: Callable[..., None], *args: str) -> None:
        await asyncio.get_running_loop().run_in_executor(self._thread, work, *args)

    def _read(self, name: str, folder: str) -> None:
        files = self._folder
        assert files is not None
        try:
            self._server.load_adapter_from_source(lambda: files.read(folder), name)
        except AdapterError:
            raise
        except (TypeError, ValueError) as error:
            raise AdapterError(str(error)) from None

    def _forget(self, name: str) -> None:
        # What still runs keeps its pages, which are freed when it ends.
        with suppress(TimeoutError):
            self._server.unload_adapter(name, wait=True, timeout=0)


def _check_name(field: str, value: str) -> None:
    try:
        check_name(value)
    except ValueError:
        raise Refused(400, field, "expected a name of [A-Za-z0-9._-], 128 at most") from None


def refuse_unknown(model: str) -> Refused:
    """Makes the refusal of a name that is not there, or not the caller's."""
    return Refused(404, "model", f"there is no {model[:200]!r}; GET /v1/models lists them")
