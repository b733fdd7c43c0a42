"""From the engine's pieces to the parts of an answer, and the response that streams them.

Whole answers and streams are made from the same parts, so that the joined deltas of a stream are the text of the whole
answer. The modules of `serve.wire` give parts the form of an API.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import secrets
import time
from collections.abc import AsyncIterator, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import anyio
from sse_starlette import EventSourceResponse, ServerSentEvent
from sse_starlette.sse import AppStatus
from starlette.requests import Request
from starlette.types import Receive, Scope, Send

from .answer_check import AnswerCheck
from .engine import Engine, Stream
from .errors import APIError
from .messages import Piece, Task, TokenLogprob
from .prometheus import Metrics
from .protocol import CompletionDetails, Timings, Usage
from .reasoning import ReasoningReader
from .tools import CallReader

__all__ = ["Answer", "AnswerReader", "EventStream", "Part", "Running", "open_stream", "until_gone"]

T = TypeVar("T")
# Time for the event that says that time is up.
LAST_WORDS_S = 5.0
# As nginx calls it; nobody reads it but the log and the metrics.
CLIENT_CLOSED_REQUEST = 499
# sse-starlette would cut streams off at SIGTERM. Ours may finish: uvicorn ends them when the grace period is over.
AppStatus.enable_automatic_graceful_drain = False


@dataclass(frozen=True, slots=True)
class Part:
    """What one step of the engine added to one answer, in OpenAI's terms.

    Attributes:
        index: Which of several answers.
        text: The text as the model wrote it.
        deltas: The same for chat, as OpenAI's deltas: `content`, `tool_calls`, and `reasoning_content` for thoughts.
        logprobs: One entry a token, where they were asked for.
        finish: OpenAI's `finish_reason` in an answer's last part, else None.
        stop: The stop string that ended the answer, if one did.
    """

    index: int
    text: str
    deltas: list[dict[str, Any]]
    logprobs: Sequence[TokenLogprob]
    finish: str | None
    stop: str | None = None

    def joined(self, later: Part) -> Part:
        """This part and the one after it, neither of them an answer's last."""
        deltas = list(self.deltas)
        for delta in later.deltas:
            ((kind, value),) = delta.items() if len(delta) == 1 else (("", None),)
            if deltas and isinstance(value, str) and deltas[-1].keys() == {kind}:
                deltas[-1] = {kind: deltas[-1][kind] + value}
            else:
                deltas.append(delta)
        return Part(self.index, self.text + later.text, deltas, [*self.logprobs, *later.logprobs], None)


@dataclass(slots=True)
class Answer:
    """A request under way.

    Attributes:
        model: Name that the client used.
        chat: Chat, or plain completion.
        metrics: Where its figures go.
        count: Answers asked for.
        functions: Functions whose calls the text may hold.
        legacy_calls: The client asked for functions in OpenAI's older form.
        reasoning: What the model's thoughts begin and end with; None where it has none, or where they stay in the text.
        wants_usage: A stream ends with a usage chunk.
        wants_logprobs: Log probabilities were asked for.
        check: What a complete answer must pass.
        begun: When the request came, in seconds by `time.perf_counter`.
        taken: When the engine took it.
        first: When the first token came; 0 before.
        last: When the last one came.
    """

    model: str
    chat: bool
    metrics: Metrics
    count: int = 1
    functions: Sequence[str] = ()
    legacy_calls: bool = False
    reasoning: tuple[str, str] | None = None
    wants_usage: bool = False
    wants_logprobs: bool = False
    check: AnswerCheck | None = None
    begun: float = field(default_factory=time.perf_counter)
    taken: float = 0.0
    first: float = 0.0
    last: float = 0.0
    created: int = field(default_factory=lambda: int(time.time()))
    id: str = ""
    new_tokens: int = 0
    prompt_tokens: int = 0
    reasoning_tokens: int = 0

    def __post_init__(self) -> None:
        """Name it as OpenAI does."""
        self.id = f"{'chatcmpl' if self.chat else 'cmpl'}-{secrets.token_hex(12)}"

    @property
    def usage(self) -> Usage:
        """Tokens so far."""
        total = self.prompt_tokens + self.new_tokens
        details = CompletionDetails(reasoning_tokens=self.reasoning_tokens) if self.reasoning else None
        return Usage(
            prompt_tokens=self.prompt_tokens,
            completion_tokens=self.new_tokens,
            total_tokens=total,
            completion_tokens_details=details,
        )

    @property
    def timings(self) -> Timings | None:
        """How long prompt and answer took; None before the first token.

        Each answer's first token belongs to the time of the prompt.
        """
        if not self.first:
            return None
        prompt_s, predicted_s = self.first - self.taken, self.last - self.first
        later = self.new_tokens - self.count
        return Timings(
            prompt_n=self.prompt_tokens,
            prompt_ms=prompt_s * 1000,
            prompt_per_second=self.prompt_tokens / prompt_s if prompt_s else None,
            predicted_n=self.new_tokens,
            predicted_ms=predicted_s * 1000,
            predicted_per_second=later / predicted_s if later > 0 and predicted_s else None,
        )

    async def parts(self, stream: Stream) -> AsyncIterator[Part]:
        """The engine's pieces in OpenAI's terms, counted and timed."""
        self.taken = time.perf_counter()
        readers = [AnswerReader(self, thinking=stream.thinking) for _ in range(self.count)]
        try:
            while stream.open:
                index, piece = await stream.get()
                self.prompt_tokens = stream.prompt_tokens
                if not isinstance(piece, Piece):
                    continue
                self.last = time.perf_counter()
                if not self.first and piece.tokens:
                    self.first = self.last
                    self.metrics.ttft_s.labels(self.model).observe(self.first - self.begun)
                part = self._part(index, piece, readers[index])
                # Clients that are behind get fewer and larger parts.
                while piece.end is None and (following := stream.more(index)) is not None:
                    part = part.joined(self._part(index, following, readers[index]))
                if self.check is not None:
                    self.check.take(index, part.deltas, part.finish, cut=piece.stop is not None)
                yield part
        finally:
            self.metrics.prompt_tokens.labels(self.model).inc(self.prompt_tokens)
            self.metrics.generated_tokens.labels(self.model).inc(self.new_tokens)
            if self.first and self.new_tokens > self.count:
                tpot_s = (self.last - self.first) / (self.new_tokens / self.count - 1)
                self.metrics.tpot_s.labels(self.model).observe(tpot_s)

    def _part(self, index: int, piece: Piece, reader: AnswerReader) -> Part:
        deltas = reader.push(piece)
        self.new_tokens += piece.tokens
        self.reasoning_tokens += reader.take_reasoning_tokens()
        finish = "tool_calls" if piece.end == "stop" and reader.has_calls else piece.end
        return Part(index, piece.text, deltas, piece.logprobs, finish, piece.stop)


