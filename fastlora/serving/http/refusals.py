"""``Refused``: a request that is not answered, and errors as OpenAI's JSON."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from starlette.responses import JSONResponse

FAILED = "the server could not complete the request"
_KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class Refused(Exception):
    """Refusal of a request: HTTP status, the field at fault, what was expected of it."""

    def __init__(
        self, status: int, field: str | None, why: str, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(status, field, why)
        self.status, self.field, self.why = status, field, why
        self.headers = dict(headers or {})

    def describe(self) -> dict[str, Any]:
        """Returns OpenAI's JSON of it."""
        kind = "server_error" if self.status >= 500 else _KINDS.get(self.status)
        code = "model_not_found" if (self.field, self.status) == ("model", 404) else None
        message = self.why if self.field is None else f"{self.field}: {self.why}"
        kind = kind or "invalid_request_error"
        return {"error": {"message": message, "type": kind, "param": self.field, "code": code}}

    def respond(self) -> JSONResponse:
        return JSONResponse(self.describe(), self.status, self.headers)


def refuse_failure() -> Refused:
    """Makes the refusal for an error whose reason is not the caller's to know."""
    return Refused(500, None, FAILED)
