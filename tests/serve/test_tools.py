"""Function calls: a grammar enforces them, whether the client requires one or the model begins one by itself."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import jsonschema_rs
import openai
import pytest
from support import serving, tiny
from support.exact import EXACT_OPTIONS

from ov_afm import export

# The model is exported for this file.
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[serving.Server]:
    """A model that begins each answer with `<tool_call>` and is random after that."""
    checkpoint = tiny.write_caller(tmp_path_factory.mktemp("caller") / "checkpoint")
    model = export(str(checkpoint), tmp_path_factory.mktemp("models") / "caller", recipe="fp32").path
    with serving.server("--model", f"caller={model}", "--cache-size-gb", "0.05", *EXACT_OPTIONS) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: serving.Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0)


@pytest.mark.parametrize("choice", ["auto", "required", {"type": "function", "function": {"name": "get_weather"}}])
def test_tool_calls_are_valid_whole_and_streamed(client: openai.OpenAI, choice: Any) -> None:
    asked: dict[str, Any] = {
        "model": "caller",
        "messages": [{"role": "user", "content": "Weather in Paris?"}],
        "tools": [serving.TOOL],
        "tool_choice": choice,
        "max_tokens": 2000,
        "seed": 3,
    }
    whole = client.chat.completions.create(**asked).choices[0]
    assert whole.finish_reason == "tool_calls"
    assert whole.message.tool_calls
    call = whole.message.tool_calls[0].function  # type: ignore[union-attr]
    jsonschema_rs.validate(serving.TOOL["function"]["parameters"], json.loads(call.arguments))
    deltas = [
        each
        for chunk in client.chat.completions.create(**asked, stream=True)
        for each in chunk.choices[0].delta.tool_calls or []
    ]
    assert deltas[0].function is not None
    assert deltas[0].function.name == "get_weather"
    assert "".join(delta.function.arguments or "" for delta in deltas if delta.function) == call.arguments


def test_conversation_with_a_tool_answer_is_rendered(server: serving.Server) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'}}
    messages = [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "sunny"},
    ]
    answer = server.post("/v1/chat/completions", messages=messages, tools=[serving.TOOL], max_tokens=4)
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["prompt_tokens"] > 100


def test_without_tools_a_call_is_plain_text(server: serving.Server) -> None:
    answer = server.chat(max_tokens=5).json()["choices"][0]
    assert answer["message"]["content"].startswith("<tool_call>")
    assert "tool_calls" not in answer["message"] or answer["message"]["tool_calls"] is None
