"""A model that answers as it is told, behind the real routes of the Responses API: what comes out for given deltas."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
from fastapi import FastAPI

from ov_afm.serve import errors
from ov_afm.serve.answers import Answer, EventStream, Lease, Part, Running
from ov_afm.serve.engine import Stream
from ov_afm.serve.errors import APIError
from ov_afm.serve.prometheus import Metrics
from ov_afm.serve.protocol import ChatRequest
from ov_afm.serve.service import Settings
from ov_afm.serve.wire import responses_api


class Scripted(Running):
    """An answer whose parts are known."""

    def __init__(self, deltas: list[dict[str, Any]], finish: str | Exception) -> None:
        super().__init__(Answer("tiny", True, Metrics()), Stream([]), Lease())
        self.answer.prompt_tokens, self.answer.new_tokens = 10, 5
        self._deltas, self._finish = deltas, finish

    async def parts(self) -> Any:  # type: ignore[override]
        """The parts, or what breaks them off."""
        for delta in self._deltas:
            yield Part(0, "", [delta], (), None)
        if isinstance(self._finish, Exception):
            raise self._finish
        yield Part(0, "", [], (), self._finish)


class Model:
    """A service whose model answers as it is told, and remembers what it was asked."""

    settings = Settings()

    def __init__(self) -> None:
        self.deltas: list[dict[str, Any]] = [{"content": "Hi"}]
        self.finish: str | Exception = "stop"
        self.asked: list[ChatRequest] = []
        self.longest = 1000  # messages; each is a token
        app = FastAPI()
        errors.install(app)
        responses_api.add_routes(app, self)  # type: ignore[arg-type]
        self.http = httpx.AsyncClient(
            transport=httpx.ASGITransport(app, raise_app_exceptions=False), base_url="http://model"
        )

    async def begin_chat(self, body: ChatRequest, request: Any) -> Running:
        """Take a request."""
        self.asked.append(body)
        if len(body.messages) > self.longest:
            raise APIError("the prompt has too many tokens", "messages", "context_length_exceeded")
        return Scripted(self.deltas, self.finish)

    async def context_length(self, model: str | None) -> int:
        """Most messages."""
        return self.longest

    async def count_tokens(self, body: ChatRequest) -> int:
        """Messages."""
        return len(body.messages)

    def event_stream(self, running: Running, events: Any) -> EventStream:
        """A stream's response."""
        return EventStream(events, running.lease, keep_alive_s=60)

    def post(self, **body: Any) -> httpx.Response:
        """Ask for a response."""
        return asyncio.run(self.http.post("/v1/responses", json={"input": "Hello", **body}))

    def stream(self, **body: Any) -> list[dict[str, Any]]:
        """The events of a stream."""
        events = []
        for text in self.post(stream=True, **body).text.strip().split("\n\n"):
            name, _, data = text.partition("\n")
            events.append(json.loads(data.removeprefix("data: ")))
            assert name == f"event: {events[-1]['type']}"
        return events

    def messages(self) -> list[dict[str, Any]]:
        """The messages that it was last asked to answer."""
        return [message.model_dump(exclude_none=True) for message in self.asked[-1].messages]


def call(index: int, name: str, *pieces: str) -> list[dict[str, Any]]:
    """The deltas of a call."""
    head = {"index": index, "id": f"call_{index}", "type": "function", "function": {"name": name, "arguments": ""}}
    rest = [{"index": index, "function": {"arguments": piece}} for piece in pieces]
    return [{"tool_calls": [each]} for each in (head, *rest)]
