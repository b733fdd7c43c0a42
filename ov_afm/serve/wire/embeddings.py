"""Embeddings in OpenAI's form, and reranking in that of Jina and Cohere.

Neither form says whether a text is a query or a document, or what becomes of one that is too long. Where models care,
fields that other servers have are taken: `input_type` (Cohere), `prompt_name` and `truncate` (Hugging Face's
text-embeddings-inference), `truncate_prompt_tokens` (vLLM).
"""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import secrets
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import FastAPI, Request
from fastapi.responses import Response
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr, field_validator
from pydantic_core import PydanticCustomError

from ...model_dir.text_encoder import EMBEDDING, RERANKING, TextEncoder
from ..answers import until_gone
from ..errors import APIError
from ..messages import Embed, Encoded, Rerank
from ..protocol import Token
from ..service import Service
from .openapi import ERRORS

__all__ = ["EmbeddingRequest", "RerankRequest", "add_routes", "embed"]

logger = logging.getLogger(__name__)
# OpenAI's bound for one request.
MAX_TEXTS = 2048
# What clients call the kinds of texts, and the names that models give to the prompts for them.
INPUT_TYPES = {"search_query": "query", "search_document": "document", "passage": "document"}
PROMPT_NAMES = {
    "query": ("query", "search_query", "retrieval.query"),
    "document": ("document", "passage", "search_document", "retrieval.passage"),
}
InputType = Literal["query", "document", "passage", "search_query", "search_document", "classification", "clustering"]


class Body(BaseModel):
    """What both requests have; unknown fields are refused by name."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    model: StrictStr | None = None
    user: StrictStr | None = None
    truncate: StrictBool | Literal["NONE", "END", "START"] | None = None
    truncate_prompt_tokens: Annotated[StrictInt, Field(ge=-1)] | None = None

    def cut(self, service: Service) -> bool:
        """Whether the ends of texts that are too long are left out.

        Raises:
            APIError: Something else is to be left out.
        """
        if self.truncate == "START":
            raise APIError("truncate: only the end of a text can be left out (END), found START", "truncate")
        if self.truncate_prompt_tokens not in (None, -1):
            message = "truncate_prompt_tokens: texts are cut to what the model reads, which is -1, found "
            raise APIError(f"{message}{self.truncate_prompt_tokens}", "truncate_prompt_tokens")
        if self.truncate is None and self.truncate_prompt_tokens is None:
            return service.settings.truncate
        return self.truncate in (True, "END") or self.truncate_prompt_tokens == -1


class EmbeddingRequest(Body):
    """Body of `POST /v1/embeddings`."""

    input: (
        StrictStr
        | Annotated[list[Token], Field(min_length=1)]
        | Annotated[list[StrictStr], Field(min_length=1, max_length=MAX_TEXTS)]
        | Annotated[list[Annotated[list[Token], Field(min_length=1)]], Field(min_length=1, max_length=MAX_TEXTS)]
    )
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[StrictInt, Field(ge=1)] | None = None
    input_type: InputType | None = None
    prompt_name: StrictStr | None = None
    normalize: StrictBool | None = None

    @field_validator("input", mode="before")
    @classmethod
    def _one_message(cls, value: Any) -> Any:
        """Say what is wrong once, not for each form that an input may have."""
        many = value if isinstance(value, list) else [value]
        kinds = {type(each) for each in many}
        if not many or len(many) > MAX_TEXTS and kinds != {int}:
            count = f"1 to {MAX_TEXTS} texts, found {len(many)}"
            raise PydanticCustomError("input", "a request has {count}", {"count": count})
        if len(kinds) > 1 or not kinds <= {str, int, list}:
            raise PydanticCustomError("input", "texts are needed, or lists of tokens, and not both")
        return value

    @property
    def texts(self) -> list[str | list[int]]:
        """The input as a list."""
        if isinstance(self.input, str):
            return [self.input]
        if isinstance(self.input[0], int):
            return [[each for each in self.input if isinstance(each, int)]]
        return [each for each in self.input if not isinstance(each, int)]


class EmbeddingUsage(BaseModel):
    """Tokens that were read."""

    prompt_tokens: int
    total_tokens: int


class Embedding(BaseModel):
    """One embedding; as base64, the numbers are float32 in little-endian order."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingList(BaseModel):
    """Answer of `POST /v1/embeddings`."""

    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


class Document(BaseModel):
    """A document of a request or an answer."""

    model_config = ConfigDict(extra="forbid")

    text: StrictStr


class RerankRequest(Body):
    """Body of `POST /v1/rerank`."""

    query: StrictStr
    documents: Annotated[list[StrictStr | Document], Field(min_length=1, max_length=MAX_TEXTS)]
    top_n: Annotated[StrictInt, Field(ge=1)] | None = None
    return_documents: StrictBool | None = None


class RerankResult(BaseModel):
    """A document's place in the request and its score, from 0 to 1."""

    index: int
    relevance_score: float
    document: Document | None = None


class RerankAnswer(BaseModel):
    """Answer of `POST /v1/rerank`, the best document first."""

    id: str
    model: str
    results: list[RerankResult]
    usage: EmbeddingUsage


