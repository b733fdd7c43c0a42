"""Histories that agents keep, in whichever form: one conversation for the template."""

from __future__ import annotations

from typing import Any

import pytest
from support import serving

from ov_afm.serve.conversation import prompt_of
from ov_afm.serve.errors import APIError
from ov_afm.serve.messages import Chat, ModelInfo
from ov_afm.serve.protocol import ChatRequest

KNOWS = ModelInfo("CPU", 100, template_knows_tools=True, template_knows_calls=True)
KNOWS_NOTHING = ModelInfo("CPU", 100, template_knows_tools=False)
FUNCTION = serving.TOOL["function"]
ASKS = {"role": "user", "content": "Weather in Paris and Rome?"}


def called(call_id: str | None, city: str, **fields: Any) -> dict[str, Any]:
    named = {} if call_id is None else {"id": call_id}
    function = {"name": "get_weather", "arguments": f'{{"city": "{city}"}}', **fields}
    return {**named, "type": "function", "function": function}


CALLS = {"role": "assistant", "content": None, "tool_calls": [called("a", "Paris"), called("b", "Rome")]}
SUNNY = {"role": "tool", "tool_call_id": "a", "content": "sunny"}
RAINY = {"role": "tool", "tool_call_id": "b", "content": "rainy"}


def prompt(*messages: dict[str, Any], info: ModelInfo | None = KNOWS, **fields: Any) -> Chat:
    return prompt_of(ChatRequest(messages=list(messages), **fields), info)


def test_ids_of_calls_reach_the_template_and_results_have_the_order_of_their_calls() -> None:
    expected = prompt(ASKS, CALLS, SUNNY, RAINY)
    assert [call["id"] for call in expected.messages[1]["tool_calls"]] == ["a", "b"]
    assert [message.get("tool_call_id") for message in expected.messages] == [None, None, "a", "b"]
    assert prompt(ASKS, CALLS, RAINY, SUNNY) == expected


def test_results_of_two_turns_whose_calls_have_the_same_ids_stay_with_their_turn() -> None:
    again = [CALLS, {**RAINY, "content": "dry"}, {**SUNNY, "content": "windy"}]
    contents = [message["content"] for message in prompt(ASKS, CALLS, RAINY, SUNNY, *again).messages]
    assert contents == [ASKS["content"], "", "sunny", "rainy", "", "windy", "dry"]


@pytest.mark.parametrize("known", [[ASKS, CALLS], [ASKS]], ids=["calls", "no calls"])
def test_a_result_of_an_unknown_call_is_refused_by_name(known: list[dict[str, Any]]) -> None:
    with pytest.raises(APIError, match=r"no call before it has the id 'z'") as caught:
        prompt(*known, {**SUNNY, "tool_call_id": "z"})
    assert caught.value.param == f"messages.{len(known)}.tool_call_id"


def forms(**changes: Any) -> list[dict[str, Any]]:
    """A call and its result, with changed messages."""
    call = {"role": "assistant", "content": "", "tool_calls": [called("a", "Paris")]}
    return [ASKS, {**call, **changes.get("call", {})}, {**SUNNY, **changes.get("result", {})}]


OLD_CALL = {"name": "get_weather", "arguments": '{"city": "Paris"}'}
SAME: dict[str, list[dict[str, Any]]] = {
    "null beside calls": forms(call={"content": None}),
    "arguments as an object": forms(call={"tool_calls": [called("a", "", arguments={"city": "Paris"})]}),
    "a call without type": forms(call={"tool_calls": [{"id": "a", "function": OLD_CALL}]}),
    "parts of text": forms(result={"content": [{"type": "text", "text": "sun"}, {"type": "text", "text": "ny"}]}),
    "nulls everywhere": forms(call={"name": None, "function_call": None, "refusal": None}, result={"name": None}),
    "unknown fields": forms(call={"annotations": [], "index": 0}, result={"is_error": False}),
}


