"""An event stream: comments while the engine is silent, and what a client that disconnects leaves behind."""

from __future__ import annotations

import asyncio
import contextlib
import json
from typing import Any

from ov_afm.serve.answers import Answer, EventStream, Running
from ov_afm.serve.engine import Stream
from ov_afm.serve.messages import Piece
from ov_afm.serve.prometheus import Metrics
from ov_afm.serve.wire import chat_completions

QUIET_S = 0.3
SCOPE = {"type": "http", "method": "POST"}


def test_silence_is_filled_with_comments_and_no_event_is_lost() -> None:
    sent: list[bytes] = []

    async def send(message: Any) -> None:
        sent.append(message.get("body", b""))

    async def never() -> Any:
        await asyncio.sleep(60)

    async def serve() -> None:
        stream = Stream([7])
        running = Running(Answer("tiny", True, Metrics()), stream, contextlib.AsyncExitStack())
        response = EventStream(chat_completions.events(running), running.lease, keep_alive_s=QUIET_S / 3)
        serving = asyncio.create_task(response(SCOPE, never, send))
        for text, end in (("a", None), ("b", "stop")):
            await asyncio.sleep(QUIET_S)
            stream.put(Piece(7, text, 1, end=end))
        await asyncio.wait_for(serving, 5)

    asyncio.run(serve())
    events = b"".join(sent).decode().split("\n\n")
    assert events.count(": keep-alive") >= 2
    data = [each.removeprefix("data: ") for each in events if each.startswith("data: ")]
    assert data[-1] == "[DONE]"
    deltas = [json.loads(each)["choices"][0]["delta"] for each in data[:-1]]
    assert "".join(delta.get("content", "") for delta in deltas) == "ab"


def test_a_client_that_is_gone_before_the_first_event_keeps_nothing() -> None:
    given_back: list[bool] = []

    async def gone() -> Any:
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        await asyncio.sleep(60)

    async def serve() -> None:
        lease = contextlib.AsyncExitStack()
        lease.callback(given_back.append, True)
        running = Running(Answer("tiny", True, Metrics()), Stream([7]), lease)
        response = EventStream(chat_completions.events(running), lease, keep_alive_s=60)
        await asyncio.wait_for(response(SCOPE, gone, send), 5)

    asyncio.run(serve())
    assert given_back == [True]
