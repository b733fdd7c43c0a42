"""Embeddings in Ollama's two forms: of several texts (`/api/embed`), and of one (`/api/embeddings`)."""

from __future__ import annotations

import time
from typing import Annotated, Any

from fastapi import FastAPI, Request
from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr

from ...model_dir.text_encoder import EMBEDDING
from ..errors import APIError
from ..service import Service
from .embeddings import MAX_TEXTS, embed

__all__ = ["add_routes"]


class Body(BaseModel):
    """What both requests have; how a model is loaded (`options`, `keep_alive`) changes nothing in an embedding."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    model: Annotated[StrictStr, Field(min_length=1)]
    options: dict[str, Any] | None = None
    keep_alive: StrictStr | float | None = None


class EmbedRequest(Body):
    """Body of `POST /api/embed`."""

    input: StrictStr | Annotated[list[StrictStr], Field(max_length=MAX_TEXTS)]
    truncate: StrictBool | None = None
    dimensions: Annotated[StrictInt, Field(ge=1)] | None = None


class EmbeddingsRequest(Body):
    """Body of `POST /api/embeddings`."""

    prompt: StrictStr


class EmbedAnswer(BaseModel):
    """Answer of `POST /api/embed`; durations in nanoseconds."""

    model: str
    embeddings: list[list[float]]
    total_duration: int
    load_duration: int = 0
    prompt_eval_count: int


class EmbeddingsAnswer(BaseModel):
    """Answer of `POST /api/embeddings`."""

    embedding: list[float]


def add_routes(app: FastAPI, service: Service, errors: dict[int | str, dict[str, Any]]) -> None:
    """Add these routes to the application.

    Args:
        app: The application.
        service: What answers.
        errors: How /openapi.json describes errors.
    """

    async def several(body: EmbedRequest, request: Request) -> EmbedAnswer:
        """Embeddings of length 1, one for each text."""
        begun = time.perf_counter()
        name, prompt = _model(service, body.model)
        texts: list[str | list[int]] = [body.input] if isinstance(body.input, str) else [*body.input]
        rows: list[list[float]] = []
        tokens = 0
        if texts:
            options: dict[str, Any] = {"columns": _columns(service, name, body.dimensions), "normalize": True}
            cut = body.truncate is not False
            values, tokens = await embed(service, request, name, texts, prompt=prompt, cut=cut, **options)
            rows = values.tolist()
        took = round((time.perf_counter() - begun) * 1e9)
        return EmbedAnswer(model=body.model, embeddings=rows, total_duration=took, prompt_eval_count=tokens)

    async def one(body: EmbeddingsRequest, request: Request) -> EmbeddingsAnswer:
        """The embedding of a text, as the model gives it."""
        name, prompt = _model(service, body.model)
        values, _ = await embed(service, request, name, [body.prompt], prompt=prompt, cut=True)
        return EmbeddingsAnswer(embedding=values[0].tolist())

    add = app.add_api_route
    add("/api/embed", several, methods=["POST"], response_model=EmbedAnswer, responses=errors)
    add("/api/embeddings", one, methods=["POST"], response_model=EmbeddingsAnswer, responses=errors)


def _model(service: Service, asked: str) -> tuple[str, str]:
    """A model for embeddings, and what it wants in front of a text."""
    name = service.models.resolve(asked, EMBEDDING)
    facts = service.models.engines[name].spec.text_encoder
    return name, facts.prompts[facts.default_prompt] if facts and facts.default_prompt else ""


def _columns(service: Service, name: str, asked: int | None) -> int | None:
    facts = service.models.engines[name].spec.text_encoder
    if asked is None or facts is None or asked == facts.dimensions:
        return None
    if not facts.can_shorten or asked > facts.dimensions or asked not in (facts.shorter or (asked,)):
        message = f"dimensions: embeddings of {name} have {facts.dimensions}, found {asked}; leave it out"
        raise APIError(message, "dimensions")
    return asked
