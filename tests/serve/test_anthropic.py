"""Anthropic's Messages API, proved with Anthropic's own clients."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import jsonschema_rs
import pytest
from support import environments, serving
from support.exact import EXACT_OPTIONS

from ov_afm.errors import EngineLost
from ov_afm.serve.answers import Answer, Running
from ov_afm.serve.engine import Stream
from ov_afm.serve.errors import APIError
from ov_afm.serve.messages import ModelInfo, Piece
from ov_afm.serve.output_format import output_format
from ov_afm.serve.prometheus import Metrics
from ov_afm.serve.wire import anthropic as wire
from ov_afm.serve.wire.anthropic_requests import MessagesRequest, chat_request

TOOL: dict[str, Any] = {
    "name": "get_weather",
    "description": "Weather",
    "input_schema": serving.TOOL["function"]["parameters"],
}
HELLO: dict[str, Any] = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 12}
# The current client has no argument for it any more.
GREEDY: dict[str, Any] = {"extra_body": {"temperature": 0}}
CALL = {"type": "tool_use", "id": "toolu_1", "name": "get_weather", "input": {"city": "Paris"}}
# What Claude Code 2.1 sends besides the conversation.
CLAUDE_CODE: dict[str, Any] = {
    "metadata": {"user_id": "x"},
    "thinking": {"type": "adaptive"},
    "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
    "output_config": {"effort": "high"},
    "system": [
        {"type": "text", "text": "x-anthropic-billing-header: cc_version=2.1.1.1c0; cc_entrypoint=cli;"},
        {"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}},
    ],
}


@pytest.fixture(scope="module")
def server(tiny_model: Path, caller_model: Path) -> Iterator[serving.Server]:
    models = ("--model", f"tiny={tiny_model}", "--model", f"caller={caller_model}", "--alias", "claude-*=tiny")
    with serving.server(*models, "--cache-size-gb", "0.05", *EXACT_OPTIONS) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: serving.Server) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0)


def said(message: Any) -> Any:
    """A message without what differs from one answer to the next."""
    blocks = [{**block.model_dump(exclude_none=True), "id": ""} for block in message.content]
    return blocks, message.stop_reason, message.stop_sequence, message.usage.model_dump(exclude_none=True)


@pytest.mark.slow
def test_official_client_streams_what_it_answers_whole(client: anthropic.Anthropic) -> None:
    asked: dict[str, Any] = {**HELLO, "model": "claude-opus-9", **GREEDY, "system": "ünïcödé 你好 🙂"}
    whole = client.messages.create(**asked)
    with client.messages.stream(**asked) as stream:
        joined = "".join(stream.text_stream)
        streamed = stream.get_final_message()
    assert said(streamed) == said(whole)
    assert joined == whole.content[0].text  # type: ignore[union-attr]
    assert (whole.model, whole.stop_reason, whole.usage.output_tokens) == ("claude-opus-9", "max_tokens", 12)
    counted = client.messages.count_tokens(
        model="claude-opus-9", messages=asked["messages"], system=asked["system"], tools=[]
    )
    assert counted.input_tokens == whole.usage.input_tokens == streamed.usage.input_tokens


@pytest.mark.slow
def test_models_are_listed(client: anthropic.Anthropic) -> None:
    assert [(model.id, model.display_name, model.type) for model in client.models.list()] == [
        ("tiny", "tiny", "model"),
        ("caller", "caller", "model"),
    ]
    model = client.models.retrieve("claude-opus-9")
    assert (model.id, model.created_at.tzinfo is not None) == ("tiny", True)


@pytest.mark.slow
def test_a_stop_sequence_is_named(client: anthropic.Anthropic) -> None:
    asked: dict[str, Any] = {**HELLO, "model": "tiny", **GREEDY, "max_tokens": 40}
    text = client.messages.create(**asked).content[0].text  # type: ignore[union-attr]
    stop = re.findall("[A-Za-z]{2,}", text)[-1]
    whole = client.messages.create(**asked, stop_sequences=["never written", stop])
    assert (whole.stop_reason, whole.stop_sequence) == ("stop_sequence", stop)
    assert whole.content[0].text == text[: text.index(stop)]  # type: ignore[union-attr]
    with client.messages.stream(**asked, stop_sequences=["never written", stop]) as stream:
        assert said(stream.get_final_message()) == said(whole)


@pytest.mark.slow
@pytest.mark.parametrize(
    "choice", [{"type": "auto"}, {"type": "any"}, {"type": "tool", "name": "get_weather"}], ids=str
)
def test_tools_are_called_and_their_results_are_read(client: anthropic.Anthropic, choice: Any) -> None:
    asked: dict[str, Any] = {
        "model": "caller",
        "messages": [{"role": "user", "content": "Weather in Paris?"}],
        "tools": [TOOL],
        "tool_choice": {**choice, "disable_parallel_tool_use": True},
    }
    whole = client.messages.create(**asked, max_tokens=2000)
    with client.messages.stream(**asked, max_tokens=2000) as stream:
        streamed = stream.get_final_message()
    for answer in (whole, streamed):
        assert answer.stop_reason == "tool_use"
        (call,) = [block for block in answer.content if block.type == "tool_use"]
        jsonschema_rs.validate(TOOL["input_schema"], call.input)
    result = {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "sunny"}]}
    asked["messages"] += [{"role": "assistant", "content": streamed.content}, {"role": "user", "content": [result]}]
    asked["tool_choice"] = {"type": "none"}
    answer = client.messages.create(**asked, max_tokens=4)
    counted = client.messages.count_tokens(**asked)
    assert counted.input_tokens == answer.usage.input_tokens > whole.usage.input_tokens - 300


@pytest.mark.slow
def test_an_answer_is_continued(client: anthropic.Anthropic) -> None:
    messages: Any = HELLO["messages"]
    begun = [*messages, {"role": "assistant", "content": "The quick brown"}]
    counts = [client.messages.count_tokens(model="tiny", messages=each).input_tokens for each in (messages, begun)]
    assert counts[0] < counts[1] <= counts[0] + len("The quick brown")
    answer = client.messages.create(model="tiny", messages=begun, max_tokens=4)  # type: ignore[arg-type]
    assert answer.usage.input_tokens == counts[1]


@pytest.mark.slow
def test_what_an_agent_sends_besides_is_accepted(client: anthropic.Anthropic, server: serving.Server) -> None:
    plain = client.messages.count_tokens(model="tiny", messages=HELLO["messages"], system="Be brief.")
    answer = server.http.post(
        "/v1/messages?beta=true",
        json={**HELLO, **CLAUDE_CODE, "model": "claude-opus-4-8", "max_tokens": 64000, "stream": True},
        headers={"anthropic-version": "2023-06-01", "anthropic-beta": "claude-code-20250219,effort-2025-11-24"},
    )
    assert answer.status_code == 200, answer.text
    assert answer.headers["request-id"].startswith("req_")
    events = [each.split("\n") for each in answer.text.strip().split("\n\n")]
    names = [name.removeprefix("event: ") for name, _ in events]
    bodies = [json.loads(data.removeprefix("data: ")) for _, data in events]
    assert [body["type"] for body in bodies] == names
    assert names[:3] == ["message_start", "ping", "content_block_start"]
    assert names[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert bodies[0]["message"]["usage"]["input_tokens"] == plain.input_tokens
    assert bodies[-2]["delta"]["stop_reason"] in ("end_turn", "model_context_window_exceeded")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"temperature": 2}, "temperature"),
        ({"unheard_of": 1}, "unheard_of"),
        ({"mcp_servers": [{"type": "url", "url": "http://x"}]}, "mcp_servers"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "'image'"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages.0.content"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "web_search_20250305"),
        ({"tools": [{"name": "x"}]}, "tools.0.input_schema"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"context_management": {"edits": [{"type": "compact_20260112"}]}}, "compact_20260112"),
    ],
    ids=str,
)
def test_what_cannot_be_done_is_refused_by_name(client: anthropic.Anthropic, changes: Any, name: str) -> None:
    with pytest.raises(anthropic.BadRequestError) as raised:
        client.messages.create(**{"model": "tiny", **HELLO}, extra_body=changes)
    body: Any = raised.value.body
    assert (body["type"], body["error"]["type"]) == ("error", "invalid_request_error")
    assert name in body["error"]["message"]
    assert raised.value.request_id == body["request_id"]


@pytest.mark.slow
def test_errors_have_the_types_of_the_client(client: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.NotFoundError) as raised:
        client.messages.create(model="none", **HELLO)
    assert raised.value.body["error"]["type"] == "not_found_error"  # type: ignore[index,call-overload]
    with pytest.raises(anthropic.BadRequestError):
        client.with_options(default_headers={"anthropic-version": "1999-01-01"}).messages.create(model="tiny", **HELLO)


@pytest.mark.slow
@pytest.mark.network
def test_official_client_for_node(server: serving.Server) -> None:
    folder = environments.node_packages("anthropic", "@anthropic-ai/sdk@1.14.0")
    script = Path(__file__).parents[1] / "support" / "anthropic_calls.mjs"
    done = environments.call("node", script, folder, server.url, json.dumps([TOOL]))
    assert done.returncode == 0, done.stderr[-2000:]
    answers = json.loads(done.stdout)
    assert answers["streamed"]["content"] == answers["whole"]["content"]
    assert answers["streamed"]["usage"] == answers["whole"]["usage"]
    assert answers["counted"]["input_tokens"] == answers["whole"]["usage"]["input_tokens"]
    assert answers["called"]["stop_reason"] == "tool_use"
    jsonschema_rs.validate(TOOL["input_schema"], answers["called"]["content"][-1]["input"])
    problem = answers["problem"]
    assert (problem["name"], problem["status"], problem["type"]) == ("NotFoundError", 404, "not_found_error")
    assert problem["id"].startswith("req_")


# -- Without a server


def translated(messages: list[Any], info: ModelInfo | None = None, **fields: Any) -> dict[str, Any]:
    body = MessagesRequest.model_validate({"model": "m", "max_tokens": 9, "messages": messages, **fields})
    return chat_request(body, info).model_dump(exclude_none=True)


def test_turns_become_messages() -> None:
    results = [{"type": "tool_result", "tool_use_id": "toolu_1", "content": "sunny", "is_error": True}]
    asked = translated(
        [
            {"role": "user", "content": "Weather?"},
            {"role": "user", "content": [{"type": "text", "text": "In Paris."}]},
            {"role": "system", "content": "Metric."},
            {"role": "assistant", "content": [{"type": "thinking", "thinking": "Hm.", "signature": "s"}, CALL]},
            {"role": "user", "content": [*results, {"type": "text", "text": "So?"}]},
        ],
        system=[{"type": "text", "text": "A"}, {"type": "text", "text": "B"}],
    )
    system, user, assistant, tool, last = asked["messages"]
    assert system == {"role": "system", "content": "A\n\nB"}
    assert user["content"] == "Weather?\n\nIn Paris.\n\n<system-reminder>\nMetric.\n</system-reminder>"
    assert assistant["reasoning_content"] == "Hm."
    assert assistant["tool_calls"][0]["function"] == {"name": "get_weather", "arguments": '{"city": "Paris"}'}
    assert tool == {"role": "tool", "tool_call_id": "toolu_1", "content": "Error: sunny"}
    assert last == {"role": "user", "content": "So?"}


def test_only_a_last_message_that_says_something_is_continued() -> None:
    hello = {"role": "user", "content": "Hello"}
    assert "continue_final_message" not in translated([hello])
    assert translated([hello, {"role": "assistant", "content": "Hi"}])["continue_final_message"]
    assert "continue_final_message" not in translated([hello, {"role": "assistant", "content": ""}])
    with pytest.raises(APIError):
        translated([hello, {"role": "assistant", "content": [CALL]}])


@pytest.mark.parametrize(
    ("fields", "effort"),
    [
        ({"thinking": {"type": "enabled", "budget_tokens": 2000}}, "medium"),
        ({"thinking": {"type": "disabled"}}, "none"),
        ({"thinking": {"type": "adaptive"}}, None),
        ({"output_config": {"effort": "max"}}, "xhigh"),
    ],
    ids=str,
)
def test_thinking_is_asked_of_a_template_that_can_think(fields: Any, effort: str | None) -> None:
    hello = [{"role": "user", "content": "Hello"}]
    thinks = ModelInfo("CPU", 100, True, template_variables=frozenset({"enable_thinking"}), reasoning=("<t>", "</t>"))
    assert translated(hello, thinks, **fields).get("reasoning_effort") == effort
    assert "reasoning_effort" not in translated(hello, ModelInfo("CPU", 100, True), **fields)


def test_tools_have_the_schemas_of_claude_code() -> None:
    properties = {
        "script": {"type": "string", "maxLength": 524288},
        "limit": {"type": "integer", "exclusiveMinimum": 0, "maximum": 9007199254740991},
        "timeout": {"type": "number", "default": 30000, "minimum": 0, "maximum": 600000},
        "metadata": {"type": "object", "propertyNames": {"type": "string"}, "additionalProperties": {}},
        "url": {"type": "string", "format": "uri"},
        "run": {"type": "string", "pattern": "^wf_[a-z0-9-]{6,}$"},
        "status": {"anyOf": [{"type": "string", "enum": ["pending"]}, {"type": "string", "const": "deleted"}]},
        "findings": {"type": "array", "maxItems": 32, "items": {"type": "string"}},
    }
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", "type": "object", "properties": properties}
    asked = {"messages": [{"role": "user", "content": "Hello"}], "tools": [{"name": "Agent", "input_schema": schema}]}
    body = MessagesRequest.model_validate({"model": "m", "max_tokens": 9, **asked})
    assert output_format(chat_request(body, None)) is not None


def events_of(pieces: list[Any], **fields: Any) -> list[dict[str, Any]]:
    """The events of an answer that thinks in `<t>`."""

    async def collect() -> list[bytes]:
        stream = Stream([7])
        running = Running(Answer("m", True, Metrics(), reasoning=("<t>", "</t>")), stream, contextlib.AsyncExitStack())
        for piece in pieces:
            stream.put(piece)
        body = MessagesRequest.model_validate({"model": "m", **HELLO, **fields})
        return [event async for event in wire.stream(running, body)]

    return [json.loads(event.decode().partition("\ndata: ")[2]) for event in asyncio.run(collect())]


@pytest.mark.parametrize("display", ["summarized", "omitted"])
def test_thoughts_are_a_block_of_their_own(display: str) -> None:
    pieces = [Piece(7, "<t>Hm, ", 1), Piece(7, "well.</t>", 1), Piece(7, "Yes", 1, end="stop")]
    events = events_of(pieces, thinking={"type": "enabled", "budget_tokens": 1024, "display": display})
    starts = [each["content_block"]["type"] for each in events if each["type"] == "content_block_start"]
    assert starts == ["thinking", "text"]
    deltas = [each["delta"] for each in events if each["type"] == "content_block_delta"]
    thoughts = "".join(each.get("thinking", "") for each in deltas)
    assert thoughts == ("Hm, well." if display == "summarized" else "")
    assert [each["type"] for each in deltas if "signature" in each] == ["signature_delta"]
    assert "".join(each.get("text", "") for each in deltas) == "Yes"
    assert [each["index"] for each in events if each["type"] == "content_block_stop"] == [0, 1]


def test_an_engine_that_dies_is_an_error_event() -> None:
    events = events_of([Piece(7, "Hel", 1), EngineLost("the engine ended")])
    assert events[-1]["type"] == "error"
    assert events[-1]["error"] == {"type": "overloaded_error", "message": "the engine ended"}
