"""The HTTP application: its routes, what each asks of an engine, and the checks before them."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from importlib import metadata
from typing import Any

from fastapi import FastAPI
from fastapi.responses import JSONResponse, PlainTextResponse
from starlette.middleware.cors import CORSMiddleware

from . import errors, protocol
from .middleware import BodyChecks, RequestChecks
from .prometheus import RequestCounter
from .registry import Models
from .routes import RouteTable
from .service import Service, Settings
from .turns import RequestTurns
from .wire import anthropic, chat_completions, embeddings, ollama, responses_api
from .wire.openapi import ERRORS

__all__ = ["Settings", "build"]

VERSION = metadata.version("ov-afm")
# Each adds the routes of one API.
APIS = (chat_completions, responses_api, anthropic, ollama, embeddings)


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

    app = FastAPI(title="ov-afm", version=VERSION, lifespan=lifespan, redoc_url=None, redirect_slashes=False)
    errors.install(app)
    for api in APIS:
        api.add_routes(app, service)
    _add_routes(app, service)
    routes = RouteTable(app.routes)
    # The last one added is the first that a request meets.
    app.add_middleware(BodyChecks, max_body_bytes=settings.max_body_bytes, takes_json=routes.takes_json)
    app.add_middleware(RequestChecks, api_keys=settings.api_keys, hosts=settings.hosts, routes=routes)
    if origins := settings.cors_origins:
        app.add_middleware(CORSMiddleware, allow_origins=origins, allow_methods=["*"], allow_headers=["*"])
    app.add_middleware(RequestCounter, metrics=service.metrics, routes=routes.paths)
    app.add_middleware(RequestTurns)
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
