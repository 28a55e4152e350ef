"""OpenAI's completions for examples/serve_ray.py: what may be asked, and how answers look."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any, Literal

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError
from starlette.exceptions import HTTPException

logger = logging.getLogger("ray.serve")


class Completion(BaseModel):
    """What may be asked for; fields beyond these must be null, false, zero or empty."""

    model_config = ConfigDict(strict=True, extra="allow")
    model: str
    prompt: str | list[int]
    max_tokens: int = Field(16, ge=1)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    seed: int | None = Field(None, ge=0, lt=1 << 63)
    stream: bool = False
    n: Literal[1] = 1

    @model_validator(mode="after")
    def _nothing_else(self) -> Completion:
        if more := [name for name, value in (self.model_extra or {}).items() if value]:
            raise PydanticCustomError("unsupported", "{field} is not supported", {"field": more[0]})
        return self

    def how(self) -> dict[str, Any]:
        """The same as fields of a ``Request``."""
        sample = self.temperature > 0
        return {
            "max_new_tokens": self.max_tokens,
            "do_sample": sample,
            "temperature": self.temperature if sample else 1.0,
            "top_p": self.top_p,
            "seed": self.seed,
        }


class Text:
    """Tokens as text, piece by piece; a character of several tokens comes with its last one."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.ids, self.before, self.shown = tokenizer, [], 0, 0

    def add(self, ids: list[int], last: bool = False) -> str:
        """The text that is complete with ``ids``, or all that is left with the last ones."""
        self.ids += ids
        # Decoded with the piece before it: how a token is spelt may depend on its neighbour.
        known = self.tokenizer.decode(self.ids[self.before : self.shown], skip_special_tokens=True)
        text = self.tokenizer.decode(self.ids[self.before :], skip_special_tokens=True)
        if text.endswith("\ufffd") and not last:
            return ""
        self.before, self.shown = self.shown, len(self.ids)
        return text[len(known) :]


def choice(text: str, ids: list[int], reason: str | None = None) -> dict[str, Any]:
    """OpenAI's, and the tokens themselves."""
    reason = "stop" if reason == "eos" else reason
    return {"index": 0, "text": text, "token_ids": ids, "logprobs": None, "finish_reason": reason}


async def server_sent(head: dict[str, Any], choices: AsyncGenerator[Any]) -> AsyncIterator[str]:
    """The choices as server-sent events. An error ends them, without ``[DONE]``."""
    async with aclosing(choices):
        try:
            async for part in choices:
                yield f"data: {json.dumps(head | {'choices': [part]})}\n\n"
            yield "data: [DONE]\n\n"
        except Exception:
            logger.exception("a stream broke off")
            yield f"data: {json.dumps(described(FAILED, None, 500))}\n\n"


FAILED = "the server could not complete the request"


class Refused(Exception):
    """A request that is not served: HTTP status, the field at fault, what was expected of it."""

    def __init__(self, status: int, field: str | None, why: str) -> None:
        super().__init__(status, field, why)
        self.status, self.field, self.why = status, field, why


def described(message: str, field: str | None, status: int) -> dict[str, Any]:
    """An error as OpenAI's JSON."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    code = "model_not_found" if (field, status) == ("model", 404) else None
    return {"error": {"message": message, "type": kind, "param": field, "code": code}}


def describe_errors(app: FastAPI) -> FastAPI:
    """Has ``app`` answer every error with that JSON."""

    def answer(message: str, field: str | None, status: int) -> JSONResponse:
        return JSONResponse(described(message, field, status), status)

    @app.exception_handler(Refused)
    async def refused(_: Request, error: Refused) -> JSONResponse:
        name = "" if error.field is None else f"{error.field}: "
        return answer(name + error.why, error.field, error.status)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = [part for part in first["loc"][1:] if isinstance(part, str)]
        return answer(": ".join([*where[:1], first["msg"]]), where[0] if where else None, 400)

    @app.exception_handler(HTTPException)
    async def elsewhere(_: Request, error: HTTPException) -> JSONResponse:
        return answer(str(error.detail), None, error.status_code)

    @app.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> JSONResponse:
        return answer(FAILED, None, 500)

    return app
