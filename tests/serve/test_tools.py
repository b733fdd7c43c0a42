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


QUESTION = {"role": "user", "content": "Weather in Paris?"}
ASKED: dict[str, Any] = {"messages": [QUESTION], "tools": [serving.TOOL], "max_tokens": 2000, "seed": 3}


def streamed(server: serving.Server, **body: Any) -> list[dict[str, Any]]:
    """The choices of a stream's events."""
    lines = server.post("/v1/chat/completions", **body, stream=True).text.splitlines()
    events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    assert not any("error" in event for event in events), events
    return [choice for event in events for choice in event["choices"]]


def test_an_answer_cut_off_in_the_head_of_a_call_is_empty(server: serving.Server) -> None:
    for limit in (1, 2, 20):
        body = {**ASKED, "max_tokens": limit}
        choice = server.post("/v1/chat/completions", **body).json()["choices"][0]
        assert (choice["message"]["content"], choice["finish_reason"]) == ("", "length")
        assert not choice["message"].get("tool_calls")
        deltas = [each["delta"] for each in streamed(server, **body)]
        assert not any(delta.get("content") or "tool_calls" in delta for delta in deltas)


@pytest.mark.parametrize("stop", [["city"], ["}"], ["\n", '"'], ["Paris", "Rome"]], ids=str)
def test_a_stop_string_cuts_no_call(server: serving.Server, stop: list[str]) -> None:
    choice = server.post("/v1/chat/completions", **ASKED, stop=stop).json()["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    for call in choice["message"]["tool_calls"]:
        jsonschema_rs.validate(serving.TOOL["function"]["parameters"], json.loads(call["function"]["arguments"]))
    # Before a call it ends the answer, as everywhere.
    choice = server.post("/v1/chat/completions", **ASKED, stop=["<tool"]).json()["choices"][0]
    assert (choice["finish_reason"], choice["message"]["content"]) == ("stop", "")


SCHEMA = {"type": "object", "properties": {"sky": {"enum": ["blue", "grey"]}}, "required": ["sky"]}
FORM = {"type": "json_schema", "json_schema": {"name": "sky", "schema": {**SCHEMA, "additionalProperties": False}}}


def test_with_tools_and_a_schema_the_answer_is_calls_or_follows_the_schema(server: serving.Server) -> None:
    """What agents ask that want an object at the end of their work."""
    choice = server.post("/v1/chat/completions", **ASKED, response_format=FORM).json()["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    jsonschema_rs.validate(
        serving.TOOL["function"]["parameters"],
        json.loads(choice["message"]["tool_calls"][0]["function"]["arguments"]),
    )
    # The model begins calls at the beginning of a turn alone.
    body = {**ASKED, "messages": [QUESTION, {"role": "assistant", "content": "So: "}], "continue_final_message": True}
    kinds = set()
    for seed in range(4):
        choice = server.post("/v1/chat/completions", **{**body, "seed": seed}, response_format=FORM).json()["choices"][
            0
        ]
        kinds.add(choice["finish_reason"])
        if choice["finish_reason"] == "stop":
            jsonschema_rs.validate(FORM["json_schema"]["schema"], json.loads(choice["message"]["content"]))  # type: ignore[index]
    assert kinds <= {"stop", "tool_calls"}
    assert "stop" in kinds
    choice = server.post("/v1/chat/completions", **ASKED, response_format=FORM, tool_choice="none").json()["choices"][0]
    jsonschema_rs.validate(SCHEMA, json.loads(choice["message"]["content"]))


def other_tool(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "strict": True, "parameters": SCHEMA}}


def allowed(*names: str, mode: str = "auto") -> dict[str, Any]:
    tools = [{"type": "function", "function": {"name": name}} for name in names]
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}


@pytest.mark.parametrize("mode", ["auto", "required"])
def test_only_allowed_tools_are_called_and_the_prompt_has_all(server: serving.Server, mode: str) -> None:
    tools = [serving.TOOL, other_tool("sky")]
    body = {**ASKED, "tools": tools}
    alone = server.post("/v1/chat/completions", **body).json()
    answer = server.post("/v1/chat/completions", **body, tool_choice=allowed("sky", mode=mode)).json()
    assert {call["function"]["name"] for call in answer["choices"][0]["message"]["tool_calls"]} == {"sky"}
    assert answer["usage"]["prompt_tokens"] == alone["usage"]["prompt_tokens"]
    refused = server.post("/v1/chat/completions", **body, tool_choice=allowed("sea"))
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "tool_choice")


FUNCTION = serving.TOOL["function"]


