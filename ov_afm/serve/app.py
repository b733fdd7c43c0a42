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
from starlette.routing import Route

from ..errors import DeviceError
from ..system import console
from . import errors, protocol
from .middleware import RequestChecks
from .prometheus import RequestCounter
from .registry import Models
from .service import Service, Settings
from .wire import chat_completions, responses_api
from .wire.openapi import ERRORS

__all__ = ["Settings", "build", "run"]

VERSION = metadata.version("ov-afm")
# Each adds the routes of one API.
APIS = (chat_completions, responses_api)


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
    for api in APIS:
        api.add_routes(app, service)
    _add_routes(app, service)
    routes = [route for route in app.routes if isinstance(route, Route)]
    takes_json = frozenset(route.path for route in routes if getattr(route, "body_field", None) is not None)
    # The last one added is the first that a request meets.
    app.add_middleware(
        RequestChecks, api_keys=settings.api_keys, max_body_bytes=settings.max_body_bytes, json_routes=takes_json
    )
    if origins := settings.cors_origins:
        app.add_middleware(CORSMiddleware, allow_origins=origins, allow_methods=["*"], allow_headers=["*"])
    app.add_middleware(RequestCounter, metrics=service.metrics, routes=frozenset(route.path for route in routes))
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
