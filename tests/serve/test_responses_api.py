"""OpenAI's Responses API: events in their order, items both ways, what is kept, what is refused."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import BaseModel, TypeAdapter
from support import serving
from support.exact import EXACT_OPTIONS
from support.scripted_model import Model, call

from ov_afm.serve.errors import APIError
from ov_afm.serve.wire.responses_store import ResponseStore

TOOL = {"type": "function", **serving.TOOL["function"]}
EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)


@pytest.fixture
def model() -> Model:
    return Model()


def without_ids(value: Any) -> Any:
    if isinstance(value, dict):
        dropped = ("id", "created_at", "completed_at")
        return {key: without_ids(each) for key, each in value.items() if key not in dropped}
    return [without_ids(each) for each in value] if isinstance(value, list) else value


def check_events(events: list[dict[str, Any]]) -> dict[str, Any]:
    """Check the order and the contents of a stream's events; returns the final response."""
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    for event in events:
        EVENT.validate_python(event, strict=False)
    assert [event["type"] for event in events[:2]] == ["response.created", "response.in_progress"]
    final = events[-1]
    assert final["type"] == f"response.{final['response']['status']}"
    items: list[dict[str, Any]] = []
    is_open, joined = False, ""
    for event in events[2:-1]:
        kind = event["type"].removeprefix("response.")
        if kind == "output_item.added":
            assert not is_open
            assert event["output_index"] == len(items)
            assert event["item"]["status"] == "in_progress"
            items.append(event["item"])
            is_open, joined = True, ""
            continue
        assert is_open
        assert event["output_index"] == len(items) - 1
        if kind == "output_item.done":
            item = event["item"]
            assert item["id"] == items[-1]["id"]
            texts = {"message": "content", "reasoning": "content", "function_call": "arguments"}
            text = item[texts.get(item["type"], "input")]
            assert joined == (text if isinstance(text, str) else text[0]["text"])
            items[-1], is_open = item, False
            continue
        assert event["item_id"] == items[-1]["id"]
        if kind.endswith(".delta"):
            joined += event["delta"]
        elif kind == "content_part.done":
            assert event["part"]["text"] == joined
        elif kind.endswith(".done"):
            assert event.get("text", event.get("arguments", event.get("input"))) == joined
    if final["type"] == "response.failed":
        assert "in_progress" not in [item["status"] for item in final["response"]["output"]]
    else:
        assert not is_open
        assert final["response"]["output"] == items
    return dict(final["response"])


TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8)
DELTAS = st.lists(
    st.one_of(
        TEXT.map(lambda text: [{"content": text}]),
        TEXT.map(lambda text: [{"reasoning_content": text}]),
        st.lists(TEXT, max_size=3).map(lambda pieces: ["call", *pieces]),
    ),
    max_size=8,
)


@settings(max_examples=25, deadline=None)
@given(DELTAS, st.sampled_from(["stop", "length", "tool_calls"]))
def test_joined_deltas_are_the_items_of_the_whole_answer(parts: list[list[Any]], finish: str) -> None:
    model, calls = Model(), 0
    model.deltas, model.finish = [], finish
    for part in parts:
        if part[0] == "call":
            model.deltas += call(calls, "get_weather", *part[1:])
            calls += 1
        else:
            model.deltas += part
    response = check_events(model.stream(tools=[TOOL]))
    whole = model.post(tools=[TOOL]).json()
    Response.model_validate(whole)
    assert without_ids(whole) == without_ids(response)
    assert whole["status"] == ("incomplete" if finish == "length" else "completed")
    assert whole["incomplete_details"] == ({"reason": "max_output_tokens"} if finish == "length" else None)
    assert [item["status"] for item in whole["output"]][:-1] == ["completed"] * (len(whole["output"]) - 1)
    assert whole["output"][-1]["status"] == whole["status"]
    texts = [item["content"][0]["text"] for item in whole["output"] if item["type"] == "message"]
    assert "".join(texts) == "".join(delta.get("content", "") for delta in model.deltas)


