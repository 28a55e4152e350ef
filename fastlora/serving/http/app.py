"""The application: which path does what, for whom. It runs under any ASGI server."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException

from fastlora.serving.http.answers import Answer
from fastlora.serving.http.bodies import Chat, Completion, Load, Unload, parse
from fastlora.serving.http.gate import Gate, read_body
from fastlora.serving.http.keys import Caller
from fastlora.serving.http.refusals import Refused
from fastlora.serving.http.service import Service, check_administers, check_writes


def make_app(service: Service) -> FastAPI:
    """Makes the application over a service, which stays the caller's to close."""
    # Without pages of its own: they would load scripts from other hosts.
    app = FastAPI(title="fastlora", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(
        Gate,
        settings=service.settings,
        count=lambda status: service.metrics.answers.labels(str(status)).inc(),
    )
    _add_handlers(app)
    _add_writing(app, service)
    _add_administration(app, service)
    return app


def _add_writing(app: FastAPI, service: Service) -> None:
    async def answer(request: Request, kind: type[Completion] | type[Chat]) -> Answer:
        caller = _identify(service, request)
        check_writes(caller)
        body = parse(kind, await read_body(request, service.settings))
        return await service.answer(body, caller)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await answer(request, Completion)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        return await answer(request, Chat)

    @app.get("/v1/models")
    async def models(request: Request) -> Response:
        names = service.list_models(_identify(service, request))
        cards = [_make_card(name, service.settings.name) for name in names]
        return JSONResponse({"object": "list", "data": cards})

    @app.get("/v1/models/{name}")
    async def model(request: Request, name: str) -> Response:
        if name not in service.list_models(_identify(service, request)):
            raise Refused(404, "model", f"there is no {name[:200]!r}; GET /v1/models lists them")
        return JSONResponse(_make_card(name, service.settings.name))


def _add_administration(app: FastAPI, service: Service) -> None:
    @app.post("/v1/load_lora_adapter")
    async def load(request: Request) -> Response:
        check_administers(_identify(service, request))
        body = parse(Load, await read_body(request, service.settings))
        if body.lora_name == service.settings.name:
            raise Refused(400, "lora_name", "expected another than the base's")
        await service.adapters.load(body.lora_name, body.lora_path, replace=body.load_inplace)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")

    @app.post("/v1/unload_lora_adapter")
    async def unload(request: Request) -> Response:
        check_administers(_identify(service, request))
        body = parse(Unload, await read_body(request, service.settings))
        await service.adapters.unload(body.lora_name)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")

    @app.get("/health")
    async def health() -> Response:
        return Response(status_code=503 if service.stopping else 200)

    @app.get("/metrics")
    async def metrics(request: Request) -> Response:
        caller = _identify(service, request)
        if service.keys.required:
            check_administers(caller)
        return Response(service.metrics.render(), media_type="text/plain; version=0.0.4")


def _add_handlers(app: FastAPI) -> None:
    @app.exception_handler(Refused)
    async def refuse(_: Request, refused: Refused) -> Response:
        return refused.respond()

    @app.exception_handler(HTTPException)
    async def refuse_http(_: Request, error: HTTPException) -> Response:
        return Refused(error.status_code, None, str(error.detail), error.headers).respond()


def _identify(service: Service, request: Request) -> Caller:
    headers = request.headers.getlist("authorization")
    if len(headers) > 1:
        raise Refused(400, "Authorization", "expected one such header")
    return service.keys.identify(headers[0] if headers else None)


def _make_card(name: str, base: str) -> dict[str, Any]:
    card = {"id": name, "object": "model", "created": 0, "owned_by": "fastlora"}
    return card | {"parent": None if name == base else base}