def add_routes(app: FastAPI, service: Service) -> None:
    """Add the routes to an application."""

    async def embeddings(body: EmbeddingRequest, request: Request) -> Response:
        name, facts = _model(service, body.model, EMBEDDING)
        columns = _columns(body, facts, name)
        if body.normalize is False and facts.normalize:
            raise APIError(f"normalize: embeddings of {name} have the length 1; leave it out", "normalize")
        rows, tokens = await embed(
            service,
            request,
            name,
            body.texts,
            prompt=_prompt(body, facts, name),
            cut=body.cut(service),
            columns=columns,
            normalize=bool(body.normalize),
        )
        as_text = body.encoding_format == "base64"
        content = await asyncio.to_thread(_embedding_list, rows, name, tokens, as_text=as_text)
        return Response(content, media_type="application/json")

    async def rerank(body: RerankRequest, request: Request) -> RerankAnswer:
        name, _ = _model(service, body.model, RERANKING)
        documents = [each if isinstance(each, str) else each.text for each in body.documents]
        _log(service, [body.query, *documents])
        engine = await until_gone(request, service.models.engine(name))
        task = Rerank(body.query, documents, body.cut(service))
        answer: Encoded = await until_gone(request, engine.ask(task))
        scores = np.frombuffer(answer.rows, np.float32).tolist()
        order = sorted(range(len(scores)), key=lambda index: -scores[index])[: body.top_n]
        results = [
            RerankResult(
                index=index,
                relevance_score=scores[index],
                document=Document(text=documents[index]) if body.return_documents else None,
            )
            for index in order
        ]
        usage = EmbeddingUsage(prompt_tokens=answer.tokens, total_tokens=answer.tokens)
        return RerankAnswer(id=f"rerank-{secrets.token_hex(12)}", model=name, results=results, usage=usage)

    add = app.add_api_route
    add("/v1/embeddings", embeddings, methods=["POST"], response_model=EmbeddingList, responses=ERRORS)
    for path in ("/v1/rerank", "/rerank", "/v2/rerank"):
        options: dict[str, Any] = {"response_model": RerankAnswer, "response_model_exclude_none": True}
        add(path, rerank, methods=["POST"], responses=ERRORS, include_in_schema=path == "/v1/rerank", **options)


async def embed(
    service: Service,
    request: Request,
    name: str,
    texts: list[str | list[int]],
    *,
    prompt: str = "",
    cut: bool = False,
    columns: int | None = None,
    normalize: bool = False,
) -> tuple[NDArray[np.float32], int]:
    """Embeddings of texts, one row each, and the tokens that were read.

    Args:
        service: The server's service.
        request: The client's request.
        name: A model for embeddings.
        texts: The texts, each as it is or as its tokens.
        prompt: What is put in front of each.
        cut: Leave out the end of a text that is too long.
        columns: Numbers of an embedding that are kept; None keeps all.
        normalize: Give each the length 1, whatever the model does.

    Raises:
        APIError: A text cannot be read by the model, or the client has left.
    """
    _log(service, texts)
    engine = await until_gone(request, service.models.engine(name))
    answer: Encoded = await until_gone(request, engine.ask(Embed(texts, prompt, cut)))
    rows = np.frombuffer(answer.rows, np.float32).reshape(-1, answer.columns)
    facts = engine.spec.text_encoder
    if columns is not None and columns < answer.columns:
        rows = rows[:, :columns]
        # What is left of a vector of length 1 is shorter.
        normalize = normalize or bool(facts and facts.normalize)
    if normalize:
        rows = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), np.float32(1e-12))
    return np.ascontiguousarray(rows, np.float32), answer.tokens


def _model(service: Service, name: str | None, task: str) -> tuple[str, TextEncoder]:
    name = service.models.resolve(name, task)
    facts = service.models.engines[name].spec.text_encoder
    assert facts is not None
    return name, facts


def _log(service: Service, texts: list[Any]) -> None:
    if service.settings.log_prompts:
        logger.warning("texts: %s", json.dumps(texts))


def _columns(body: EmbeddingRequest, facts: TextEncoder, name: str) -> int | None:
    """Numbers that an embedding shall have.

    Raises:
        APIError: The model was not trained for that.
    """
    asked, most = body.dimensions, facts.dimensions
    if asked is None or asked == most or (facts.can_shorten and asked < most and asked in (facts.shorter or (asked,))):
        return asked
    if not facts.can_shorten:
        message = f"dimensions: embeddings of {name} have {most} and were not trained to be cut, found {asked}"
    else:
        allowed = ", ".join(map(str, facts.shorter)) or f"1 to {most}"
        message = f"dimensions: embeddings of {name} may have {allowed}, found {asked}"
    raise APIError(f"{message}; leave it out", "dimensions")


def _prompt(body: EmbeddingRequest, facts: TextEncoder, name: str) -> str:
    """What the model wants in front of the texts.

    Raises:
        APIError: It has no prompt of that name.
    """
    if body.prompt_name is not None:
        if body.prompt_name not in facts.prompts:
            known = ", ".join(facts.prompts) or "none"
            message = f"prompt_name: {name} has no prompt {body.prompt_name[:60]!r}; it has: {known}"
            raise APIError(message, "prompt_name")
        return facts.prompts[body.prompt_name]
    if body.input_type is not None:
        kind = INPUT_TYPES.get(body.input_type, body.input_type)
        names = PROMPT_NAMES.get(kind, (kind,))
        # A model without one reads such texts as they are.
        return next((facts.prompts[each] for each in names if each in facts.prompts), "")
    return facts.prompts[facts.default_prompt] if facts.default_prompt else ""


def _embedding_list(rows: NDArray[np.float32], name: str, tokens: int, *, as_text: bool) -> bytes:
    numbers = rows.astype("<f4")
    data = [
        {
            "object": "embedding",
            "index": index,
            "embedding": base64.b64encode(row.tobytes()).decode() if as_text else row.tolist(),
        }
        for index, row in enumerate(numbers)
    ]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return json.dumps({"object": "list", "data": data, "model": name, "usage": usage}).encode()
