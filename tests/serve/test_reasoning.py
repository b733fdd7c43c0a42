"""A model that thinks before it answers: thoughts have their own field, whole and streamed, with tools and schemas."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import jsonschema_rs
import pytest
from support import serving, templates, tiny
from support.exact import EXACT_OPTIONS

from ov_afm import export

# The model is exported for this file.
pytestmark = pytest.mark.slow

OPENED = "{%- if add_generation_prompt and opened %}{{- '<think>\\n' }}{%- endif %}"
SCHEMA = {"type": "object", "properties": {"sky": {"enum": ["blue", "grey"]}}, "required": ["sky"]}
FORM = {"type": "json_schema", "json_schema": {"name": "sky", "schema": {**SCHEMA, "additionalProperties": False}}}
# The prompt may begin the thoughts itself, as DeepSeek-R1's does.
WAYS: dict[str, dict[str, Any]] = {"begun by the model": {}, "begun by the prompt": {"opened": True}}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[serving.Server]:
    """A model that answers `<think>W</think>X`."""
    checkpoint = tmp_path_factory.mktemp("thinker") / "checkpoint"
    tiny.write_thinker(checkpoint, templates.QWEN + OPENED)
    model = export(str(checkpoint), tmp_path_factory.mktemp("models") / "thinker", recipe="fp32").path
    with serving.server("--model", f"thinker={model}", "--cache-size-gb", "0.05", *EXACT_OPTIONS) as running:
        yield running


@pytest.fixture(params=WAYS.values(), ids=WAYS)
def way(request: pytest.FixtureRequest) -> dict[str, Any]:
    return {"chat_template_kwargs": request.param}


def joined(server: serving.Server, **body: Any) -> dict[str, str]:
    """The texts of a stream's deltas by field."""
    messages = [{"role": "user", "content": "Hello"}]
    answer = server.post("/v1/chat/completions", messages=messages, stream=True, temperature=0, **body)
    texts: dict[str, str] = {}
    for line in answer.text.splitlines():
        if line.startswith("data: {"):
            for name, value in json.loads(line[6:])["choices"][0]["delta"].items():
                if isinstance(value, str) and value:
                    texts[name] = texts.get(name, "") + value
    return texts


def test_thoughts_have_their_own_field_whole_and_streamed(server: serving.Server, way: dict[str, Any]) -> None:
    answer = server.chat(max_tokens=20, **way).json()
    choice = answer["choices"][0]
    assert choice["message"]["reasoning_content"] == "W"
    assert (choice["message"]["content"], choice["finish_reason"]) == ("X", "stop")
    assert answer["usage"]["completion_tokens_details"] == {"reasoning_tokens": 3}
    assert joined(server, max_tokens=20, **way) == {"role": "assistant", "reasoning_content": "W", "content": "X"}


def test_an_answer_cut_off_within_thoughts_has_no_text(server: serving.Server, way: dict[str, Any]) -> None:
    choice = server.chat(max_tokens=2, **way).json()["choices"][0]
    assert choice["message"]["reasoning_content"] == "W"
    assert (choice["message"]["content"], choice["finish_reason"]) == ("", "length")


def test_a_schema_counts_for_what_follows_the_thoughts(server: serving.Server, way: dict[str, Any]) -> None:
    message = server.chat(response_format=FORM, max_tokens=200, **way).json()["choices"][0]["message"]
    assert message["reasoning_content"] == "W"
    jsonschema_rs.validate(FORM["json_schema"]["schema"], json.loads(message["content"]))  # type: ignore[index]


@pytest.mark.parametrize("choice", ["auto", "required"])
def test_tools_are_called_after_the_thoughts(server: serving.Server, way: dict[str, Any], choice: str) -> None:
    asked = {"tools": [serving.TOOL], "tool_choice": choice, "max_tokens": 300, **way}
    answer = server.chat(**asked).json()["choices"][0]
    assert answer["message"]["reasoning_content"] == "W"
    if choice == "required":
        assert answer["finish_reason"] == "tool_calls"
        call = answer["message"]["tool_calls"][0]["function"]
        jsonschema_rs.validate(serving.TOOL["function"]["parameters"], json.loads(call["arguments"]))
    else:
        # Nothing forces this model to call.
        assert (answer["message"]["content"], answer["finish_reason"]) == ("X", "stop")


def test_tools_or_a_schema_after_the_thoughts(server: serving.Server, way: dict[str, Any]) -> None:
    asked = {"tools": [serving.TOOL], "response_format": FORM, "max_tokens": 300, **way}
    message = server.chat(**asked).json()["choices"][0]["message"]
    assert message["reasoning_content"] == "W"
    if not message.get("tool_calls"):
        jsonschema_rs.validate(SCHEMA, json.loads(message["content"]))


def test_thoughts_of_earlier_answers_are_the_templates_business(server: serving.Server) -> None:
    """Qwen's leaves those before the last question out, from either place, and writes the last ones."""

    def count(content: str, *more: dict[str, Any], **fields: Any) -> int:
        question = {"role": "user", "content": "1 + 1?"}
        messages = [question, {"role": "assistant", "content": content, **fields}, *more]
        return int(server.post("/tokenize", messages=messages).json()["count"])

    again = {"role": "user", "content": "And 2 + 2?"}
    plain = count("Two.", again)
    assert count("<think>\nOne and one.\n</think>\n\nTwo.", again) == plain
    assert count("Two.", again, reasoning_content="One and one.") == plain
    assert count("Two.", reasoning_content="One and one.") == count("<think>\nOne and one.\n</think>\n\nTwo.")
    assert count("Two.", reasoning_content="One and one.") > count("Two.")


def test_reasoning_effort_switches_thinking(server: serving.Server) -> None:
    question = [{"role": "user", "content": "Hello"}]

    def tokens(**fields: Any) -> list[int]:
        return list(server.post("/tokenize", messages=question, **fields).json()["tokens"])

    off = tokens(reasoning_effort="none")
    assert off == tokens(chat_template_kwargs={"enable_thinking": False}) != tokens()
    assert tokens(reasoning_effort="high") == tokens()
    asked = server.chat(reasoning_effort="none", max_tokens=1).json()["usage"]["prompt_tokens"]
    assert asked == len(off)


def test_a_continued_answer_may_end_within_thoughts(server: serving.Server) -> None:
    for content, thoughts in (("<think>\nLet me", True), ("<think>\nOne.\n</think>\n\nSo", False)):
        messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": content}]
        body = {"messages": messages, "continue_final_message": True, "max_tokens": 4, "temperature": 1, "seed": 1}
        message = server.post("/v1/chat/completions", **body).json()["choices"][0]["message"]
        assert bool(message.get("reasoning_content")) == thoughts


def test_text_completions_keep_thoughts_in_the_text(server: serving.Server) -> None:
    prompt = "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    answer = server.post("/v1/completions", prompt=prompt, max_tokens=10, temperature=0).json()
    assert answer["choices"][0]["text"] == "<think>W</think>X"
    assert answer["usage"].get("completion_tokens_details") is None
