"""Prompts as tokens: text by the model's tokenizer, chats by the model's own template."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from jinja2 import TemplateError

from fastlora.serving.http.bodies import Message
from fastlora.serving.http.refusals import Refused

# Longer texts are read in a thread, so that nobody's stream waits for them.
_LONG = 8192


class Prompts:
    """Makes prompts with a model's tokenizer, and text of tokens.

    The chat template is the one that lies with the model, in transformers' sandbox; a request
    cannot bring another. most: tokens of a prompt.
    """

    def __init__(self, tokenizer: Any, most: int) -> None:
        self._tokenizer, self._most = tokenizer, most
        self._thread = ThreadPoolExecutor(1, "fastlora-serve-prompts")

    async def encode(self, prompt: str | list[int]) -> list[int]:
        """Returns a prompt's tokens; Refused where there are none, or too many."""
        if isinstance(prompt, str):
            prompt = await self._run(len(prompt), self._encode, prompt)
        return self._check("prompt", prompt)

    async def render(self, messages: Sequence[Message]) -> list[int]:
        """Returns the tokens of a chat; Refused where the template does not take it."""
        if not self._tokenizer.chat_template:
            raise Refused(400, "messages", "the model has no chat template; it has /v1/completions")
        plain = [{"role": message.role, "content": message.text} for message in messages]
        length = sum(len(message["content"]) for message in plain)
        return self._check("messages", await self._run(length, self._render, plain))

    def decode(self, ids: list[int]) -> str:
        """Returns the text of tokens, without those that are marks."""
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def show(self, token: int) -> str:
        """Returns the text of one token, whatever it is."""
        return self._tokenizer.decode([token])

    def close(self) -> None:
        self._thread.shutdown(wait=True)

    async def _run(self, length: int, work: Any, argument: Any) -> list[int]:
        if length < _LONG:
            return work(argument)
        return await asyncio.get_running_loop().run_in_executor(self._thread, work, argument)

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer(text)["input_ids"]

    def _render(self, messages: list[dict[str, str]]) -> list[int]:
        try:
            text = self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
        except TemplateError as error:
            raise Refused(
                400, "messages", f"the model's chat template refuses them: {error.message}"
            ) from None
        # The template has written the marks of beginning and end.
        return self._tokenizer(text, add_special_tokens=False)["input_ids"]

    def _check(self, field: str, ids: list[int]) -> list[int]:
        if not 1 <= len(ids) <= self._most:
            raise Refused(400, field, f"expected 1 to {self._most} tokens, got {len(ids)}")
        return ids
