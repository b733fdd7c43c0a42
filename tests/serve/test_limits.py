"""What is too long: prompts, answers, requests for more than there is; and what an answer says of its cost."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support import serving


@pytest.fixture(scope="module")
def server(tiny_model: Path) -> Iterator[serving.Server]:
    with serving.server("--model", f"tiny={tiny_model}", "--cache-size-gb", "0.05") as running:
        yield running


@pytest.fixture(scope="module")
def context(server: serving.Server) -> int:
    length = server.http.get("/v1/models/tiny").json()["max_model_len"]
    assert isinstance(length, int)
    return length


# What agents send, and what nobody means.
@pytest.mark.parametrize("max_tokens", [4096, 65_535, 10**12])
def test_an_answer_may_be_longer_than_the_context_allows_and_ends_there(
    server: serving.Server, context: int, max_tokens: int
) -> None:
    body = {"prompt": [9] * (context - 12), "max_tokens": max_tokens, "ignore_eos": True}
    answer = server.post("/v1/completions", **body).json()
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"] == {**answer["usage"], "completion_tokens": 12, "total_tokens": context}


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_conversation_may_ask_for_more_than_the_context(server: serving.Server, field: str, stream: bool) -> None:
    assert server.chat(**{"max_tokens": None, field: 65_536, "stream": stream, "stop": ["a", "e"]}).status_code == 200


@pytest.mark.parametrize("beyond", [0, 1, 1000])
def test_a_prompt_without_room_for_an_answer_is_refused_with_both_counts(
    server: serving.Server, context: int, beyond: int
) -> None:
    answer = server.post("/v1/completions", prompt=[9] * (context + beyond), max_tokens=1)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (400, "context_length_exceeded", "prompt")
    assert f"{context + beyond} tokens" in error["message"]
    assert f"the context is {context} tokens" in error["message"]


def test_a_prompt_with_room_for_one_token_gets_one(server: serving.Server, context: int) -> None:
    answer = server.post("/v1/completions", prompt=[9] * (context - 1), max_tokens=500, ignore_eos=True).json()
    assert (answer["usage"]["completion_tokens"], answer["choices"][0]["finish_reason"]) == (1, "length")


def last_chunk(server: serving.Server, **fields: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The last event of a stream, and those before it."""
    answer = server.chat(stream=True, **fields)
    data = [line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data: ")]
    assert data.pop() == "[DONE]"
    *before, last = [json.loads(each) for each in data]
    return last, before


ASKED: dict[str, Any] = {"max_tokens": 40, "ignore_eos": True, "temperature": 2}


@pytest.mark.parametrize("route", ["/v1/chat/completions", "/v1/completions"])
def test_an_answer_says_how_long_it_took(server: serving.Server, route: str) -> None:
    begun = time.perf_counter()
    body = {"messages": [{"role": "user", "content": "Hi"}]} if "chat" in route else {"prompt": "Hi"}
    answer = server.post(route, **body, **ASKED).json()
    took_ms = (time.perf_counter() - begun) * 1000
    timings, usage = answer["timings"], answer["usage"]
    assert (timings["prompt_n"], timings["predicted_n"]) == (usage["prompt_tokens"], 40)
    assert 0 < timings["prompt_ms"] < took_ms
    assert 0 < timings["predicted_ms"] < took_ms - timings["prompt_ms"]
    assert timings["predicted_per_second"] == pytest.approx(39_000 / timings["predicted_ms"])
    assert timings["prompt_per_second"] == pytest.approx(1000 * usage["prompt_tokens"] / timings["prompt_ms"])


@pytest.mark.parametrize("usage", [True, False])
@pytest.mark.parametrize("count", [1, 2])
def test_the_last_chunk_says_how_long_the_stream_took(server: serving.Server, usage: bool, count: int) -> None:
    last, before = last_chunk(server, **ASKED, n=count, stream_options={"include_usage": usage})
    assert last["timings"]["predicted_n"] == 40 * count
    assert not any("timings" in chunk for chunk in before)
    assert bool(last["choices"]) != usage
    assert ("usage" in last) == usage


def test_an_answer_of_one_token_has_no_speed(server: serving.Server) -> None:
    timings = server.chat(**{**ASKED, "max_tokens": 1}).json()["timings"]
    assert (timings["predicted_n"], timings["predicted_ms"], timings["predicted_per_second"]) == (1, 0, None)