def test_events_of_reasoning_text_and_a_call_are_openais(model: Model) -> None:
    model.deltas = [{"reasoning_content": "Hm"}, {"content": "Let me"}, *call(0, "get_weather", '{"city"', ': "Rome"}')]
    model.finish = "tool_calls"
    events = model.stream(tools=[TOOL])
    check_events(events)
    assert [event["type"].removeprefix("response.") for event in events] == [
        *("created", "in_progress"),
        *("output_item.added", "content_part.added", "reasoning_text.delta"),
        *("reasoning_text.done", "content_part.done", "output_item.done"),
        *("output_item.added", "content_part.added", "output_text.delta"),
        *("output_text.done", "content_part.done", "output_item.done"),
        *("output_item.added", "function_call_arguments.delta", "function_call_arguments.delta"),
        *("function_call_arguments.done", "output_item.done", "completed"),
    ]
    reasoning, message, function = events[-1]["response"]["output"]
    assert reasoning["content"] == [{"type": "reasoning_text", "text": "Hm"}]
    assert message["content"] == [{"type": "output_text", "text": "Let me", "annotations": [], "logprobs": []}]
    assert (function["name"], function["call_id"]) == ("get_weather", "call_0")
    assert events[-1]["response"]["usage"]["total_tokens"] == 15


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (APIError("lost", status=503), "server_error"),
        (APIError("too long"), "invalid_prompt"),
        (OSError(), "server_error"),
    ],
    ids=["503", "400", "bug"],
)
def test_an_error_within_a_stream_is_a_failed_response_that_is_not_kept(
    model: Model, error: Exception, code: str
) -> None:
    model.finish = error
    response = check_events(model.stream())
    assert (response["status"], response["error"]["code"]) == ("failed", code)
    assert asyncio.run(model.http.get(f"/v1/responses/{response['id']}")).status_code == 404
    assert model.post().status_code == getattr(error, "status", 500)


def test_functions_of_a_namespace_and_custom_tools_go_there_and_back(model: Model) -> None:
    space = {"type": "namespace", "name": "files", "description": "Files", "tools": [{**TOOL, "name": "read"}]}
    custom = {"type": "custom", "name": "run", "description": "Run code", "format": {"type": "text"}}
    model.deltas = [*call(0, "files.read", "{}"), *call(1, "run", '{"input": "a\\n', '\\"b\\""}')]
    response = check_events(model.stream(tools=[space, custom]))
    assert [tool.function.name for tool in model.asked[-1].tools or []] == ["files.read", "run"]
    read, run = response["output"]
    assert (read["type"], read["namespace"], read["name"]) == ("function_call", "files", "read")
    assert (run["type"], run["name"], run["input"]) == ("custom_tool_call", "run", 'a\n"b"')
    results = [
        {"type": "function_call_output", "call_id": "call_0", "output": "text"},
        {"type": "custom_tool_call_output", "call_id": "call_1", "output": [{"type": "input_text", "text": "ran"}]},
    ]
    assert model.post(input=[{"role": "user", "content": "x"}, read, run, *results]).status_code == 200
    asked = model.messages()
    functions = [each["function"] for each in asked[1]["tool_calls"]]
    assert functions[0] == {"name": "files.read", "arguments": "{}"}
    assert (functions[1]["name"], json.loads(functions[1]["arguments"])) == ("run", {"input": 'a\n"b"'})
    assert [(each["role"], each["tool_call_id"], each["content"]) for each in asked[2:]] == [
        ("tool", "call_0", "text"),
        ("tool", "call_1", "ran"),
    ]


