"""From the engine's pieces to OpenAI's answers, whole or as server-sent events.

Both are made from the same pieces in the same way, so that the joined deltas of a stream are the
text of the whole answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from .engine import Engine, Stream
from .errors import WireError, as_wire_error
from .prometheus import Instruments
from .protocol import (
    AnswerMessage,
    ChatChoice,
    ChatChunk,
    ChatCompletion,
    Choice,
    ChunkChoice,
    Completion,
    Usage,
)
from .structured_output import CallReader

__all__ = ["Answer", "EventStream", "chat_answer", "completion_answer", "until_gone"]

Piece = dict[str, Any]
CLIENT_CLOSED_REQUEST = 499


@dataclass(slots=True)
class Answer:
    """A request under way.

    Attributes:
        model: Name that the client used.
        chat: Chat, or plain completion.
        instruments: Where its figures go.
        count: Answers asked for.
        reads_calls: The text may hold tool calls.
        wants_usage: A stream ends with a usage chunk.
        wants_logprobs: Log probabilities were asked for.
    """

    model: str
    chat: bool
    instruments: Instruments
    count: int = 1
    reads_calls: bool = False
    wants_usage: bool = False
    wants_logprobs: bool = False
    begun: float = field(default_factory=time.perf_counter)
    created: int = field(default_factory=lambda: int(time.time()))
    id: str = ""
    new_tokens: int = 0
    prompt_tokens: int = 0

    def __post_init__(self) -> None:
        """Name it as OpenAI does."""
        self.id = f"{'chatcmpl' if self.chat else 'cmpl'}-{secrets.token_hex(12)}"

    @property
    def usage(self) -> Usage:
        """Tokens so far."""
        total = self.prompt_tokens + self.new_tokens
        return Usage(prompt_tokens=self.prompt_tokens, completion_tokens=self.new_tokens, total_tokens=total)

    async def pieces(self, stream: Stream) -> AsyncIterator[Piece]:
        """The engine's pieces: `index`, `deltas` or `text`, `logprobs`, and `finish` in an answer's last one."""
        first, last = None, 0.0
        readers = [CallReader() for _ in range(self.count)]
        try:
            while stream.open:
                message = await stream.get()
                self.prompt_tokens = stream.prompt_tokens
                if "text" not in message:
                    continue
                last = time.perf_counter()
                if first is None and message["tokens"]:
                    first = last
                    self.instruments.ttft_s.labels(self.model).observe(first - self.begun)
                self.new_tokens += message["tokens"]
                piece = {"index": message["index"], "text": message["text"], "finish": message.get("end")}
                piece["logprobs"] = message.get("logprobs", [])
                if self.reads_calls:
                    _read_calls(piece, readers[message["index"]])
                elif self.chat:
                    piece["deltas"] = [{"content": message["text"]}] if message["text"] else []
                yield piece
        finally:
            self.instruments.prompt_tokens.labels(self.model).inc(self.prompt_tokens)
            self.instruments.generated_tokens.labels(self.model).inc(self.new_tokens)
            if first is not None and self.new_tokens > self.count:
                tpot_s = (last - first) / (self.new_tokens / self.count - 1)
                self.instruments.tpot_s.labels(self.model).observe(tpot_s)


def _read_calls(piece: Piece, reader: CallReader) -> None:
    piece["deltas"] = reader.push(piece["text"])
    if piece["finish"]:
        piece["deltas"] += reader.finish()
        if reader.calls and piece["finish"] == "stop":
            piece["finish"] = "tool_calls"


async def chat_answer(answer: Answer, stream: Stream) -> ChatCompletion:
    """The whole answer to a chat request."""
    messages = [AnswerMessage(content=None) for _ in range(answer.count)]
    logprobs: list[list[Piece]] = [[] for _ in range(answer.count)]
    finish = [""] * answer.count
    async for piece in answer.pieces(stream):
        index = piece["index"]
        for delta in piece["deltas"]:
            _add(messages[index], delta)
        logprobs[index] += [{**each, "top_logprobs": []} for each in piece["logprobs"]]
        finish[index] = piece["finish"] or finish[index]
    choices = []
    for index, message in enumerate(messages):
        if message.content is None and not message.tool_calls:
            message.content = ""
        shown = {"content": logprobs[index]} if answer.wants_logprobs else None
        choices.append(ChatChoice(index=index, message=message, logprobs=shown, finish_reason=finish[index]))
    return ChatCompletion(id=answer.id, created=answer.created, model=answer.model, choices=choices, usage=answer.usage)


def _add(message: AnswerMessage, delta: Mapping[str, Any]) -> None:
    if "content" in delta:
        message.content = (message.content or "") + delta["content"]
    for call in delta.get("tool_calls", []):
        message.tool_calls = message.tool_calls or []
        if call["index"] == len(message.tool_calls):
            message.tool_calls.append({key: call[key] for key in ("id", "type")} | {"function": dict(call["function"])})
        else:
            message.tool_calls[call["index"]]["function"]["arguments"] += call["function"]["arguments"]


async def completion_answer(answer: Answer, stream: Stream) -> Completion:
    """The whole answer to a completion request."""
    choices = [Choice(index=index, text="") for index in range(answer.count)]
    logprobs: list[list[Piece]] = [[] for _ in range(answer.count)]
    async for piece in answer.pieces(stream):
        choice = choices[piece["index"]]
        choice.text += piece["text"]
        choice.finish_reason = piece["finish"] or choice.finish_reason
        logprobs[piece["index"]] += piece["logprobs"]
    if answer.wants_logprobs:
        for choice in choices:
            choice.logprobs = _old_logprobs(logprobs[choice.index])
    return Completion(id=answer.id, created=answer.created, model=answer.model, choices=choices, usage=answer.usage)


def _old_logprobs(entries: list[Piece]) -> dict[str, Any]:
    offsets, place = [], 0
    for each in entries:
        offsets.append(place)
        place += len(each["token"])
    return {
        "tokens": [each["token"] for each in entries],
        "token_logprobs": [each["logprob"] for each in entries],
        "top_logprobs": None,
        "text_offset": offsets,
    }


class EventStream(Response):
    """An ASGI response that sends an answer as it is generated, and lets go of it when the client does.

    Args:
        answer: The request.
        engine_stream: The engine's pieces, of which the first was taken.
        lease: What to give back at the end.
        keep_alive_s: Seconds of silence after which a comment shows that the server is still there.
    """

    def __init__(
        self, answer: Answer, engine_stream: Stream, lease: contextlib.AsyncExitStack, *, keep_alive_s: float
    ) -> None:
        super().__init__()
        self._answer, self._stream, self._lease, self._keep_alive_s = answer, engine_stream, lease, keep_alive_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events; ends early when the client has gone."""
        async with self._lease:
            headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            sending = asyncio.create_task(self._send_all(send))
            gone = asyncio.create_task(_disconnected(receive))
            try:
                await asyncio.wait({sending, gone}, return_when=asyncio.FIRST_COMPLETED)
                if sending.done():
                    sending.result()
            finally:
                await _cancel(sending, gone)

    async def _send_all(self, send: Send) -> None:
        async for event in self._with_keep_alive(self._events()):
            await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _with_keep_alive(self, events: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        waiting: asyncio.Task[bytes] | None = None
        try:
            while True:
                waiting = waiting or asyncio.create_task(_next(events))
                await asyncio.wait({waiting}, timeout=self._keep_alive_s)
                if not waiting.done():
                    yield b": keep-alive\n\n"
                    continue
                event: bytes = waiting.result()
                waiting = None
                if not event:
                    return
                yield event
        finally:
            if waiting:
                await _cancel(waiting)

    async def _events(self) -> AsyncIterator[bytes]:
        answer = self._answer
        try:
            if answer.chat:
                for index in range(answer.count):
                    yield self._event([ChunkChoice(index=index, delta={"role": "assistant", "content": ""})])
            async for piece in answer.pieces(self._stream):
                for choice in _choices(piece, answer):
                    yield self._event([choice])
            if answer.wants_usage:
                yield self._event([], answer.usage)
            yield b"data: [DONE]\n\n"
        except Exception as error:  # noqa: BLE001 - the status is out; an event is all that can still be said
            yield b"data: " + json.dumps(as_wire_error(error).envelope).encode() + b"\n\n"

    def _event(self, choices: list[Any], usage: Usage | None = None) -> bytes:
        answer = self._answer
        kind: Any = ChatChunk if answer.chat else Completion
        fields = {"id": answer.id, "created": answer.created, "model": answer.model, "choices": choices}
        unwanted = None if answer.wants_usage else {"usage"}
        chunk = str(kind(**fields, usage=usage).model_dump_json(exclude=unwanted))
        return f"data: {chunk}\n\n".encode()


async def _next(events: AsyncIterator[bytes]) -> bytes:
    """The next event; empty at the end."""
    async for event in events:
        return event
    return b""


def _choices(piece: Piece, answer: Answer) -> list[Any]:
    index, finish = piece["index"], piece["finish"]
    if answer.chat:
        choices: list[Any] = [ChunkChoice(index=index, delta=delta) for delta in piece["deltas"]]
        return [*choices, ChunkChoice(index=index, delta={}, finish_reason=finish)] if finish else choices
    if not piece["text"] and not finish:
        return []
    return [Choice(index=index, text=piece["text"], finish_reason=finish)]


async def until_gone(request: Request, work: Any) -> Any:
    """The result of `work`, which is cancelled when the client leaves.

    Raises:
        WireError: The client has left; nobody will read this.
    """
    working = asyncio.ensure_future(work)
    gone = asyncio.create_task(_disconnected(request.receive))
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise WireError(CLIENT_CLOSED_REQUEST, "the client has left", code="client_closed_request")
    finally:
        await _cancel(working, gone)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _cancel(*tasks: asyncio.Future[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def open_stream(engine: Engine, requests: list[Mapping[str, Any]]) -> tuple[Stream, contextlib.AsyncExitStack]:
    """Open a stream and wait until the engine has taken the request, so that a refusal can still have its status."""
    async with contextlib.AsyncExitStack() as stack:
        stream = await stack.enter_async_context(engine.open(requests))
        while not stream.prompt_tokens:
            await stream.get()
        return stream, stack.pop_all()
    raise AssertionError