def test_the_form_before_tools_is_answered_in_that_form(server: serving.Server) -> None:
    for choice in (None, {"name": "get_weather"}):
        body = {"messages": [QUESTION], "functions": [FUNCTION], "function_call": choice, "max_tokens": 2000, "seed": 3}
        answer = server.post("/v1/chat/completions", **body).json()["choices"][0]
        assert answer["finish_reason"] == "function_call"
        assert not answer["message"].get("tool_calls")
        call = answer["message"]["function_call"]
        assert call["name"] == "get_weather"
        jsonschema_rs.validate(FUNCTION["parameters"], json.loads(call["arguments"]))
        choices = streamed(server, **body)
        deltas = [each["delta"]["function_call"] for each in choices if "function_call" in each["delta"]]
        assert deltas[0]["name"] == "get_weather"
        assert "".join(delta["arguments"] for delta in deltas) == call["arguments"]
        assert choices[-1]["finish_reason"] == "function_call"
    mixed = server.post("/v1/chat/completions", **{**body, "tools": [serving.TOOL]})
    assert (mixed.status_code, mixed.json()["error"]["param"]) == (400, "functions")
    alone = server.chat(function_call={"name": "get_weather"})
    assert (alone.status_code, alone.json()["error"]["param"]) == (400, "function_call")


CALL = {"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'}}
HISTORY = [
    {"role": "developer", "content": "Be brief."},
    QUESTION,
    {"role": "assistant", "content": None, "tool_calls": [CALL, {**CALL, "id": "c2"}]},
    {"role": "tool", "tool_call_id": "c2", "content": None},
    {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "sunny"}]},
    {"role": "system", "content": "The user is in a hurry."},
    {"role": "assistant", "content": None},
]
PROMPTS: dict[str, dict[str, Any]] = {
    "a history": {"messages": HISTORY},
    "a history with tools": {"messages": HISTORY, "tools": [serving.TOOL]},
    "tools that may not be called": {"messages": HISTORY, "tools": [serving.TOOL], "tool_choice": "none"},
    "no tools": {"messages": HISTORY, "tools": [], "tool_choice": "auto", "parallel_tool_calls": True},
    "functions": {"messages": [QUESTION], "functions": [FUNCTION]},
    "no prompt for the answer": {"messages": HISTORY, "add_generation_prompt": False},
    "a continued answer": {
        "messages": [QUESTION, {"role": "assistant", "content": "So "}],
        "continue_final_message": True,
        "add_generation_prompt": False,
    },
    "options": {"messages": [QUESTION], "chat_template_kwargs": {"enable_thinking": False}},
}


@pytest.mark.parametrize("body", PROMPTS.values(), ids=PROMPTS)
def test_tokenize_counts_what_chat_uses(server: serving.Server, body: dict[str, Any]) -> None:
    answer = server.post("/v1/chat/completions", **body, max_tokens=1)
    assert answer.status_code == 200, answer.text
    tokens = server.post("/tokenize", **{key: value for key, value in body.items() if key != "parallel_tool_calls"})
    assert tokens.json()["count"] == answer.json()["usage"]["prompt_tokens"]


def test_a_continued_answer_goes_on_where_its_text_ends(server: serving.Server) -> None:
    messages = [QUESTION, {"role": "assistant", "content": "So it is"}]
    tokens = server.post("/tokenize", messages=messages, continue_final_message=True).json()["tokens"]
    assert server.post("/detokenize", tokens=tokens).json()["prompt"].endswith("assistant\nSo it is")
    closed = server.post("/tokenize", messages=messages, add_generation_prompt=False).json()["tokens"]
    assert server.post("/detokenize", tokens=closed).json()["prompt"].endswith("So it is<|im_end|>\n")
    both = {"continue_final_message": True, "add_generation_prompt": True}
    for route in ("/tokenize", "/v1/chat/completions"):
        refused = server.post(route, messages=messages, **both)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "continue_final_message")


def test_what_the_template_cannot_be_told_is_refused_by_name(server: serving.Server) -> None:
    for field, value in (("reasoning_effort", "low"), ("chat_template", "{{ messages }}"), ("documents", [{}])):
        refused = server.chat(**{field: value})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, field)
        refused = server.post("/tokenize", messages=[QUESTION], **{field: value})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, field)
    assert server.chat(reasoning_effort="none").status_code == 200
    refused = server.chat(chat_template_kwargs={"eos_token": "x"})
    assert refused.status_code == 400
    assert "eos_token" in refused.json()["error"]["message"]


def test_an_agent_of_langchain_calls_and_gets_its_result_back(server: serving.Server) -> None:
    from langchain_core.messages import HumanMessage, ToolMessage
    from langchain_openai import ChatOpenAI

    chat = ChatOpenAI(model="caller", base_url=f"{server.url}/v1", api_key="x", max_tokens=2000, seed=3)  # type: ignore[arg-type,call-arg]
    bound = chat.bind_tools([serving.TOOL], strict=True)
    asks = HumanMessage("Weather in Paris?")
    says = bound.invoke([asks])
    (call, *_) = says.tool_calls
    assert call["name"] == "get_weather"
    assert call["args"]["city"] in ("Paris", "Rome")
    results = [ToolMessage([{"type": "text", "text": "sunny"}], tool_call_id=each["id"]) for each in says.tool_calls]
    assert bound.invoke([asks, says, *reversed(results)]).tool_calls


def test_without_tools_a_call_is_plain_text(server: serving.Server) -> None:
    answer = server.chat(max_tokens=5).json()["choices"][0]
    assert answer["message"]["content"].startswith("<tool_call>")
    assert "tool_calls" not in answer["message"] or answer["message"]["tool_calls"] is None