class AnswerReader:
    """Separates thoughts, calls and text of one answer; gives deltas as the wire has them."""

    def __init__(self, answer: Answer, *, thinking: bool) -> None:
        self._reasoning = ReasoningReader(answer.reasoning, thinking=thinking)
        self._calls = CallReader(answer.functions) if answer.functions else None
        self._undecided_tokens = self._reasoning_tokens = 0

    @property
    def has_calls(self) -> bool:
        """Whether the answer is calls, all of them complete."""
        return self._calls is not None and self._calls.complete

    def take_reasoning_tokens(self) -> int:
        """Tokens of thoughts since the last call; those of their tags are among them."""
        count, self._reasoning_tokens = self._reasoning_tokens, 0
        return count

    def push(self, piece: Piece) -> list[dict[str, Any]]:
        """The deltas that a piece made certain."""
        before = self._reasoning.thinking
        taken = self._reasoning.push(piece.text)
        if before or self._reasoning.thinking or any(kind == "reasoning_content" for kind, _ in taken):
            self._reasoning_tokens += piece.tokens + self._undecided_tokens
            self._undecided_tokens = 0
        elif self._reasoning.undecided:
            self._undecided_tokens += piece.tokens
        if piece.end:
            taken += self._reasoning.finish(piece.end)
        deltas: list[dict[str, Any]] = []
        for kind, text in taken:
            if kind == "content" and self._calls is not None:
                deltas += self._calls.push(text)
            else:
                deltas.append({kind: text})
        if piece.end and self._calls is not None:
            deltas += self._calls.finish(piece.end)
        return deltas


class Lease(contextlib.AsyncExitStack):
    """What an answer gives back at its end.

    Attributes:
        deadline: When the answer ends in any case, by the monotonic clock.
    """

    deadline = math.inf


@dataclass(slots=True)
class Running:
    """An answer that the engine has begun.

    Attributes:
        answer: The request.
        stream: The engine's pieces; the engine has taken the request.
        lease: What to give back at the end.
    """

    answer: Answer
    stream: Stream
    lease: Lease

    def parts(self) -> AsyncIterator[Part]:
        """The answer's parts."""
        return self.answer.parts(self.stream)


class EventStream(EventSourceResponse):
    """An ASGI response that sends an answer as it is generated, and gives its slot back when the client leaves.

    Args:
        events: The stream's events, as bytes, which sse-starlette passes on as they are.
        lease: What to give back at the end.
        keep_alive_s: Seconds between comments that show that the server is still there.
    """

    def __init__(self, events: AsyncIterator[bytes], lease: Lease, *, keep_alive_s: float) -> None:
        super().__init__(
            events,
            # nginx would collect events before it passes them on.
            headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
            ping=keep_alive_s,
            ping_message_factory=lambda: ServerSentEvent(comment="keep-alive", sep="\n"),
        )
        # Whether the connection stays open is uvicorn's decision.
        del self.headers["connection"]
        self._lease = lease

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events; ends early when the client has gone, or reads so slowly that time is up."""
        # Not in the generator: it may be cancelled before it begins.
        async with self._lease:
            left_s = self._lease.deadline - time.monotonic() + LAST_WORDS_S
            with anyio.move_on_after(max(left_s, 0.0)):
                await super().__call__(scope, receive, send)


async def until_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when the client leaves.

    Raises:
        APIError: The client has left; nobody will read this.
    """
    working = asyncio.create_task(work)
    gone = asyncio.create_task(_disconnected(request.receive))
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise APIError("the client has left", code="client_closed_request", status=CLIENT_CLOSED_REQUEST)
    finally:
        for task in (working, gone):
            task.cancel()
        await asyncio.gather(working, gone, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def open_stream(engine: Engine, tasks: Sequence[Task]) -> tuple[Stream, Lease]:
    """Open a stream and wait until the engine has taken the request, so that a refusal can still have its status."""
    async with Lease() as stack:
        stream = await stack.enter_async_context(engine.open(tasks))
        while not stream.prompt_tokens:
            await stream.get()
        lease = stack.pop_all()
        lease.deadline = stream.deadline
        return stream, lease
    raise AssertionError
