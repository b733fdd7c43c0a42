"""The HTTP side: routes, and what each asks of the engine."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from starlette.middleware.cors import CORSMiddleware

from .. import __version__
from . import errors as faults
from . import protocol as wire
from . import structured_output
from .errors import WireError
from .middleware import Guard
from .prometheus import Instruments, RequestCounter
from .registry import Models
from .responses import Answer, EventStream, chat_answer, completion_answer, open_stream, until_gone

__all__ = ["Service", "Settings", "build"]

logger = logging.getLogger(__name__)

JSON_ROUTES = frozenset({"/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"})
ROUTES = JSON_ROUTES | {"/v1/models", "/health", "/metrics", "/version"}
SEED_RANGE = 2**63
# Below it logits overflow the engine's float32; the answer is the greedy one anyway.
COLDEST = 1e-3
# What a model of ours cannot do, by the field that asks for it.
UNAVAILABLE = {
    "top_logprobs": "the engine reports only the chosen token's probability",
    "logit_bias": "the engine has no logit bias",
    "functions": "use tools",
    "function_call": "use tool_choice",
    "audio": "this model writes text",
    "echo": "the prompt is not repeated",
    "suffix": "the model continues text, it does not fill in",
}
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": wire.ErrorEnvelope} for status in (400, 401, 404, 413, 415, 429, 500, 503, 504)
}

STREAMS: dict[int | str, dict[str, Any]] = {
    **ERRORS,
    200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}, "description": "Whole, or as a stream"},
}


@dataclass(frozen=True, slots=True)
class Settings:
    """How the server behaves towards its clients.

    Attributes:
        api_keys: Keys of which a request must show one; none asks for none.
        max_body_bytes: Longest body.
        cors_origins: Web origins that may call; none by default.
        keep_alive_s: Seconds of silence after which a stream carries a comment.
        log_prompts: Write prompts to the log.
    """

    api_keys: tuple[str, ...] = ()
    max_body_bytes: int = 8 * 2**20
    cors_origins: tuple[str, ...] = ()
    keep_alive_s: float = 10.0
    log_prompts: bool = False


class Service:
    """What the routes do.

    Args:
        models: The models on offer.
        settings: How to behave.
    """

    def __init__(self, models: Models, settings: Settings) -> None:
        self.models, self.settings, self.instruments = models, settings, Instruments()
        for name, engine in models.engines.items():
            self.instruments.watch(
                name,
                {
                    "running_requests": lambda engine=engine: engine.running,  # type: ignore[misc]
                    "queued_requests": lambda engine=engine: engine.waiting,  # type: ignore[misc]
                    "kv_cache_usage_ratio": lambda engine=engine: engine.cache_usage,  # type: ignore[misc]
                    "engine_restarts": lambda engine=engine: engine.restarts,  # type: ignore[misc]
                    "engine_ready": lambda engine=engine: engine.state == "ready",  # type: ignore[misc]
                },
            )

    async def chat(self, body: wire.ChatRequest, request: Request) -> Any:
        """Answer a conversation."""
        self._inspect(body)
        if body.logprobs and body.stream:
            raise WireError(400, "logprobs cannot be streamed; leave one of the two out", param="logprobs")
        if body.modalities and body.modalities != ["text"]:
            raise WireError(400, f"modalities: this model writes text, found {body.modalities}", param="modalities")
        form, tools = structured_output.form_of(body), structured_output.tools_for(body)
        name = self.models.resolve(body.model)
        engine = await until_gone(request, self.models.engine(name))
        knows_tools = bool(engine.info.get("template_knows_tools"))
        task: dict[str, Any] = {
            "messages": structured_output.messages_for(body, template_knows_tools=knows_tools),
            "form": form,
        }
        if tools and knows_tools:
            task["tools"] = [tool.model_dump(exclude_none=True) for tool in tools]
        if body.chat_template_kwargs:
            task["template_options"] = body.chat_template_kwargs
        limit = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
        answer = Answer(name, True, self.instruments, reads_calls=bool(tools), wants_logprobs=bool(body.logprobs))
        return await self._answer(body, request, answer, task, limit)

    async def complete(self, body: wire.CompletionRequest, request: Request) -> Any:
        """Continue a text."""
        self._inspect(body)
        if body.logprobs and not body.stream:
            message = "logprobs above 0 asks for alternatives; the engine reports only the chosen token's"
            raise WireError(400, message, param="logprobs")
        if body.logprobs is not None and body.stream:
            raise WireError(400, "logprobs cannot be streamed; leave one of the two out", param="logprobs")
        if body.best_of is not None and body.best_of != (body.n or 1):
            raise WireError(400, f"best_of must equal n, found {body.best_of}", param="best_of")
        name = self.models.resolve(body.model)
        prompt = body.prompt[0] if isinstance(body.prompt, list) and len(body.prompt) == 1 else body.prompt
        if isinstance(prompt, int):
            prompt = [prompt]
        if isinstance(prompt, list) and not all(isinstance(each, int) for each in prompt):
            raise WireError(400, f"one prompt a request, found {len(prompt)}", param="prompt")
        task: dict[str, Any] = {"prompt": prompt} if isinstance(prompt, str) else {"tokens": prompt}
        answer = Answer(name, False, self.instruments, wants_logprobs=body.logprobs is not None)
        return await self._answer(body, request, answer, task, body.max_tokens)

    def _inspect(self, body: wire.SamplingRequest) -> None:
        """Refuse what cannot be done, and name what is not known."""
        for field, reason in UNAVAILABLE.items():
            if getattr(body, field, None):
                raise WireError(400, f"{field} is not available: {reason}", param=field, code="unsupported_parameter")
        if body.model_extra:
            # repr: a field's name is the client's text and must stay within its line.
            logger.warning(
                "ignored unknown fields: %s", ", ".join(repr(key)[:60] for key in list(body.model_extra)[:10])
            )
        if body.stream_options is not None and not body.stream:
            raise WireError(400, "stream_options needs stream: true", param="stream_options")

    async def _answer(
        self, body: wire.SamplingRequest, request: Request, answer: Answer, task: dict[str, Any], limit: int | None
    ) -> Any:
        answer.count = body.n or 1
        answer.wants_usage = bool(body.stream_options and body.stream_options.include_usage)
        if self.settings.log_prompts:
            logger.warning("prompt: %s", json.dumps(task))
        params = sampling(body, limit)
        task |= {"op": "generate", "logprobs": answer.wants_logprobs}
        tasks: list[Mapping[str, Any]] = [
            {**task, "params": params if index == 0 else {**params, "seed": _next_seed(params["seed"], index)}}
            for index in range(answer.count)
        ]
        engine = await until_gone(request, self.models.engine(answer.model))
        stream, lease = await until_gone(request, open_stream(engine, tasks))
        if body.stream:
            return EventStream(answer, stream, lease, keep_alive_s=self.settings.keep_alive_s)
        async with lease:
            make = chat_answer if answer.chat else completion_answer
            return await until_gone(request, make(answer, stream))

    async def tokenize(self, body: wire.TokenizeRequest) -> Any:
        """Tokens of text or messages."""
        if (body.prompt is None) == (body.messages is None):
            raise WireError(400, "give either prompt or messages", param="prompt")
        engine = await self.models.engine(self.models.resolve(body.model))
        if body.messages is not None:
            chat = wire.ChatRequest(messages=body.messages)
            return await engine.ask(
                {"op": "tokenize", "messages": structured_output.messages_for(chat, template_knows_tools=True)}
            )
        special = body.add_special_tokens is not False
        return await engine.ask({"op": "tokenize", "prompt": body.prompt, "special": special})

    async def detokenize(self, body: wire.DetokenizeRequest) -> Any:
        """Text of tokens."""
        engine = await self.models.engine(self.models.resolve(body.model))
        return await engine.ask({"op": "detokenize", "tokens": body.tokens})

    def list_models(self) -> wire.ModelList:
        """The models on offer."""
        return wire.ModelList(data=[self.model(name) for name in self.models.engines])

    def model(self, name: str) -> wire.Model:
        """One of them."""
        known = self.models.resolve(name)
        length = self.models.engines[known].info.get("context_length")
        return wire.Model(id=known, created=self.models.created, max_model_len=length)


def sampling(body: wire.SamplingRequest, limit: int | None) -> dict[str, Any]:
    """The fields of `Params` that a request sets."""
    import secrets

    stop = body.stop or []
    fields = {
        "max_new_tokens": limit,
        "temperature": 0.0 if body.temperature is not None and body.temperature < COLDEST else body.temperature,
        "top_p": body.top_p,
        "top_k": None if body.top_k is None else max(body.top_k, 0),
        "min_p": body.min_p,
        "repetition_penalty": body.repetition_penalty,
        "presence_penalty": body.presence_penalty,
        "frequency_penalty": body.frequency_penalty,
        "seed": secrets.randbits(32) if body.seed is None else body.seed % SEED_RANGE,
        "stop": [stop] if isinstance(stop, str) else stop,
        "ignore_eos": body.ignore_eos,
    }
    return {key: value for key, value in fields.items() if value is not None}


def _next_seed(seed: int, index: int) -> int:
    return (seed + index) % SEED_RANGE


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

    app = FastAPI(title="ov-afm", version=__version__, lifespan=lifespan, redoc_url=None)
    faults.install(app)
    _add_routes(app, service)
    # The last one added is the first that a request meets.
    app.add_middleware(
        Guard, api_keys=settings.api_keys, max_body_bytes=settings.max_body_bytes, json_routes=JSON_ROUTES
    )
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=settings.cors_origins, allow_methods=["*"], allow_headers=["*"]
        )
    app.add_middleware(RequestCounter, instruments=service.instruments, routes=ROUTES)
    return app


def _add_routes(app: FastAPI, service: Service) -> None:
    async def health() -> JSONResponse:
        well, status = service.models.status()
        return JSONResponse({"status": status}, 200 if well else 503)

    def metrics() -> PlainTextResponse:
        return PlainTextResponse(service.instruments.text(), media_type="text/plain; version=0.0.4")

    def version() -> wire.Version:
        return wire.Version(version=__version__)

    async def chat(body: wire.ChatRequest, request: Request) -> Response:
        return await service.chat(body, request)  # type: ignore[no-any-return]

    async def complete(body: wire.CompletionRequest, request: Request) -> Response:
        return await service.complete(body, request)  # type: ignore[no-any-return]

    async def tokenize(body: wire.TokenizeRequest) -> Any:
        return await service.tokenize(body)

    async def detokenize(body: wire.DetokenizeRequest) -> Any:
        return await service.detokenize(body)

    def one_model(model_id: str) -> wire.Model:
        return service.model(model_id)

    add = app.add_api_route
    unready: dict[int | str, dict[str, Any]] = {503: {"model": wire.Health}}
    add("/v1/chat/completions", chat, methods=["POST"], response_model=wire.ChatCompletion, responses=STREAMS)
    add("/v1/completions", complete, methods=["POST"], response_model=wire.Completion, responses=STREAMS)
    add("/tokenize", tokenize, methods=["POST"], response_model=wire.Tokens, responses=ERRORS)
    add("/detokenize", detokenize, methods=["POST"], response_model=wire.Text, responses=ERRORS)
    add("/v1/models", service.list_models, methods=["GET"], response_model=wire.ModelList, responses=ERRORS)
    add("/v1/models/{model_id:path}", one_model, methods=["GET"], response_model=wire.Model, responses=ERRORS)
    add("/health", health, methods=["GET"], response_model=wire.Health, responses=unready)
    add("/metrics", metrics, methods=["GET"], response_class=PlainTextResponse)
    add("/version", version, methods=["GET"], response_model=wire.Version)
