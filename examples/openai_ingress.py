"""HTTP side of examples/serve_ray.py: OpenAI's completions, for FastAPI and Ray Serve."""

import json
import logging
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import Any, Literal

import transformers
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError
from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.exceptions import HTTPException

from fastlora.adapters.files import CONFIG_NAME, check_name

FIELDS = {"input_ids": "prompt", "max_new_tokens": "max_tokens"}  # ours and OpenAI's
FAILED = "the server could not complete the request"
logger = logging.getLogger("ray.serve")
app = FastAPI()  # serve.ingress copies it as it is then; it cannot resolve deferred annotations


class Completion(BaseModel):
    """Body of a request; fields beyond these must be null, false, zero or empty."""

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
    def _nothing_else(self) -> "Completion":
        if more := [name for name, value in (self.model_extra or {}).items() if value]:
            raise PydanticCustomError("unsupported", "{field} is not supported", {"field": more[0]})
        return self

    def list_request_fields(self) -> dict[str, Any]:
        """Returns the fields of ``fastlora.serving.Request``."""
        sample = self.temperature > 0
        return {
            "max_new_tokens": self.max_tokens,
            "do_sample": sample,
            "temperature": self.temperature if sample else 1.0,
            "top_p": self.top_p,
            "seed": self.seed,
        }


class Text:
    """Text of tokens, piece by piece; a character of several tokens comes with its last one."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.ids, self.before, self.shown = tokenizer, [], 0, 0

    def add(self, ids: list[int], last: bool = False) -> str:
        """Returns the text that is complete with ``ids``, or all of it with the last ones."""
        self.ids += ids
        # Decoded with the piece before it: a token's text may depend on its neighbour.
        known = self.tokenizer.decode(self.ids[self.before : self.shown], skip_special_tokens=True)
        text = self.tokenizer.decode(self.ids[self.before :], skip_special_tokens=True)
        if text.endswith("\ufffd") and not last:
            return ""
        self.before, self.shown = self.shown, len(self.ids)
        return text[len(known) :]


def make_choice(text: str, ids: list[int], reason: str | None = None) -> dict[str, Any]:
    """Makes OpenAI's choice, with the tokens themselves."""
    reason = "stop" if reason == "eos" else reason
    return {"index": 0, "text": text, "token_ids": ids, "logprobs": None, "finish_reason": reason}


def join_choices(parts: list[dict[str, Any]], prompt_tokens: int) -> dict[str, Any]:
    """Joins all choices of an answer into one, with its usage."""
    tokens = [token for part in parts for token in part["token_ids"]]
    text = "".join(part["text"] for part in parts)
    usage = {"prompt_tokens": prompt_tokens, "completion_tokens": len(tokens)}
    usage["total_tokens"] = prompt_tokens + len(tokens)
    return {"choices": [make_choice(text, tokens, parts[-1]["finish_reason"])], "usage": usage}


def make_envelope(model: str) -> dict[str, Any]:
    """Makes the fields that every answer and event begins with."""
    identity = {"id": f"cmpl-{uuid.uuid4().hex}", "created": int(time.time())}
    return {"object": "text_completion", "model": model, **identity}


async def send_events(head: dict[str, Any], choices: AsyncGenerator[Any]) -> AsyncIterator[str]:
    """Sends choices as server-sent events. An error ends them, without ``[DONE]``."""
    async with aclosing(choices):
        try:
            async for part in choices:
                yield f"data: {json.dumps(head | {'choices': [part]})}\n\n"
            yield "data: [DONE]\n\n"
        except Exception:
            logger.exception("a stream broke off")
            yield f"data: {json.dumps(describe_error(FAILED, None, 500))}\n\n"


class Refused(Exception):
    """Refusal of a request: HTTP status, the field at fault, what was expected of it."""

    def __init__(self, status: int, field: str, why: str) -> None:
        super().__init__(status, field, why)
        self.status, self.field, self.why = status, field, why