def test_items_become_messages(model: Model) -> None:
    items = [
        {"role": "developer", "content": "Be brief."},
        {"type": "message", "role": "system", "content": [{"type": "input_text", "text": "Be kind."}]},
        {"role": "user", "content": "Weather?"},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm"}]},
        {"role": "assistant", "content": [{"type": "output_text", "text": "Let me", "annotations": []}]},
        {"type": "function_call", "call_id": "c1", "name": "get_weather", "arguments": '{"city": "Rome"}'},
        {"type": "function_call", "call_id": "c2", "name": "get_weather", "arguments": '{"city": "Paris"}'},
        {"type": "function_call_output", "call_id": "c1", "output": "sunny"},
        {"type": "function_call_output", "call_id": "c2", "output": "wet"},
        {"role": "developer", "content": "Now."},
    ]
    assert model.post(input=items, instructions="You are a clerk.", tools=[TOOL]).status_code == 200
    system, user, assistant, *results, last = model.messages()
    # One system message, which is all that many templates know.
    assert system == {"role": "system", "content": "You are a clerk.\n\nBe brief.\n\nBe kind."}
    assert user == {"role": "user", "content": "Weather?"}
    assert (assistant["content"], assistant["reasoning_content"]) == ("Let me", "Hm")
    assert [each["id"] for each in assistant["tool_calls"]] == ["c1", "c2"]
    assert [each["content"] for each in results] == ["sunny", "wet"]
    assert last == {"role": "developer", "content": "Now."}


def test_choices_of_tools_are_chats(model: Model) -> None:
    named = {"type": "function", "name": "get_weather"}
    assert model.post(tools=[TOOL], tool_choice=named).status_code == 200
    choice = model.asked[-1].tool_choice
    assert isinstance(choice, BaseModel)
    assert choice.model_dump(exclude_none=True) == {"type": "function", "function": {"name": "get_weather"}}


def test_the_oldest_turns_are_dropped_only_where_truncation_is_auto(model: Model) -> None:
    turns = [{"role": role, "content": f"{role} {index}"} for index in range(9) for role in ("user", "assistant")]
    items = [{"role": "system", "content": "Be brief."}, *turns, {"role": "user", "content": "Now"}]
    model.longest = 8
    refused = model.post(input=items)
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "context_length_exceeded")
    assert refused.json()["error"]["param"] == "input"
    answer = model.post(input=items, truncation="auto", max_output_tokens=2).json()
    assert answer["truncation"] == "auto"
    asked = model.messages()
    assert asked[0]["content"] == "Be brief."
    # Room for an answer of two.
    assert [each["content"] for each in asked[1:]] == ["user 7", "assistant 7", "user 8", "assistant 8", "Now"]
    model.longest = 1
    assert model.post(input=items, truncation="auto").status_code == 400


# --- What is kept


def test_a_response_is_kept_continued_and_forgotten(model: Model) -> None:
    first = model.post(instructions="Be brief.", metadata={"a": "b"}).json()
    one = f"/v1/responses/{first['id']}"
    assert asyncio.run(model.http.get(one)).json() == first
    assert first["metadata"] == {"a": "b"}
    second = model.post(input="More", previous_response_id=first["id"]).json()
    # Instructions are not carried over.
    contents = [(message["role"], message["content"]) for message in model.messages()]
    assert contents == [("user", "Hello"), ("assistant", "Hi"), ("user", "More")]
    items = asyncio.run(model.http.get(f"/v1/responses/{second['id']}/input_items?order=asc&limit=2")).json()
    assert [item["content"][0]["text"] for item in items["data"]] == ["Hello", "Hi"]
    assert items["has_more"]
    after = asyncio.run(model.http.get(f"/v1/responses/{second['id']}/input_items?order=asc&after={items['last_id']}"))
    assert [item["content"][0]["text"] for item in after.json()["data"]] == ["More"]
    reference = {"type": "item_reference", "id": first["output"][0]["id"]}
    assert model.post(input=[reference, {"role": "user", "content": "x"}]).status_code == 200
    assert model.messages()[0] == {"role": "assistant", "content": "Hi"}
    assert asyncio.run(model.http.delete(one)).json() == {"id": first["id"], "object": "response", "deleted": True}
    for method in (model.http.get, model.http.delete):
        assert asyncio.run(method(one)).status_code == 404
    gone = model.post(previous_response_id=first["id"])
    assert (gone.status_code, gone.json()["error"]["code"]) == (400, "previous_response_not_found")


