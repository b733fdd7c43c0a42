"""Ollama's API: chats and completions, as one JSON object or as a stream of them, one a line."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import PlainTextResponse
from pydantic import BaseModel

from ...system.json_text import parse
from ..answers import EventStream, Part, Running, until_gone
from ..errors import as_api_error
from ..messages import ModelInfo
from ..service import Service
from . import ollama_embeddings
from .ollama_models import Catalogue, ModelTable, ShowAnswer
from .ollama_requests import (
    OllamaChat,
    OllamaGenerate,
    OllamaRequest,
    ShowRequest,
    chat_request,
    completion_request,
    generate_request,
)
from .openapi import STATUSES

__all__ = ["add_routes"]

# The release of Ollama whose API this is. Clients ask for it: VS Code wants 0.6.4 or newer.
VERSION = "0.13.0"
PATH = "/api/chat"
# Lines of JSON have no comments that could keep a connection alive.
NEVER_S = 1e9


class Problem(BaseModel):
    """Every error has this form."""

    error: str


class VersionAnswer(BaseModel):
    """Answer of `GET /api/version`."""

    version: str


ERRORS: dict[int | str, dict[str, Any]] = {status: {"model": Problem} for status in STATUSES}
STREAMS: dict[int | str, dict[str, Any]] = {
    **ERRORS,
    200: {"content": {"application/x-ndjson": {"schema": {"type": "string"}}}, "description": "Whole, or as a stream"},
}


def add_routes(app: FastAPI, service: Service) -> None:
    """Add this API's routes to the application."""
    api, catalogue = Ollama(service), Catalogue(service)

    def home() -> PlainTextResponse:
        return PlainTextResponse("ov-afm is running")

    def version() -> VersionAnswer:
        return VersionAnswer(version=VERSION)

    def show(body: ShowRequest) -> ShowAnswer:
        """Describe a model."""
        return catalogue.show(body.model or body.name)

    add = app.add_api_route
    add("/", home, methods=["GET"], response_class=PlainTextResponse)
    add(PATH, api.chat, methods=["POST"], response_model=None, responses=STREAMS)
    add("/api/generate", api.generate, methods=["POST"], response_model=None, responses=STREAMS)
    add("/api/show", show, methods=["POST"], response_model=ShowAnswer, responses=ERRORS)
    add(
        "/api/tags",
        catalogue.tags,
        methods=["GET"],
        response_model=ModelTable,
        response_model_exclude_none=True,
        responses=ERRORS,
    )
    add(
        "/api/ps",
        catalogue.loaded,
        methods=["GET"],
        response_model=ModelTable,
        response_model_exclude_none=True,
        responses=ERRORS,
    )
    add("/api/version", version, methods=["GET"], response_model=VersionAnswer, responses=ERRORS)
    ollama_embeddings.add_routes(app, service, ERRORS)


class Ollama:
    """What the routes that generate do.

    Args:
        service: What answers.
    """

    def __init__(self, service: Service) -> None:
        self._service = service

    async def chat(self, body: OllamaChat, request: Request) -> Any:
        """Answer a conversation; one without messages only loads the model."""
        call = Call(body, is_chat=True)
        info = await self._load(call, request)
        if not body.messages:
            return call.object(Taken()) | call.loaded()
        running = await self._service.begin_chat(chat_request(body, info), request)
        return await self._respond(running, call, request)

    async def generate(self, body: OllamaGenerate, request: Request) -> Any:
        """Answer a question, or continue a text; without a prompt this only loads the model."""
        call = Call(body, is_chat=False)
        info = await self._load(call, request)
        if body.raw and body.prompt:
            running = await self._service.begin_completion(completion_request(body), request)
            return await self._respond(running, call, request)
        chat = generate_request(body, info)
        if not body.prompt:
            return call.object(Taken()) | call.loaded()
        return await self._respond(await self._service.begin_chat(chat, request), call, request)

    async def _load(self, call: Call, request: Request) -> ModelInfo | None:
        models = self._service.models
        engine = await until_gone(request, models.engine(models.resolve(call.body.model)))
        call.load_s = time.perf_counter() - call.begun
        return engine.info

    async def _respond(self, running: Running, call: Call, request: Request) -> dict[str, Any] | EventStream:
        if call.body.stream is False:
            async with running.lease:
                return await until_gone(request, call.whole(running))
        response = self._service.event_stream(running, call.lines(running))
        response.headers["content-type"] = "application/x-ndjson"
        response.ping_interval = NEVER_S
        return response


@dataclass(slots=True)
class Taken:
    """What an object of an answer says."""

    text: str = ""
    thinking: str = ""
    calls: list[dict[str, Any]] = field(default_factory=list)
    logprobs: list[dict[str, Any]] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.text or self.thinking or self.calls or self.logprobs)

    def add(self, other: Taken) -> None:
        """Add what a later object says."""
        self.text += other.text
        self.thinking += other.thinking
        self.calls += other.calls
        self.logprobs += other.logprobs


