"""What is too long: prompts, answers, and the requests of clients that ask for more than there is."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

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
