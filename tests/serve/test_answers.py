"""An event stream: comments while the engine is silent, and what a client that disconnects leaves behind."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from ov_afm.serve.answers import Answer, EventStream, Lease, Running
from ov_afm.serve.engine import Stream
from ov_afm.serve.messages import Piece
from ov_afm.serve.prometheus import Metrics
from ov_afm.serve.turns import Turns
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
        running = Running(Answer("tiny", True, Metrics()), stream, Lease())
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
        lease = Lease()
        lease.callback(given_back.append, True)
        running = Running(Answer("tiny", True, Metrics()), Stream([7]), lease)
        response = EventStream(chat_completions.events(running), lease, keep_alive_s=60)
        await asyncio.wait_for(response(SCOPE, gone, send), 5)

    asyncio.run(serve())
    assert given_back == [True]


def test_reader_that_is_behind_gets_the_same_text_in_fewer_parts() -> None:
    async def serve() -> tuple[list[str], str]:
        turns, order = Turns(at_once=1), []
        behind, other = Stream([7], turns=turns), Stream([8], turns=turns)
        for number in range(50):
            behind.put(Piece(7, f"{number} ", 1))
        behind.put(Piece(7, "end", 1, end="length"))
        other.put(Piece(8, "x", 1, end="stop"))

        async def read(stream: Stream, name: str) -> str:
            text = ""
            answer = Answer("tiny", True, Metrics())
            async for part in answer.parts(stream):
                order.append(name)
                text += part.text
                assert part.deltas in ([{"content": part.text}], [])
            assert answer.new_tokens == (51 if name == "behind" else 1)
            return text

        texts = await asyncio.gather(read(behind, "behind"), read(other, "other"))
        return order, texts[0]

    order, text = asyncio.run(serve())
    assert text == "".join(f"{number} " for number in range(50)) + "end"
    assert sorted(order) == ["behind", "behind", "other"]


def test_only_so_many_work_in_a_round_of_the_loop_and_one_that_leaves_is_skipped() -> None:
    async def work() -> list[int]:
        turns, rounds = Turns(at_once=3), []
        loop, current = asyncio.get_running_loop(), 0

        def count() -> None:
            nonlocal current
            current += 1
            loop.call_soon(count)

        async def one() -> None:
            await turns.take()
            rounds.append(current)

        tasks = [asyncio.create_task(one()) for _ in range(20)]
        loop.call_soon(count)
        await asyncio.sleep(0)
        for task in tasks[5:10]:
            task.cancel()
        await asyncio.wait(tasks)
        return rounds

    rounds = asyncio.run(work())
    assert len(rounds) == 15
    assert max(rounds.count(each) for each in rounds) <= 3