@pytest.mark.parametrize("stream", [False, True])
def test_what_shall_not_be_kept_is_not(model: Model, stream: bool) -> None:
    answer = model.stream(store=False)[-1]["response"] if stream else model.post(store=False).json()
    assert answer["store"] is False
    assert asyncio.run(model.http.get(f"/v1/responses/{answer['id']}")).status_code == 404
    reference = {"type": "item_reference", "id": answer["output"][0]["id"]}
    assert model.post(input=[reference]).json()["error"]["code"] == "item_not_found"


def kept(store: ResponseStore, name: str, text: str = "") -> None:
    store.keep({"id": name, "output": [{"id": f"out_{name}", "text": text}]}, [{"id": f"in_{name}"}])


def test_the_oldest_responses_are_forgotten_by_number_and_by_size() -> None:
    store = ResponseStore(max_responses=3, max_bytes=1000)
    for name in "abcde":
        kept(store, name)
    assert [store.get(name) is not None for name in "abcde"] == [False, False, True, True, True]
    assert store.item("out_b") is None
    assert store.item("out_e") == {"id": "out_e", "text": ""}
    kept(store, "f", "x" * 900)
    assert [store.get(name) is not None for name in "cdef"] == [False, False, False, True]
    kept(store, "g", "x" * 2000)
    assert store.get("g") is None
    assert store.get("f") is not None
    assert 900 < store.bytes <= 1000
    assert store.forget("f")
    assert (len(store), store.bytes) == (0, 0)


# --- What is refused


