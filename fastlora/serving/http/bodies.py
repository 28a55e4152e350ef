"""Bodies of requests: which fields there are, of which types, and what is refused by name."""

from __future__ import annotations

from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from fastlora.serving.http.refusals import Refused
from fastlora.serving.http.settings import Settings

# Below, dividing logits by it leaves float32's range.
_LEAST_TEMPERATURE = 0.01


class Body(BaseModel):
    """A body; null means that a field is absent, and others may only be false, zero or empty."""

    model_config = ConfigDict(strict=True, extra="allow")

    @model_validator(mode="before")
    @classmethod
    def _drop_null(cls, values: Any) -> Any:
        if isinstance(values, dict):
            return {name: value for name, value in values.items() if value is not None}
        return values

    @model_validator(mode="after")
    def _refuse_others(self) -> Body:
        if others := [name for name, value in (self.model_extra or {}).items() if value]:
            raise PydanticCustomError(
                "unsupported", "{field} is not supported", {"field": others[0][:64]}
            )
        return self


class StreamOptions(Body):
    include_usage: bool = False


class Asking(Body):
    """What completions and chats have in common."""

    model: str
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0, lt=1 << 31)
    seed: int | None = Field(None, ge=0, lt=1 << 62)
    stop: str | list[str] = []
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: int = Field(1, ge=1)
    ignore_eos: bool = False
    max_tokens: int | None = Field(None, ge=1, lt=1 << 31)

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop

    @property
    def asked_logprobs(self) -> int | None:
        """How many of the likeliest tokens are asked for; None: no log-probabilities."""
        return None

    def check(self, settings: Settings) -> None:
        """Raises Refused, naming the field, for what is more than a server allows."""
        _check_most("n", self.n, settings.choices)
        field = "logprobs" if isinstance(self, Completion) else "top_logprobs"
        _check_most(field, self.asked_logprobs or 0, settings.logprobs)
        _check_most("stop", len(self.stops), settings.stops, "strings")
        for stop in self.stops:
            if not 1 <= len(stop) <= settings.stop_length:
                raise Refused(
                    400, "stop", f"expected strings of 1 to {settings.stop_length} characters"
                )
        if self.stream_options is not None and not self.stream:
            raise Refused(400, "stream_options", "expected stream to be true beside it")

    def list_request_fields(self) -> dict[str, Any]:
        """Returns fields of ``fastlora.serving.Request``, without prompt, adapter and length."""
        sample = self.temperature >= _LEAST_TEMPERATURE
        return {
            "do_sample": sample,
            "temperature": self.temperature if sample else 1.0,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "eos_token_id": () if self.ignore_eos else None,
            "logprobs": self.asked_logprobs,
        }


class Completion(Asking):
    """Body of POST /v1/completions."""

    prompt: str | list[int]
    max_tokens: int | None = Field(16, ge=1, lt=1 << 31)
    logprobs: int | None = Field(None, ge=0)
    best_of: Literal[1] = 1

    @property
    def asked_logprobs(self) -> int | None:
        return self.logprobs


class TextPart(Body):
    type: Literal["text"]
    text: str


class Message(Body):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]

    @property
    def text(self) -> str:
        parts = self.content
        return parts if isinstance(parts, str) else "".join(part.text for part in parts)


class Chat(Asking):
    """Body of POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1, lt=1 << 31)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0)

    @property
    def asked_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    def check(self, settings: Settings) -> None:
        super().check(settings)
        if self.top_logprobs is not None and not self.logprobs:
            raise Refused(400, "top_logprobs", "expected logprobs to be true beside it")
        if self.max_completion_tokens is not None and self.max_tokens is not None:
            raise Refused(400, "max_tokens", "expected it or max_completion_tokens, got both")


class Load(Body):
    """Body of POST /v1/load_lora_adapter; lora_path: a folder's name in the adapters' folder."""

    lora_name: str
    lora_path: str
    load_inplace: bool = False


class Unload(Body):
    """Body of POST /v1/unload_lora_adapter."""

    lora_name: str


B = TypeVar("B", bound=Body)


def parse(kind: type[B], body: bytes) -> B:
    """Parses a body; Refused, with status 400 and the field's name, where it is another."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    field = next((part for part in first["loc"] if isinstance(part, str)), None)
    raise Refused(400, field, first["msg"])


def _check_most(field: str, count: int, most: int, what: str = "") -> None:
    if count > most:
        raise Refused(400, field, f"expected at most {most} {what}".rstrip() + f", got {count}")
