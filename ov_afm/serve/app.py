"""The HTTP side: the routes, what each asks of an engine, and the server that runs them."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from collections.abc import AsyncIterator
from importlib import metadata
from typing import Any

from fastapi import FastAPI
from fastapi.responses import JSONResponse, PlainTextResponse
from starlette.middleware.cors import CORSMiddleware

from ..errors import DeviceError
from ..system import console
from . import errors, protocol
from .middleware import RequestChecks
from .prometheus import RequestCounter
from .protocol import ChatCompletion, Completion
from .registry import Models
from .service import Service, Settings

__all__ = ["Settings", "build", "run"]

VERSION = metadata.version("ov-afm")
JSON_ROUTES = frozenset({"/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"})
ROUTES = JSON_ROUTES | {"/v1/models", "/health", "/metrics", "/version"}
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": protocol.ErrorEnvelope} for status in (400, 401, 404, 413, 415, 429, 500, 503, 504)
}

STREAMS: dict[int | str, dict[str, Any]] = {
    **ERRORS,
    200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}, "description": "Whole, or as a stream"},
}


def build(models: Models, settings: Settings) -> FastAPI:
    """The ASGI application.

    Args:
        models: The models on offer; started and stopped with the application.
        settings: How to behave.
    """
    service = Service(models, settings)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        models.start()
        try:
            yield
        finally:
            await models.stop()

    app = FastAPI(title="ov-afm", version=VERSION, lifespan=lifespan, redoc_url=None)
    errors.install(app)
    _add_routes(app, service)
    # The last one added is the first that a request meets.
    app.add_middleware(
        RequestChecks, api_keys=settings.api_keys, max_body_bytes=settings.max_body_bytes, json_routes=JSON_ROUTES
    )
    if origins := settings.cors_origins:
        app.add_middleware(CORSMiddleware, allow_origins=origins, allow_methods=["*"], allow_headers=["*"])
    app.add_middleware(RequestCounter, metrics=service.metrics, routes=ROUTES)
    return app


def _add_routes(app: FastAPI, service: Service) -> None:
    async def health() -> JSONResponse:
        well, status = service.models.status()
        return JSONResponse({"status": status}, 200 if well else 503)

    def metrics() -> PlainTextResponse:
        return PlainTextResponse(service.metrics.text(), media_type="text/plain; version=0.0.4")

    def version() -> protocol.Version:
        return protocol.Version(version=VERSION)

    add = app.add_api_route
    unready: dict[int | str, dict[str, Any]] = {503: {"model": protocol.Health}}
    add("/v1/chat/completions", service.chat, methods=["POST"], response_model=ChatCompletion, responses=STREAMS)
    add("/v1/completions", service.complete, methods=["POST"], response_model=Completion, responses=STREAMS)
    add("/tokenize", service.tokenize, methods=["POST"], response_model=protocol.Tokens, responses=ERRORS)
    add("/detokenize", service.detokenize, methods=["POST"], response_model=protocol.Text, responses=ERRORS)
    add("/v1/models", service.list_models, methods=["GET"], response_model=protocol.ModelList, responses=ERRORS)
    add("/v1/models/{model_id:path}", service.model, methods=["GET"], response_model=protocol.Model, responses=ERRORS)
    add("/health", health, methods=["GET"], response_model=protocol.Health, responses=unready)
    add("/metrics", metrics, methods=["GET"], response_class=PlainTextResponse)
    add("/version", version, methods=["GET"], response_model=protocol.Version)


def run(models: Models, settings: Settings, *, host: str, port: int, grace_s: float) -> None:
    """Serve until a signal, or until the only model turns out to be unusable.

    Args:
        models: The models on offer.
        settings: How to behave.
        host: Address to listen on.
        port: Port to listen on; 0 takes a free one.
        grace_s: Seconds that running requests get to finish after the signal.

    Raises:
        DeviceError: A model cannot be loaded.
    """
    import uvicorn

    config = uvicorn.Config(
        build(models, settings),
        host=host,
        port=port,
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=max(1, round(grace_s)),
        server_header=False,
        h11_max_incomplete_event_size=64 * 1024,
    )

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            for listener in self.servers:
                for each in listener.sockets:
                    address, port = each.getsockname()[:2]
                    console.note(f"listening on http://{address}:{port}/v1 (pid {os.getpid()})")

    server = Server(config)
    for name, engine in models.engines.items():
        engine.on_ready = lambda info, name=name: console.note(  # type: ignore[misc]
            f"serving {name} on {info.device}, context {info.context_length} tokens"
        )
        if len(models.engines) == 1:
            engine.on_unusable = lambda: setattr(server, "should_exit", True)
    # uvicorn raises the signal again when it is done; that must not end the process with the signal's status.
    signal.signal(signal.SIGTERM, lambda *_: None)
    signal.signal(signal.SIGINT, lambda *_: None)
    server.run()
    for engine in models.engines.values():
        if engine.problem is not None:
            raise DeviceError(engine.problem)