USER = {"role": "user", "content": "x"}
IMAGE = {"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "background": ({"background": True}, "background"),
    "conversation": ({"conversation": "conv_1"}, "conversation"),
    "prompt": ({"prompt": {"id": "pmpt_1"}}, "prompt"),
    "unknown field": ({"frob": 1}, "frob"),
    "logprobs": ({"include": ["message.output_text.logprobs"]}, "include.0"),
    "verbosity": ({"text": {"verbosity": "low"}}, "text.verbosity"),
    "summary": ({"reasoning": {"summary": "detailed"}}, "reasoning.summary"),
    "service tier": ({"service_tier": "priority"}, "service_tier"),
    "padding": ({"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options"),
    "temperature": ({"temperature": 9}, "temperature"),
    "no tokens": ({"max_output_tokens": 0}, "max_output_tokens"),
    "schema missing": ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
    "web search": ({"tools": [{"type": "web_search"}]}, "tools.0"),
    "shell": ({"tools": [TOOL, {"type": "local_shell"}]}, "tools.1"),
    "custom tool with a grammar": (
        {"tools": [{"type": "custom", "name": "x", "format": {"type": "grammar", "syntax": "lark"}}]},
        "tools.0.format",
    ),
    "tool's name": ({"tools": [{"type": "function", "name": "a b"}]}, "tools.0.name"),
    "two tools": ({"tools": [TOOL, TOOL]}, "tools.1.name"),
    "unknown choice": ({"tools": [TOOL], "tool_choice": {"type": "function", "name": "other"}}, "tool_choice"),
    "choice of a search": ({"tools": [TOOL], "tool_choice": {"type": "file_search"}}, "tool_choice"),
    "item": ({"input": [USER, {"type": "web_search_call", "id": "x"}]}, "input.1"),
    "image": ({"input": [IMAGE]}, "input.0.content.0"),
    "field of an item": ({"input": [{**USER, "frob": 1}]}, "input.0.frob"),
    "orphaned result": ({"input": [{"type": "function_call_output", "call_id": "x", "output": "y"}]}, "input"),
    "foreign reasoning": ({"input": [{"type": "reasoning", "summary": [], "encrypted_content": "x"}]}, "input.0"),
    "nothing": ({"input": []}, "input"),
}


@pytest.mark.parametrize(("body", "param"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_honoured_is_refused_by_name(model: Model, body: dict[str, Any], param: str) -> None:
    answer = model.post(**body)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"].startswith(param)
    assert error["type"] == "invalid_request_error"
    assert "\n" not in error["message"]


def test_hints_that_change_no_answer_are_taken(model: Model) -> None:
    # As Codex sends them.
    hints = {
        "include": ["reasoning.encrypted_content"],
        "prompt_cache_key": "01a2",
        "client_metadata": {"turn_id": "01a2"},
        "reasoning": {"summary": "auto"},
        "service_tier": "auto",
        "safety_identifier": "somebody",
        "parallel_tool_calls": True,
        "store": False,
    }
    answer = model.post(**hints).json()
    assert answer["prompt_cache_key"] == "01a2"
    assert answer["service_tier"] == "default"


# --- The real server and the official client


@pytest.fixture(scope="module")
def server(tiny_model: Path) -> Iterator[serving.Server]:
    with serving.server("--model", f"tiny={tiny_model}", "--cache-size-gb", "0.05", *EXACT_OPTIONS) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: serving.Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


@pytest.fixture
def ask(client: openai.OpenAI) -> Callable[..., Any]:
    def ask(**fields: Any) -> Any:
        return client.responses.create(**{"model": "tiny", "input": "Hello", "temperature": 0, **fields})

    return ask


def test_the_official_client_streams_what_it_gets_whole_and_chat_says_the_same(
    server: serving.Server, client: openai.OpenAI, ask: Callable[..., Any]
) -> None:
    whole = ask(max_output_tokens=30)
    events = list(ask(max_output_tokens=30, stream=True))
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    chat = server.chat(max_tokens=30).json()
    assert "".join(deltas) == whole.output_text == chat["choices"][0]["message"]["content"]
    assert events[-1].response.usage.output_tokens == chat["usage"]["completion_tokens"]
    assert whole.usage.input_tokens == chat["usage"]["prompt_tokens"]
    assert client.responses.input_tokens.count(model="tiny", input="Hello").input_tokens == whole.usage.input_tokens


def test_a_conversation_that_is_kept_is_one_that_is_sent(ask: Callable[..., Any]) -> None:
    first = ask(max_output_tokens=8)
    kept = ask(input="More", previous_response_id=first.id, max_output_tokens=8)
    sent = [{"role": "user", "content": "Hello"}, *first.output, {"role": "user", "content": "More"}]
    assert ask(input=sent, max_output_tokens=8).output_text == kept.output_text


def test_a_conversation_beyond_the_context_is_cut_where_truncation_is_auto(
    server: serving.Server, ask: Callable[..., Any]
) -> None:
    limit = server.http.get("/v1/models/tiny").json()["max_model_len"]
    turns = [{"role": role, "content": "word " * (limit // 30)} for _ in range(20) for role in ("user", "assistant")]
    items = [*turns, {"role": "user", "content": "Now"}]
    with pytest.raises(openai.BadRequestError, match=str(limit)):
        ask(input=items, max_output_tokens=4)
    assert limit // 3 < ask(input=items, max_output_tokens=4, truncation="auto").usage.input_tokens < limit


def test_the_official_client_parses_an_answer_by_a_schema(client: openai.OpenAI) -> None:
    class Choice(BaseModel):
        yes: bool

    # An untrained model writes much white space, of which JSON may have any amount.
    answer = client.responses.parse(model="tiny", input="Which?", text_format=Choice, max_output_tokens=2000)
    assert isinstance(answer.output_parsed, Choice)


def test_a_schema_that_no_grammar_fits_is_refused_in_this_apis_words(server: serving.Server) -> None:
    form = {"type": "json_schema", "name": "x", "schema": {"type": "nonsense"}}
    answer = server.post("/v1/responses", input="x", text={"format": form})
    assert answer.status_code == 400
    assert "response_format" not in answer.text
