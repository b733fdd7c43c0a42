"""Ollama's API, proved with Ollama's own clients."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema_rs
import ollama
import pytest
from support import environments, serving
from support.exact import EXACT_OPTIONS

from ov_afm.errors import EngineLost
from ov_afm.serve.answers import Answer, Running
from ov_afm.serve.engine import Stream
from ov_afm.serve.errors import APIError
from ov_afm.serve.messages import ModelInfo, Piece
from ov_afm.serve.prometheus import Metrics
from ov_afm.serve.wire.ollama import Call
from ov_afm.serve.wire.ollama_requests import OllamaChat, chat_request

HELLO = [{"role": "user", "content": "Hello"}]
GREEDY: dict[str, Any] = {"temperature": 0, "num_predict": 12}
THINKS = ModelInfo("CPU", 100, True, template_variables=frozenset({"enable_thinking"}), reasoning=("<t>", "</t>"))


@pytest.fixture(scope="module")
def server(tiny_model: Path, caller_model: Path) -> Iterator[serving.Server]:
    models = ("--model", f"tiny={tiny_model}", "--model", f"caller={caller_model}")
    with serving.server(*models, "--cache-size-gb", "0.05", *EXACT_OPTIONS) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: serving.Server) -> ollama.Client:
    return ollama.Client(host=server.url)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny", "tiny:latest"])
def test_official_client_streams_what_it_answers_whole(client: ollama.Client, name: str) -> None:
    whole = client.chat(model=name, messages=HELLO, options=GREEDY)
    parts = list(client.chat(model=name, messages=HELLO, options=GREEDY, stream=True))
    assert "".join(part.message.content or "" for part in parts) == whole.message.content
    assert [part.done for part in parts] == [False] * (len(parts) - 1) + [True]
    for last in (whole, parts[-1]):
        assert (last.model, last.done_reason, last.eval_count) == (name, "length", 12)
        assert last.prompt_eval_count == whole.prompt_eval_count
        assert last.total_duration >= last.load_duration + last.prompt_eval_duration + last.eval_duration > 0  # type: ignore[operator]


@pytest.mark.slow
def test_a_prompt_is_a_chat_of_one_question_and_a_raw_one_is_continued(
    client: ollama.Client, server: serving.Server
) -> None:
    chat = client.chat(model="tiny", messages=[{"role": "system", "content": "Be brief."}, *HELLO], options=GREEDY)
    asked: dict[str, Any] = {"model": "tiny", "prompt": "Hello", "options": GREEDY}
    assert client.generate(**asked, system="Be brief.").response == chat.message.content
    parts = client.generate(**asked, system="Be brief.", stream=True)
    assert "".join(part.response or "" for part in parts) == chat.message.content
    raw = server.post("/v1/completions", model="tiny", prompt="Hello", temperature=0, max_tokens=12).json()
    assert client.generate(**asked, raw=True).response == raw["choices"][0]["text"]


@pytest.mark.slow
def test_tools_are_called_and_their_results_are_read(client: ollama.Client) -> None:
    question: list[Any] = [{"role": "user", "content": "Weather in Paris?"}]
    asked: dict[str, Any] = {"model": "caller", "tools": [serving.TOOL], "options": {"num_predict": 2000}}
    whole = client.chat(**asked, messages=question)
    streamed = list(client.chat(**asked, messages=question, stream=True))
    calls = [call for part in streamed for call in part.message.tool_calls or []]
    for call in (*(whole.message.tool_calls or []), *calls):
        assert call.function.name == "get_weather"
        jsonschema_rs.validate(serving.TOOL["function"]["parameters"], dict(call.function.arguments))
    assert whole.message.tool_calls
    assert calls
    question += [whole.message, {"role": "tool", "content": "sunny", "tool_name": "get_weather"}]
    after = client.chat(model="caller", messages=question, options={"num_predict": 4})
    assert after.prompt_eval_count > 40  # type: ignore[operator]


@pytest.mark.slow
@pytest.mark.parametrize("form", ["json", {"type": "object", "properties": {}, "additionalProperties": False}], ids=str)
def test_the_answer_has_the_form_that_is_asked_for(client: ollama.Client, form: Any) -> None:
    answer = client.chat(model="tiny", messages=HELLO, format=form, options={"num_predict": 1000, "seed": 1})
    if answer.done_reason == "stop":
        assert isinstance(json.loads(answer.message.content or ""), dict)
    else:
        assert (answer.message.content or "").lstrip().startswith("{")


@pytest.mark.slow
def test_models_are_described_as_clients_look_for_them(client: ollama.Client, server: serving.Server) -> None:
    listed = client.list().models
    assert [model.model for model in listed] == ["tiny:latest", "caller:latest"]
    assert listed[0].details is not None
    assert (listed[0].details.family, listed[0].details.quantization_level) == ("arcee", "INT8")
    shown = client.show("tiny:latest")
    assert shown.capabilities == ["completion", "tools"]
    assert shown.modelinfo is not None
    assert shown.modelinfo[f"{shown.modelinfo['general.architecture']}.context_length"] == 2560
    assert "<|im_start|>" in (shown.template or "")
    client.chat(model="tiny", messages=HELLO, options=GREEDY)
    running = {model.model: model.context_length for model in client.ps().models}
    assert running["tiny:latest"] == 2560
    assert tuple(map(int, server.http.get("/api/version").json()["version"].split("."))) >= (0, 6, 4)
    assert server.http.get("/").status_code == server.http.head("/").status_code == 200


@pytest.mark.slow
def test_a_request_without_words_only_loads_the_model(client: ollama.Client) -> None:
    assert client.chat(model="tiny", messages=[]).done_reason == "load"
    assert client.generate(model="tiny", prompt="", keep_alive=0).done_reason == "unload"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "status", "name"),
    [
        ({"model": "none"}, 404, "'none'"),
        ({"model": "tiny:other"}, 404, "'tiny:other'"),
        ({"messages": [{**HELLO[0], "images": ["aGk="]}]}, 400, "images"),
        ({"options": {"mirostat": 2}}, 400, "options.mirostat"),
        ({"options": {"num_predict": 0}}, 400, "options.num_predict"),
        ({"options": {"temperature": "hot"}}, 400, "options.temperature"),
        ({"options": {"repeat_last_n": 64, "repeat_penalty": 1.2}}, 400, "options.repeat_last_n"),
        ({"options": {"unheard_of": 1}}, 400, "unheard_of"),
        ({"think": True}, 400, "thinking"),
        ({"keep_alive": "long"}, 400, "keep_alive"),
        ({"unheard_of": 1}, 400, "unheard_of"),
        ({"format": "xml"}, 400, "format"),
    ],
    ids=str,
)
def test_what_cannot_be_done_is_refused_by_name(server: serving.Server, changes: Any, status: int, name: str) -> None:
    answer = server.post("/api/chat", **{"model": "tiny", "messages": HELLO, "options": {"num_predict": 2}, **changes})
    assert answer.status_code == status
    assert list(answer.json()) == ["error"]
    assert name in answer.json()["error"]


@pytest.mark.slow
@pytest.mark.parametrize("field", ["suffix", "template", "context", "images"])
def test_what_a_prompt_cannot_have_is_refused_by_name(server: serving.Server, field: str) -> None:
    value: Any = [1] if field in ("context", "images") else "x"
    answer = server.post("/api/generate", model="tiny", prompt="Hello", **{field: value})
    assert answer.status_code == 400
    assert field in answer.json()["error"]


@pytest.mark.slow
@pytest.mark.network
def test_official_client_for_node(server: serving.Server) -> None:
    folder = environments.node_packages("ollama", "ollama@0.6.4")
    script = Path(__file__).parents[1] / "support" / "ollama_calls.mjs"
    done = environments.call("node", script, folder, server.url, json.dumps([serving.TOOL]))
    assert done.returncode == 0, done.stderr[-2000:]
    answers = json.loads(done.stdout)
    content = answers["whole"]["message"]["content"]
    assert "".join(part["message"]["content"] for part in answers["parts"]) == content
    assert answers["generated"]["response"] == content
    (call,) = answers["called"]["message"]["tool_calls"][:1]
    jsonschema_rs.validate(serving.TOOL["function"]["parameters"], call["function"]["arguments"])
    assert answers["names"] == ["tiny:latest", "caller:latest"]
    assert answers["shown"]["capabilities"] == ["completion", "tools"]
    assert answers["problem"]["status"] == 404


# -- Without a server


def translated(messages: list[Any] = HELLO, info: ModelInfo | None = None, **fields: Any) -> dict[str, Any]:
    body = OllamaChat.model_validate({"model": "m", "messages": messages, **fields})
    return chat_request(body, info).model_dump(exclude_none=True)


def test_options_that_say_how_a_model_is_loaded_change_nothing() -> None:
    loading = {"num_ctx": 8192, "num_gpu": 99, "num_thread": 4, "use_mmap": True, "num_keep": 4, "mirostat": 0}
    assert translated(options=loading, keep_alive="-1s") == translated()


def test_options_get_their_names_in_openai_s_api() -> None:
    options = {"num_predict": -1, "seed": 42.0, "top_k": 40.0, "repeat_penalty": 1.1, "stop": ["x"], "min_p": 0.1}
    asked = translated(options=options, stream=False)
    assert asked["max_tokens"] > 10**9
    expected = {"seed": 42, "top_k": 40, "repetition_penalty": 1.1, "stop": ["x"], "min_p": 0.1, "stream": False}
    assert {name: asked[name] for name in expected} == expected
    assert translated(options={"repeat_last_n": 0, "repeat_penalty": 1.3})["repetition_penalty"] == 1.0


def test_results_are_matched_with_calls_that_have_no_ids() -> None:
    calls = [{"function": {"name": name, "arguments": {"x": 1}}} for name in ("a", "b", "a")]
    results = [{"role": "tool", "content": text, "tool_name": name} for text, name in (("2", "b"), ("1", "a"))]
    messages = translated([*HELLO, {"role": "assistant", "tool_calls": calls}, *results, {"role": "tool"}])["messages"]
    ids = [call["id"] for call in messages[1]["tool_calls"]]
    assert len(set(ids)) == 3
    assert [message["tool_call_id"] for message in messages[2:]] == [ids[1], ids[0], ids[2]]
    assert messages[1]["tool_calls"][0]["function"]["arguments"] == '{"x": 1}'


@pytest.mark.parametrize(("think", "effort"), [(True, "medium"), (False, "none"), ("high", "high"), (None, None)])
def test_thinking_is_asked_of_a_model_that_thinks(think: Any, effort: str | None) -> None:
    assert translated(info=THINKS, think=think).get("reasoning_effort") == effort
    assert "reasoning_effort" not in translated(info=ModelInfo("CPU", 100, True), think=False)


def test_an_answer_that_has_begun_is_continued() -> None:
    assert translated([*HELLO, {"role": "assistant", "content": "Hi"}])["continue_final_message"]
    assert "continue_final_message" not in translated([*HELLO, {"role": "assistant", "content": ""}])
    with pytest.raises(APIError):
        translated(options={"top_k": []})


def objects_of(*pieces: Any) -> list[dict[str, Any]]:
    """The lines of an answer that thinks in `<t>` and may call `f`."""

    async def collect() -> list[bytes]:
        stream, lease = Stream([7]), contextlib.AsyncExitStack()
        running = Running(Answer("m", True, Metrics(), functions=["f"], reasoning=("<t>", "</t>")), stream, lease)
        for piece in pieces:
            stream.put(piece)
        body = OllamaChat.model_validate({"model": "m", "messages": HELLO})
        return [line async for line in Call(body, is_chat=True).lines(running)]

    return [json.loads(line) for line in asyncio.run(collect())]


def test_thoughts_and_calls_have_fields_of_their_own() -> None:
    call = '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'
    *parts, last = objects_of(Piece(7, "<t>Hm.</t>So:", 2), Piece(7, call[:40], 1), Piece(7, call[40:], 1, end="stop"))
    assert "".join(part["message"].get("thinking", "") for part in parts) == "Hm."
    assert "".join(part["message"]["content"] for part in parts) == "So:"
    (function,) = [each["function"] for part in parts for each in part["message"].get("tool_calls", [])]
    assert function == {"index": 0, "name": "f", "arguments": {"x": 1}}
    assert (last["done"], last["done_reason"], last["eval_count"]) == (True, "stop", 4)


def test_a_call_that_the_limit_cuts_off_is_left_out() -> None:
    *parts, last = objects_of(Piece(7, '<tool_call>\n{"name": "f", "arguments": {"x', 9, end="length"))
    assert not [part for part in parts if "tool_calls" in part["message"]]
    assert last["done_reason"] == "length"


def test_an_engine_that_dies_is_a_line_with_the_error() -> None:
    assert objects_of(Piece(7, "Hel", 1), EngineLost("the engine ended"))[-1] == {"error": "the engine ended"}
