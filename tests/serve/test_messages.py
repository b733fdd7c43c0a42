"""What crosses the pipe arrives as it was sent."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from ov_afm.errors import EngineLost
from ov_afm.runtime.sampling import Params
from ov_afm.serve import messages as m
from ov_afm.serve.errors import APIError, as_api_error

MESSAGES = [
    m.EngineSpec(Path("model"), kv_cache="f16", ov_config={"A": 1}, adapter=(Path("adapter"), 0.5)),
    m.Request(1, m.Generate(m.Chat([{"role": "user", "content": "x"}]), Params(stop=("a",)), m.JSONSchema("{}"), True)),
    m.Request(2, m.Generate(m.Tokens([1, 2]), output_format=m.FunctionCalls([m.Function("f", {})], required=True))),
    m.Request(3, m.Tokenize(m.Text("x", special=False))),
    m.Request(4, m.Detokenize([1, 2])),
    m.Cancel(1),
    m.PromptTokens(1, 7),
    m.Piece(1, "ü", 2, [m.TokenLogprob("ü", -0.5, [195, 188])], "stop"),
    m.Piece(1, "", 0),
    m.Result(3, [1, 2]),
    m.ModelInfo("CPU", 4096, template_knows_tools=True),
    m.Unusable("no room"),
    m.CacheUsage(0.5),
]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_a_message_arrives_as_it_was_sent(message: object) -> None:
    assert pickle.loads(pickle.dumps(message)) == message


def test_a_refusal_keeps_what_the_client_sees() -> None:
    error = APIError("too long", "prompt", "context_length_exceeded", status=413, headers={"A": "b"})
    arrived = as_api_error(pickle.loads(pickle.dumps(m.Failure(1, error))).error)
    assert arrived.envelope == error.envelope
    assert (arrived.status, arrived.headers) == (413, {"A": "b"})


def test_a_dead_engine_may_be_asked_again() -> None:
    arrived = as_api_error(pickle.loads(pickle.dumps(m.Failure(1, EngineLost("gone")))).error)
    assert (arrived.status, arrived.api_code) == (503, "engine_unavailable")
    assert "Retry-After" in arrived.headers
