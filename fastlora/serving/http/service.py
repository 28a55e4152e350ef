"""``Service``: what answers requests once their form is right: keys, adapters, limits, engine."""

from __future__ import annotations

import dataclasses
from typing import Any

from fastlora.serving.engine.compatibility import eos_of
from fastlora.serving.engine.engine import Engine
from fastlora.serving.engine.request import Request
from fastlora.serving.http.adapters import Adapters, refuse_unknown
from fastlora.serving.http.answers import Answer
from fastlora.serving.http.bodies import Chat, Completion
from fastlora.serving.http.choices import Choice
from fastlora.serving.http.folder import Folder
from fastlora.serving.http.formats import ChatFormat, CompletionFormat
from fastlora.serving.http.gate import log_failure
from fastlora.serving.http.keys import Caller, Keys
from fastlora.serving.http.limits import Limits
from fastlora.serving.http.metrics import Metrics
from fastlora.serving.http.prompts import Prompts
from fastlora.serving.http.refusals import Refused
from fastlora.serving.http.settings import Settings
from fastlora.serving.http.writing import Outbox, Writer, Writing
from fastlora.serving.model import MultiLoRAModel

# Fields of an engine's Request by their names in OpenAI's bodies.
_FIELDS = {"input_ids": "prompt", "max_new_tokens": "max_tokens"}


class Service:
    """One base model with a folder of adapters, and an engine that writes.

    engine_options: as ``Engine``'s. Close it after the last answer.
    """

    def __init__(
        self,
        server: MultiLoRAModel,
        tokenizer: Any,
        folder: Folder | None,
        settings: Settings,
        keys: Keys,
        **engine_options: Any,
    ) -> None:
        outbox = Outbox()
        self.settings, self.keys = settings, keys
        self.engine = Engine(server, after_turn=outbox.send, **engine_options)
        self._writer = Writer(self.engine, outbox)
        self.adapters = Adapters(server, folder)
        most = self.engine.max_length - 1
        self.prompts = Prompts(tokenizer, min(settings.prompt_tokens or most, most))
        per_key = settings.under_way_per_key if keys.required else settings.under_way
        self.limits = Limits(settings.under_way, per_key, self.engine.max_rows)
        self.metrics = Metrics(lambda: self.limits.total, server.bank.stats)
        self._ends = eos_of(server)
        self._running: set[Writing] = set()
        self.stopping = False

    def list_models(self, caller: Caller) -> list[str]:
        """Lists the base and the adapters that a caller may use."""
        names = self.adapters.names
        return [self.settings.name, *(name for name in names if caller.may_use(name))]

    async def answer(self, body: Completion | Chat, caller: Caller) -> Answer:
        """Begins an answer; Refused where it is not to be."""
        settings = self.settings
        if self.stopping:
            raise Refused(503, None, "the server is stopping", {"Retry-After": "1"})
        body.check(settings)
        adapter = self._find_adapter(body.model, caller)
        room = self.limits.enter(caller.account, body.n)
        room.__enter__()
        try:
            writing, prompt_tokens = await self._begin(body, adapter)
        except BaseException:
            room.__exit__(None, None, None)
            raise
        self.metrics.prompt_tokens.inc(prompt_tokens)
        self._running.add(writing)

        def end(seconds: float) -> None:
            self._running.discard(writing)
            self.limits.note_seconds(seconds)

        ends = frozenset[int]() if body.ignore_eos else self._ends
        form = ChatFormat if isinstance(body, Chat) else CompletionFormat
        return Answer(
            writing,
            [Choice(self.prompts.decode, body.stops, ends) for _ in range(body.n)],
            form(self.prompts.show, body.asked_logprobs is not None),
            model=body.model,
            prompt_tokens=prompt_tokens,
            stream=body.stream,
            include_usage=body.stream_options is not None and body.stream_options.include_usage,
            seconds=settings.seconds,
            room=room,
            metrics=self.metrics,
            on_end=end,
            log=log_failure,
        )

    @property
    def is_idle(self) -> bool:
        return not self._running

    def cancel_all(self) -> None:
        """Ends all answers that run."""
        for writing in list(self._running):
            writing.close()

    def close(self) -> None:
        """Ends what runs and frees the engine's cache, the threads and the folder's handle."""
        self.engine.close()
        self.adapters.close()
        self.prompts.close()

    async def _begin(self, body: Completion | Chat, adapter: str | None) -> tuple[Writing, int]:
        if isinstance(body, Chat):
            ids = await self.prompts.render(body.messages)
        else:
            ids = await self.prompts.encode(body.prompt)
        fields = body.list_request_fields()
        most = body.max_tokens
        if isinstance(body, Chat):
            most = body.max_completion_tokens or most or self.engine.max_length - len(ids)
        try:
            first = Request(
                ids,
                adapter,
                max_new_tokens=most or 1,
                seed=body.seed,
                timeout=self.settings.seconds,
                **fields,
            )
            requests = [first, *(_repeat(first, i) for i in range(1, body.n))]
            if adapter is not None:
                await self.adapters.prepare(adapter)
            # Nothing is awaited in between, so that nothing is unloaded in between.
            return self._writer.write(requests), len(ids)
        except (TypeError, ValueError) as error:
            field, colon, why = str(error).partition(": ")
            if field == "adapter_names":
                raise refuse_unknown(body.model) from None
            if not colon:
                raise
            raise Refused(400, _FIELDS.get(field, field), why) from None
        except RuntimeError as error:
            log_failure(error)
            raise Refused(503, None, "the engine has stopped") from None

    def _find_adapter(self, model: str, caller: Caller) -> str | None:
        """Returns the adapter that ``model`` names, None for the base; Refused for others.

        It is the base's name, an adapter's, or ``<base>:<adapter>``. What is not the caller's is
        refused as what is not there.
        """
        base = self.settings.name
        if model == base:
            return None
        name = model.removeprefix(f"{base}:")
        if not caller.may_use(name) or not self.adapters.knows(name):
            raise refuse_unknown(model)
        return name


def check_writes(caller: Caller) -> None:
    """Refused (403) where a caller's key is not for writing."""
    if not caller.writes:
        raise Refused(403, "Authorization", "the admin's key does not write: expected another")


def check_administers(caller: Caller) -> None:
    """Refused (403) where a caller's key is not the admin's."""
    if not caller.administers:
        raise Refused(403, "Authorization", "expected the admin's key")


def _repeat(request: Request, number: int) -> Request:
    """The same request for another choice, with a seed of its own where there is one."""
    seed = None if request.seed is None else request.seed + number
    return dataclasses.replace(request, seed=seed)