def describe_error(message: str, field: str | None, status: int) -> dict[str, Any]:
    """Describes an error as OpenAI's JSON."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    code = "model_not_found" if (field, status) == ("model", 404) else None
    return {"error": {"message": message, "type": kind, "param": field, "code": code}}


def answer(message: str, field: str | None, status: int) -> JSONResponse:
    return JSONResponse(describe_error(message, field, status), status)


@app.exception_handler(Refused)
async def answer_refused(_: Request, error: Refused) -> JSONResponse:
    return answer(f"{error.field}: {error.why}", error.field, error.status)


@app.exception_handler(RequestValidationError)
async def answer_invalid(_: Request, error: RequestValidationError) -> JSONResponse:
    first = error.errors()[0]
    where = [part for part in first["loc"][1:2] if isinstance(part, str)]
    return answer(": ".join([*where, first["msg"]]), where[0] if where else None, 400)


@app.exception_handler(HTTPException)
async def answer_http_error(_: Request, error: HTTPException) -> JSONResponse:
    return answer(str(error.detail), None, error.status_code)


@app.exception_handler(Exception)
async def answer_failure(_: Request, error: Exception) -> JSONResponse:
    return answer(FAILED, None, 500)


@serve.deployment(
    max_ongoing_requests=1000,
    graceful_shutdown_wait_loop_s=0.1,
    ray_actor_options={"num_cpus": 0},
)
@serve.ingress(app)
class OpenAI:
    """Ingress that sends each request where its adapter is, and writes what comes back."""

    def __init__(self, replicas: DeploymentHandle, model: Path, adapters: Path | None) -> None:
        self.replicas, self.base, self.folder = replicas, model.name, adapters
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(model, local_files_only=True)

    @app.get("/v1/models")
    def models(self) -> dict[str, Any]:
        names = sorted(entry.name for entry in self.folder.iterdir()) if self.folder else []
        served = [self.base, *(f"{self.base}:{name}" for name in names if self.has(name))]
        card = {"object": "model", "created": 0, "owned_by": "fastlora"}
        return {"object": "list", "data": [{"id": name, **card} for name in served]}

    @app.post("/v1/completions")
    async def completions(self, body: Completion) -> Response:
        adapter, ids = self.adapter(body.model), body.prompt
        if isinstance(ids, str):
            ids = self.tokenizer(ids)["input_ids"]
        choices = self.choices(ids, adapter, body.list_request_fields())
        try:
            replica = await anext(choices)
        except ValueError as error:  # Ray's, around the engine's, which names a field of Request
            field, _, why = str(getattr(error, "cause", error)).partition(": ")
            raise Refused(400, FIELDS.get(field, field), why) from error
        head, headers = make_envelope(body.model), {"X-Replica": replica}
        if body.stream:
            events = send_events(head, choices)
            return StreamingResponse(events, media_type="text/event-stream", headers=headers)
        parts = [part async for part in choices]
        return JSONResponse(head | join_choices(parts, prompt_tokens=len(ids)), headers=headers)

    async def choices(
        self, ids: list[int], adapter: str | None, settings: dict[str, Any]
    ) -> AsyncGenerator[Any]:
        """Yields the replica's name as the request begins, then a choice for each token."""
        replicas = self.replicas.options(multiplexed_model_id=adapter or "", stream=True)
        answer, text = replicas.complete.remote(ids, adapter, settings), Text(self.tokenizer)
        try:
            yield await anext(answer)
            async for item in answer:
                if isinstance(item, int):
                    yield make_choice(text.add([item]), [item])
                else:
                    yield make_choice(text.add([], last=True), [], item)
        finally:
            answer.cancel()  # the client may have left

    def adapter(self, model: str) -> str | None:
        """Returns the adapter that ``model`` names, None for the base."""
        if model == self.base:
            return None
        name = model.removeprefix(f"{self.base}:")
        if name == model or not self.has(name):
            raise Refused(404, "model", f"there is no {model!r}; GET /v1/models lists them")
        return name

    def has(self, name: str) -> bool:
        """Whether the folder has that adapter; only names of adapters become paths."""
        try:
            check_name(name)
        except ValueError:
            return False
        return self.folder is not None and (self.folder / name / CONFIG_NAME).is_file()