@pytest.mark.parametrize("messages", SAME.values(), ids=SAME)
def test_every_form_of_a_turn_is_the_same_prompt(messages: list[dict[str, Any]]) -> None:
    assert prompt(*messages) == prompt(*forms())


def test_the_form_before_tools_is_the_same_conversation_without_ids() -> None:
    old = [
        ASKS,
        {"role": "assistant", "content": None, "function_call": OLD_CALL},
        {"role": "function", "name": "get_weather", "content": "sunny"},
    ]
    chat = prompt(*old, functions=[FUNCTION])
    assert chat.tools == prompt(ASKS, tools=[serving.TOOL]).tools
    assert chat.messages[1]["tool_calls"] == [
        {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Paris"}}}
    ]
    assert chat.messages[2] == {"role": "tool", "name": "get_weather", "content": "sunny"}


def test_empty_lists_of_functions_and_tools_contradict_nothing() -> None:
    for fields in ({"functions": [], "tools": [serving.TOOL]}, {"functions": None, "tools": [serving.TOOL]}):
        assert prompt(ASKS, **fields).tools is not None
    assert prompt(ASKS, functions=[], tools=[], tool_choice="none").tools is None
    for fields in (
        {"function_call": "auto", "tools": [serving.TOOL]},
        {"functions": [FUNCTION], "tool_choice": "auto"},
    ):
        with pytest.raises(APIError) as caught:
            prompt(ASKS, **fields)
        assert caught.value.param == "functions"


EMPTY: dict[str, tuple[dict[str, Any], str]] = {
    "an assistant that says nothing": ({"role": "assistant", "content": None}, ""),
    "an assistant without content": ({"role": "assistant"}, ""),
    "an assistant that refuses": ({"role": "assistant", "content": None, "refusal": "I cannot."}, "I cannot."),
    "a refusal in a part": ({"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]}, "No."),
    "a user's null": ({"role": "user", "content": None}, ""),
    "no parts": ({"role": "user", "content": []}, ""),
}


@pytest.mark.parametrize(("message", "content"), EMPTY.values(), ids=EMPTY)
def test_a_turn_without_text_is_an_empty_one(message: dict[str, Any], content: str) -> None:
    assert prompt(ASKS, message, ASKS).messages[1]["content"] == content


def test_a_result_without_text_is_an_empty_one() -> None:
    assert prompt(*forms(result={"content": None})).messages[2]["content"] == ""


@pytest.mark.parametrize(
    ("given", "expected"),
    [("", {}), ("null", {}), (None, {}), ("  ", {}), ('{"city": "Par', '{"city": "Par'), ("[1]", [1])],
    ids=str,
)
def test_arguments_that_are_no_object_do_not_end_a_conversation(given: str | None, expected: Any) -> None:
    chat = prompt(ASKS, {"role": "assistant", "tool_calls": [called("a", "", arguments=given)]})
    assert chat.messages[1]["tool_calls"][0]["function"]["arguments"] == expected


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}, "messages.1.content.0"),
        ({"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "file"}]}, "messages.1.content.1"),
        ({"role": "assistant", "audio": {"id": "x"}}, "messages.1.audio"),
        ({"role": "user"}, "messages.1.content"),
    ],
)
def test_what_is_not_text_is_refused_by_name(message: dict[str, Any], param: str) -> None:
    with pytest.raises(APIError) as caught:
        prompt(ASKS, message)
    assert caught.value.param == param


def test_thoughts_of_earlier_answers_reach_the_template_under_one_name() -> None:
    for name in ("reasoning_content", "reasoning"):
        chat = prompt(ASKS, {"role": "assistant", "content": "Sunny.", name: "I look."}, ASKS)
        assert chat.messages[1] == {"role": "assistant", "content": "Sunny.", "reasoning_content": "I look."}


def test_where_the_template_knows_no_tools_they_are_described_in_words() -> None:
    chat = prompt(ASKS, CALLS, RAINY, SUNNY, tools=[serving.TOOL], info=KNOWS_NOTHING)
    assert chat.tools is None
    system, _, calls, results = chat.messages
    assert "get_weather" in system["content"]
    assert calls["content"].count("<tool_call>") == 2
    # One turn of the user's, because some templates want turns to alternate.
    assert results["role"] == "user"
    assert results["content"].index("sunny") < results["content"].index("rainy")
    half = ModelInfo("CPU", 100, template_knows_tools=True)
    shown = prompt(ASKS, CALLS, SUNNY, tools=[serving.TOOL], info=half)
    assert shown.tools is not None
    assert "<tool_call>" in shown.messages[1]["content"]


@pytest.mark.parametrize(
    ("last", "fields", "what"),
    [
        (ASKS, {}, "role 'user'"),
        (CALLS, {}, "tool calls"),
        ({"role": "assistant", "content": "So"}, {"add_generation_prompt": True}, "only one of them"),
    ],
)
def test_only_text_of_the_assistant_is_continued(last: dict[str, Any], fields: dict[str, Any], what: str) -> None:
    with pytest.raises(APIError, match=what) as caught:
        prompt(ASKS, last, continue_final_message=True, **fields)
    assert caught.value.param == "continue_final_message"


def test_how_the_prompt_ends() -> None:
    said = {"role": "assistant", "content": "So"}
    ends = [
        ({}, (True, False)),
        ({"add_generation_prompt": False}, (False, False)),
        ({"continue_final_message": True}, (False, True)),
        ({"continue_final_message": True, "add_generation_prompt": False}, (False, True)),
    ]
    for fields, expected in ends:
        chat = prompt(ASKS, said, **fields)
        assert (chat.open_turn, chat.continues) == expected
    # As DeepSeek and Mistral have it.
    assert prompt(ASKS, {**said, "prefix": True}).continues
    for messages, fields in (
        ([{**said, "prefix": True}, ASKS], {}),
        ([ASKS, {**said, "prefix": True}], {"continue_final_message": False}),
        ([ASKS, {**said, "prefix": True}], {"add_generation_prompt": True}),
        ([{**ASKS, "prefix": True}], {}),
    ):
        with pytest.raises(APIError) as caught:
            prompt(*messages, **fields)
        assert str(caught.value.param).endswith("prefix")


@pytest.mark.parametrize(
    ("variables", "effort", "options"),
    [
        ({"enable_thinking"}, "none", {"enable_thinking": False}),
        ({"enable_thinking"}, "high", {"enable_thinking": True}),
        ({"thinking"}, "minimal", {"thinking": False}),
        ({"reasoning_effort"}, "low", {"reasoning_effort": "low"}),
        ({"reasoning_effort", "enable_thinking"}, "none", {"reasoning_effort": "none", "enable_thinking": False}),
        (set(), "none", None),
    ],
)
def test_reasoning_effort_becomes_what_the_template_reads(
    variables: set[str], effort: str, options: dict[str, Any] | None
) -> None:
    info = ModelInfo("CPU", 100, template_knows_tools=False, template_variables=frozenset(variables))
    assert prompt(ASKS, info=info, reasoning_effort=effort).template_options == options


def test_reasoning_effort_without_a_variable_for_it_is_refused_by_name() -> None:
    thinks = ModelInfo("CPU", 100, template_knows_tools=False, reasoning=("<think>", "</think>"))
    for info, effort in ((KNOWS, "low"), (thinks, "none")):
        with pytest.raises(APIError) as caught:
            prompt(ASKS, info=info, reasoning_effort=effort)
        assert caught.value.param == "reasoning_effort"
    switched = ModelInfo("CPU", 100, template_knows_tools=False, template_variables=frozenset({"enable_thinking"}))
    own = prompt(ASKS, info=switched, reasoning_effort="high", chat_template_kwargs={"enable_thinking": False})
    assert own.template_options == {"enable_thinking": False}