@dataclass(slots=True)
class Call:
    """A request under way, its times, and a tool call that is not complete.

    Attributes:
        body: The request.
        is_chat: A chat, or a completion.
        load_s: Time until the model was loaded.
    """

    body: OllamaRequest
    is_chat: bool
    load_s: float = 0.0
    begun: float = field(default_factory=time.perf_counter)
    _open: dict[str, Any] | None = None

    async def whole(self, running: Running) -> dict[str, Any]:
        """The answer to a request that wants no stream."""
        everything, last = Taken(), dict[str, Any]()
        async for taken, end in self._objects(running):
            everything.add(taken)
            last |= end
        return self.object(everything) | last

    async def lines(self, running: Running) -> AsyncIterator[bytes]:
        """The objects of a stream, one a line."""
        try:
            async for taken, end in self._objects(running):
                yield json.dumps(self.object(taken) | end, ensure_ascii=False).encode() + b"\n"
        except Exception as error:  # noqa: BLE001 - the status is out already, so the error can only be an object
            yield json.dumps(as_api_error(error).body(PATH), ensure_ascii=False).encode() + b"\n"

    def object(self, taken: Taken) -> dict[str, Any]:
        """An object of the answer, not its last one."""
        thinking = {"thinking": taken.thinking} if taken.thinking else {}
        calls = {"tool_calls": taken.calls} if taken.calls else {}
        logprobs = {"logprobs": taken.logprobs} if taken.logprobs else {}
        said: dict[str, Any] = {"response": taken.text, **thinking}
        if self.is_chat:
            said = {"message": {"role": "assistant", "content": taken.text, **thinking, **calls}}
        return {"model": self.body.model, "created_at": _now(), **said, "done": False, **logprobs}

    def loaded(self) -> dict[str, Any]:
        """What ends the answer to a request that only loads the model."""
        return {"done": True, "done_reason": "unload" if self.body.keep_alive in (0, "0", "0s") else "load"}

    async def _objects(self, running: Running) -> AsyncIterator[tuple[Taken, dict[str, Any]]]:
        """What each object says, and what only the last one has."""
        async for part in running.parts():
            taken = self._taken(part, is_chat=running.answer.chat)
            if taken:
                yield taken, {}
            if part.finish is not None:
                yield Taken(), self._end(running, part)

    def _taken(self, part: Part, *, is_chat: bool) -> Taken:
        taken = Taken()
        if self.body.logprobs:
            taken.logprobs = [
                {"token": each.token, "logprob": each.logprob, "bytes": list(each.bytes)} for each in part.logprobs
            ]
        deltas: list[dict[str, Any]] = part.deltas if is_chat else [{"content": part.text}]
        for delta in deltas:
            taken.text += delta.get("content") or ""
            taken.thinking += delta.get("reasoning_content") or ""
            taken.calls += self._calls(delta.get("tool_calls", ()))
        if part.finish is not None:
            taken.calls += self._complete()
        return taken

    def _calls(self, deltas: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """The calls that became complete: a call is sent as a whole, when the next one begins or the answer ends."""
        complete: list[dict[str, Any]] = []
        for delta in deltas:
            function = delta["function"]
            if "id" in delta:
                complete += self._complete()
                self._open = {"id": delta["id"], "index": delta["index"], "name": function["name"], "arguments": ""}
            if self._open is not None:
                self._open["arguments"] += function.get("arguments", "")
        return complete

    def _complete(self) -> list[dict[str, Any]]:
        call, self._open = self._open, None
        if call is None:
            return []
        try:
            arguments = parse(call["arguments"])
        except ValueError:
            # The limit cut the call off: it has no arguments that could be run.
            return []
        function = {"index": call["index"], "name": call["name"], "arguments": arguments}
        return [{"id": call["id"], "function": function}]

    def _end(self, running: Running, part: Part) -> dict[str, Any]:
        """Why the answer ended, and what it took, in nanoseconds."""
        answer = running.answer
        first = answer.first or answer.last
        return {
            "done": True,
            "done_reason": "length" if part.finish == "length" else "stop",
            "total_duration": _ns(time.perf_counter() - self.begun),
            "load_duration": _ns(self.load_s),
            "prompt_eval_count": answer.prompt_tokens,
            "prompt_eval_duration": _ns(first - answer.taken),
            "eval_count": answer.new_tokens,
            "eval_duration": _ns(answer.last - first),
        }


def _ns(seconds: float) -> int:
    return max(0, round(seconds * 1e9))


def _now() -> str:
    return datetime.now(timezone.utc).isoformat().replace("+00:00", "Z")
