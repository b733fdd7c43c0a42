"""Anthropic's Messages API: whole answers, the events of a stream, and the tokens of a prompt.

An answer is a list of blocks. A stream opens a block, adds to it and closes it before the next one; a whole answer is
the same events put together, so the two cannot differ.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel

from ...system.json_text import parse
from ..answers import Part, Running, until_gone
from ..errors import APIError, as_api_error
from ..protocol import ChatRequest
from ..service import Service
from .anthropic_requests import CountRequest, MessagesRequest, chat_request
from .openapi import STATUSES

__all__ = ["add_routes"]

PATH = "/v1/messages"
# The first version with today's events. Later ones (2026-10-21) leave out request fields and keep the form of answers.
FIRST_VERSION = "2023-06-01"
VERSION = re.compile(r"20\d\d-\d\d-\d\d")
# Clients keep a thought's signature and send it back; nobody here reads it.
SIGNATURE = "unsigned"

Event = dict[str, Any]


class Problem(BaseModel):
    """What went wrong."""

    type: str
    message: str


class ErrorAnswer(BaseModel):
    """Every error has this form."""

    type: str
    error: Problem
    request_id: str | None = None


class Count(BaseModel):
    """Tokens of a prompt."""

    input_tokens: int


ERRORS: dict[int | str, dict[str, Any]] = {status: {"model": ErrorAnswer} for status in STATUSES}
STREAMS: dict[int | str, dict[str, Any]] = {
    **ERRORS,
    200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}, "description": "Whole, or as a stream"},
}


def add_routes(app: FastAPI, service: Service) -> None:
    """Add this API's routes to the application."""

    async def messages(body: MessagesRequest, request: Request) -> Any:
        """Answer a conversation."""
        _check_version(request)
        running = await service.begin_chat(await translated(body, request), request)
        headers = {"request-id": f"req_{secrets.token_hex(12)}"}
        if body.stream:
            response = service.event_stream(running, stream(running, body))
            response.headers.update(headers)
            return response
        async with running.lease:
            return JSONResponse(await until_gone(request, whole(running, body)), headers=headers)

    async def count(body: CountRequest, request: Request) -> Count:
        """Count the tokens of a prompt."""
        _check_version(request)
        chat = await translated(body, request)
        return Count(input_tokens=await until_gone(request, service.count_tokens(chat)))

    async def translated(body: CountRequest, request: Request) -> ChatRequest:
        engine = await until_gone(request, service.models.engine(service.models.resolve(body.model)))
        return chat_request(body, engine.info)

    app.add_api_route(PATH, messages, methods=["POST"], response_model=None, responses=STREAMS)
    app.add_api_route(f"{PATH}/count_tokens", count, methods=["POST"], response_model=Count, responses=ERRORS)


def _check_version(request: Request) -> None:
    version = request.headers.get("anthropic-version")
    if version is not None and (not VERSION.fullmatch(version) or version < FIRST_VERSION):
        message = f"anthropic-version: this server speaks {FIRST_VERSION} and later ones, found {version[:60]!r}"
        raise APIError(message, "anthropic-version")


async def whole(running: Running, body: MessagesRequest) -> dict[str, Any]:
    """The answer to a request that wants no stream."""
    message: dict[str, Any] = {}
    arguments: dict[int, str] = {}
    async for event in events(running, body):
        if event["type"] == "message_start":
            message = event["message"]
        elif event["type"] == "content_block_start":
            message["content"].append(event["content_block"])
        elif event["type"] == "content_block_delta":
            delta = event["delta"]
            if delta["type"] == "input_json_delta":
                arguments[event["index"]] = arguments.get(event["index"], "") + delta["partial_json"]
            else:
                (name,) = delta.keys() - {"type"}
                message["content"][event["index"]][name] += delta[name]
        elif event["type"] == "message_delta":
            message |= event["delta"]
            message["usage"] = event["usage"]
    content, message["content"] = message["content"], []
    for index, block in enumerate(content):
        if block["type"] == "tool_use":
            try:
                block["input"] = parse(arguments.get(index, ""))
            except ValueError:
                # The limit cut the call off: it has no input that could be run.
                continue
        message["content"].append(block)
    return message


