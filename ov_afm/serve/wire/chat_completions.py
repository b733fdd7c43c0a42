"""OpenAI's chat completions and completions: whole answers, and the events of a stream."""

from __future__ import annotations

import itertools
import json
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from pydantic import BaseModel

from ..answers import Answer, Part, Running, until_gone
from ..errors import as_api_error
from ..protocol import (
    AnswerMessage,
    ChatChoice,
    ChatChunk,
    ChatCompletion,
    ChatRequest,
    Choice,
    ChunkChoice,
    Completion,
    CompletionRequest,
    SamplingRequest,
    Timings,
    Usage,
)
from ..service import Service
from .openapi import STREAMS

__all__ = ["add_routes"]

T = TypeVar("T")


def add_routes(app: FastAPI, service: Service) -> None:
    """Add this API's routes to the application."""

    async def chat(body: ChatRequest, request: Request) -> Any:
        """Answer a conversation."""
        return await respond(await service.begin_chat(body, request), body, request)

    async def complete(body: CompletionRequest, request: Request) -> Any:
        """Continue a text."""
        return await respond(await service.begin_completion(body, request), body, request)

    async def respond(running: Running, body: SamplingRequest, request: Request) -> Any:
        if body.stream:
            return service.event_stream(running, events(running))
        async with running.lease:
            return await until_gone(request, whole(running))

    add = app.add_api_route
    add("/v1/chat/completions", chat, methods=["POST"], response_model=ChatCompletion, responses=STREAMS)
    add("/v1/completions", complete, methods=["POST"], response_model=Completion, responses=STREAMS)


async def whole(running: Running) -> ChatCompletion | Completion:
    """The answer to a request that wants no stream."""
    answer = running.answer
    parts: list[list[Part]] = [[] for _ in range(answer.count)]
    async for part in running.parts():
        parts[part.index].append(part)
    if answer.chat:
        chats = [_chat_choice(index, each, answer) for index, each in enumerate(parts)]
        return _object(answer, ChatCompletion, chats, answer.usage, answer.timings)
    choices = [_completion_choice(index, each, answer) for index, each in enumerate(parts)]
    return _object(answer, Completion, choices, answer.usage, answer.timings)


def _object(
    answer: Answer,
    kind: Callable[..., T],
    choices: Sequence[BaseModel],
    usage: Usage | None,
    timings: Timings | None,
) -> T:
    return kind(id=answer.id, created=answer.created, model=answer.model, choices=choices, usage=usage, timings=timings)


def _chat_choice(index: int, parts: Sequence[Part], answer: Answer) -> ChatChoice:
    message = AnswerMessage(content=None)
    for part in parts:
        for delta in part.deltas:
            _add(message, delta)
    if message.content is None and not message.tool_calls:
        message.content = ""
    finish = parts[-1].finish or ""
    if answer.legacy_calls and message.tool_calls:
        message.function_call, message.tool_calls = message.tool_calls[0]["function"], None
        finish = _legacy(finish) or ""
    entries = [{**asdict(each), "top_logprobs": []} for part in parts for each in part.logprobs]
    logprobs = {"content": entries} if answer.wants_logprobs else None
    return ChatChoice(index=index, message=message, logprobs=logprobs, finish_reason=finish)


def _legacy(finish: str | None) -> str | None:
    """A reason in the words of OpenAI's API before tools."""
    return "function_call" if finish == "tool_calls" else finish


def _legacy_delta(delta: dict[str, Any]) -> dict[str, Any]:
    """A delta of a call as OpenAI's API before tools has it."""
    if "tool_calls" not in delta:
        return delta
    return {"function_call": delta["tool_calls"][0]["function"]}


def _add(message: AnswerMessage, delta: Mapping[str, Any]) -> None:
    if "reasoning_content" in delta:
        message.reasoning_content = (message.reasoning_content or "") + delta["reasoning_content"]
    if "content" in delta:
        message.content = (message.content or "") + delta["content"]
    for call in delta.get("tool_calls", []):
        message.tool_calls = message.tool_calls or []
        if call["index"] == len(message.tool_calls):
            message.tool_calls.append({key: call[key] for key in ("id", "type")} | {"function": dict(call["function"])})
        else:
            message.tool_calls[call["index"]]["function"]["arguments"] += call["function"]["arguments"]


def _completion_choice(index: int, parts: Sequence[Part], answer: Answer) -> Choice:
    entries = [each for part in parts for each in part.logprobs]
    offsets = itertools.accumulate((len(each.token) for each in entries[:-1]), initial=0)
    logprobs = {
        "tokens": [each.token for each in entries],
        "token_logprobs": [each.logprob for each in entries],
        "top_logprobs": None,
        "text_offset": list(offsets) if entries else [],
    }
    return Choice(
        index=index,
        text="".join(part.text for part in parts),
        logprobs=logprobs if answer.wants_logprobs else None,
        finish_reason=parts[-1].finish,
    )


async def events(running: Running) -> AsyncIterator[bytes]:
    """The events of a stream, as bytes."""
    answer = running.answer
    try:
        if answer.chat:
            for index in range(answer.count):
                yield _event(answer, [ChunkChoice(index=index, delta={"role": "assistant", "content": ""})])
        unfinished = answer.count
        async for part in running.parts():
            *choices, last = [[choice] for choice in _choices(part, answer)] or [[]]
            for choice in choices:
                yield _event(answer, choice)
            unfinished -= part.finish is not None
            if last:
                yield _event(answer, last, timings=None if unfinished or answer.wants_usage else answer.timings)
        if answer.wants_usage:
            yield _event(answer, [], answer.usage, answer.timings)
        yield b"data: [DONE]\n\n"
    except Exception as error:  # noqa: BLE001 - the status is out already, so the error can only be an event
        yield b"data: " + json.dumps(as_api_error(error).envelope).encode() + b"\n\n"


def _event(
    answer: Answer,
    choices: Sequence[ChunkChoice | Choice],
    usage: Usage | None = None,
    timings: Timings | None = None,
) -> bytes:
    chunk: BaseModel = _object(answer, ChatChunk if answer.chat else Completion, choices, usage, timings)
    absent = ({"timings"} if timings is None else set()) | (set() if answer.wants_usage else {"usage"})
    return f"data: {chunk.model_dump_json(exclude=absent)}\n\n".encode()


def _choices(part: Part, answer: Answer) -> Sequence[ChunkChoice | Choice]:
    if answer.chat:
        deltas, finish = part.deltas, part.finish
        if answer.legacy_calls:
            deltas, finish = [_legacy_delta(delta) for delta in deltas], _legacy(finish)
        choices = [ChunkChoice(index=part.index, delta=delta) for delta in deltas]
        if finish:
            choices.append(ChunkChoice(index=part.index, delta={}, finish_reason=finish))
        return choices
    if not part.text and not part.finish:
        return []
    return [Choice(index=part.index, text=part.text, finish_reason=part.finish)]
