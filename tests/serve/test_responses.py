"""A stream that has nothing to say yet shows that it is alive, and loses nothing by it."""

from __future__ import annotations

import asyncio
import contextlib
import json
from typing import Any

from ov_afm.serve.engine import Stream
from ov_afm.serve.messages import Piece
from ov_afm.serve.prometheus import Metrics
from ov_afm.serve.responses import Answer, EventStream

QUIET_S = 0.3


def test_silence_is_filled_with_comments_and_no_event_is_lost() -> None:
    sent: list[bytes] = []

    async def send(message: Any) -> None:
        sent.append(message.get("body", b""))

    async def never() -> Any:
        await asyncio.sleep(60)

    async def serve() -> None:
        stream = Stream([7])
        answer = Answer("tiny", True, Metrics())
        response = EventStream(answer, stream, contextlib.AsyncExitStack(), keep_alive_s=QUIET_S / 3)
        serving = asyncio.create_task(response({"type": "http", "method": "POST"}, never, send))
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