async def stream(running: Running, body: MessagesRequest) -> AsyncIterator[bytes]:
    """The events of a stream, as bytes."""
    try:
        async for event in events(running, body):
            yield _encoded(event)
    except Exception as error:  # noqa: BLE001 - the status is out already, so the error can only be an event
        yield _encoded(as_api_error(error).body(PATH))


def _encoded(event: Event) -> bytes:
    return f"event: {event['type']}\ndata: {json.dumps(event, ensure_ascii=False)}\n\n".encode()


async def events(running: Running, body: MessagesRequest) -> AsyncIterator[Event]:
    """What a stream consists of."""
    blocks = _Blocks(hides_thoughts=body.thinking is not None and body.thinking.display == "omitted")
    yield {"type": "message_start", "message": _message(running, body)}
    yield {"type": "ping"}
    async for part in running.parts():
        # A limit of 0 only fills the prefix cache.
        for delta in part.deltas if body.max_tokens else ():
            for event in blocks.add(delta):
                yield event
        if part.finish is not None:
            for event in blocks.close():
                yield event
            yield _end(running, body, part)
    yield {"type": "message_stop"}


def _message(running: Running, body: MessagesRequest) -> dict[str, Any]:
    message: Event = {
        "id": f"msg_{running.answer.id.rpartition('-')[2]}",
        "type": "message",
        "role": "assistant",
        "model": body.model,
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "usage": _usage(running.stream.prompt_tokens, 0),
    }
    if body.context_management is not None:
        message["context_management"] = {"applied_edits": []}
    return message


def _usage(input_tokens: int, output_tokens: int) -> dict[str, int]:
    """Tokens; all of the prompt's are counted as input, from the prefix cache or not."""
    return {
        "input_tokens": input_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": 0,
        "output_tokens": output_tokens,
    }


def _end(running: Running, body: MessagesRequest, part: Part) -> Event:
    tokens = min(running.answer.new_tokens, body.max_tokens)
    if part.finish == "length":
        reason = "max_tokens" if tokens >= body.max_tokens else "model_context_window_exceeded"
    elif part.finish == "tool_calls":
        reason = "tool_use"
    else:
        reason = "end_turn" if part.stop is None else "stop_sequence"
    delta = {"stop_reason": reason, "stop_sequence": part.stop}
    return {"type": "message_delta", "delta": delta, "usage": _usage(running.stream.prompt_tokens, tokens)}


@dataclass(slots=True)
class _Blocks:
    """The blocks of one answer: opens, continues and closes them as its parts come.

    Attributes:
        hides_thoughts: Thoughts are told to have been, and not what they were.
        index: The block that is open, or that was the last one.
        kind: What the open block is; None if none is open.
    """

    hides_thoughts: bool = False
    index: int = field(default=-1, init=False)
    kind: str | None = field(default=None, init=False)

    def add(self, delta: Mapping[str, Any]) -> Iterator[Event]:
        """The events for a delta in OpenAI's form."""
        if thoughts := delta.get("reasoning_content"):
            if self.kind != "thinking":
                yield from self._open({"type": "thinking", "thinking": "", "signature": ""})
            if not self.hides_thoughts:
                yield self._delta("thinking_delta", thinking=thoughts)
        if text := delta.get("content"):
            if self.kind != "text":
                yield from self._open({"type": "text", "text": ""})
            yield self._delta("text_delta", text=text)
        for call in delta.get("tool_calls", ()):
            function = call["function"]
            if "id" in call:
                call_id = f"toolu_{call['id'].removeprefix('call_')}"
                yield from self._open({"type": "tool_use", "id": call_id, "name": function["name"], "input": {}})
            if function.get("arguments"):
                yield self._delta("input_json_delta", partial_json=function["arguments"])

    def close(self) -> Iterator[Event]:
        """The events that end the open block."""
        if self.kind == "thinking":
            yield self._delta("signature_delta", signature=SIGNATURE)
        if self.kind is not None:
            yield {"type": "content_block_stop", "index": self.index}
        self.kind = None

    def _open(self, block: dict[str, Any]) -> Iterator[Event]:
        yield from self.close()
        self.index, self.kind = self.index + 1, block["type"]
        yield {"type": "content_block_start", "index": self.index, "content_block": block}

    def _delta(self, kind: str, **fields: str) -> Event:
        return {"type": "content_block_delta", "index": self.index, "delta": {"type": kind, **fields}}
