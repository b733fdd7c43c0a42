"""Grammars behind a real server: one that takes for ever stops nobody, memory has a bound, and answers are valid."""

from __future__ import annotations

import concurrent.futures
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import jsonschema_rs
import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from support import serving
from support.exact import EXACT_OPTIONS

from ov_afm.errors import ConfigError
from ov_afm.serve.grammar import structured_output
from ov_afm.serve.grammar_compiler import Compiler
from ov_afm.serve.messages import Function, FunctionCalls, Grammar, JSONSchema

# It matches every text in so many ways that compiling it takes minutes.
ENDLESS = 'root ::= ([a-z]{1,200} "x"?){1,200}'


@pytest.fixture(scope="module")
def server(tiny_model: Path) -> Iterator[serving.Server]:
    arguments = ("--model", f"tiny={tiny_model}", "--cache-size-gb", "0.05", *EXACT_OPTIONS)
    with serving.server(*arguments) as running:
        yield running


@pytest.fixture(scope="module")
def compiler(tiny_model: Path) -> Compiler:
    import openvino_genai

    vocab = json.loads((tiny_model / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    return Compiler(openvino_genai.Tokenizer(str(tiny_model)), vocab)


def form(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}


@pytest.mark.slow
def test_a_grammar_that_takes_for_ever_stops_nobody(server: serving.Server) -> None:
    engine, began = server.engine().pid, time.monotonic()
    with concurrent.futures.ThreadPoolExecutor() as pool:
        endless = pool.submit(server.chat, guided_grammar=ENDLESS)
        longest = 0.0
        while not endless.done():
            sent = time.monotonic()
            assert server.chat().status_code == 200
            longest = max(longest, time.monotonic() - sent)
    answer = endless.result()
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["code"] == "grammar_too_slow"
    assert longest < (time.monotonic() - began) / 2
    again = time.monotonic()
    assert server.chat(guided_grammar=ENDLESS).json()["error"]["code"] == "grammar_too_slow"
    assert time.monotonic() - again < 2
    assert server.chat(response_format={"type": "json_object"}).status_code == 200
    assert server.engine().pid == engine


@pytest.mark.slow
def test_who_leaves_does_not_wait_for_a_grammar(server: serving.Server) -> None:
    messages = [{"role": "user", "content": "x"}]
    raw = server.connection("/v1/chat/completions", messages=messages, guided_grammar=ENDLESS + ' "y"')
    server.wait(lambda: server.metric("running_requests") == 1, 10, "the request has no slot")
    raw.close()
    server.wait(lambda: server.metric("running_requests") == 0, 5, "the request kept its slot")
    assert server.chat().status_code == 200


def test_the_process_that_checks_ends_with_the_engine(server: serving.Server) -> None:
    engine = server.engine()
    checkers = engine.children()
    assert checkers
    engine.kill()
    gone, alive = psutil.wait_procs(checkers, timeout=20)
    assert not alive
    server.wait(lambda: server.chat(guided_choice=["a"]).status_code == 200, 60, "no grammar after a restart")


@pytest.mark.parametrize(
    ("asked", "answers"),
    [
        ({"guided_choice": ["yes", "no"]}, ["yes", "no"]),
        ({"guided_regex": "[ab]c"}, ["ac", "bc"]),
        ({"guided_grammar": 'root ::= "x" [0-1]'}, ["x0", "x1"]),
        ({"guided_json": {"enum": ["x"]}}, ['"x"']),
        ({"structured_outputs": {"choice": ["yes"]}}, ["yes"]),
        ({"structured_outputs": {"json": '{"const": 1}'}}, ["1"]),
        ({"structured_outputs": {"regex": "a{3}"}}, ["aaa"]),
        ({"response_format": {"type": "json_object", "schema": {"const": None}}}, ["null"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_constraints_by_the_names_of_other_servers(server: serving.Server, asked: Any, answers: list[str]) -> None:
    choice = server.chat(max_tokens=40, **asked).json()["choices"][0]
    assert choice["message"]["content"] in answers
    assert choice["finish_reason"] == "stop"


def test_a_grammar_that_is_none_is_refused(server: serving.Server) -> None:
    answer = server.chat(guided_grammar="root = nonsense")
    assert answer.status_code == 400
    assert ".cc" not in answer.text
    assert server.chat().status_code == 200


def test_what_was_compiled_is_given_back(compiler: Compiler) -> None:
    process = psutil.Process()

    def grow(count: int, begin: int) -> int:
        before = process.memory_info().rss
        for index in range(begin, begin + count):
            properties = {f"k{index}_{number}": {"type": "string", "minLength": 1} for number in range(40)}
            schema = {"type": "object", "properties": properties}
            compiler.compile(structured_output(JSONSchema(json.dumps(schema))))
        return process.memory_info().rss - before

    grow(10, 0)
    kept = grow(20, 100)
    compiler.forget()
    # As many again find room in what was given back.
    assert grow(20, 200) < max(kept / 2, 2**20)


def test_each_way_to_calls_and_answers_compiles(compiler: Compiler) -> None:
    functions = [Function("f", {"type": "object", "required": ["city"]}), Function("g", {"type": "object"})]
    answer = JSONSchema('{"type": "object"}')
    for calls in (
        FunctionCalls(functions),
        FunctionCalls(functions, required=True),
        FunctionCalls(functions[:1], required=True, once=True),
        FunctionCalls(functions, answer=answer),
    ):
        compiler.try_out(structured_output(calls))
    with pytest.raises(ConfigError):
        compiler.compile(structured_output(Grammar("root ::= (")))


def sample(compiler: Compiler, schema: Any, seed: int) -> tuple[str, bool]:
    """Text that a model without weights writes by a schema, and whether it came to its end."""
    import openvino_genai

    config = openvino_genai.GenerationConfig()
    config.max_new_tokens, config.do_sample, config.rng_seed = 600, True, seed
    config.stop_token_ids = {compiler._tokenizer.get_eos_token_id()}
    config.structured_output_config = structured_output(JSONSchema(json.dumps(schema)))
    result = compiler._pipeline.generate(compiler._inputs, config)
    return compiler._tokenizer.decode(result.tokens[0]), result.finish_reasons[0].name == "STOP"


SIMPLE = st.one_of(
    st.sampled_from([{"type": "boolean"}, {"type": "null"}, {"enum": ["a", 1, None]}, {"const": "ü\n"}]),
    st.tuples(st.integers(-500, 500), st.integers(0, 900)).map(
        lambda pair: {"type": "integer", "minimum": pair[0], "maximum": pair[0] + pair[1]}
    ),
    st.tuples(st.integers(-50, 50), st.integers(1, 90)).map(
        lambda pair: {"type": "number", "exclusiveMinimum": pair[0] / 8, "maximum": (pair[0] + pair[1]) / 8}
    ),
    st.tuples(st.integers(0, 5), st.integers(0, 40)).map(
        lambda pair: {"type": "string", "minLength": pair[0], "maxLength": pair[0] + pair[1]}
    ),
    st.sampled_from(["^[a-c]{2,5}$", '"', r"^\d{3}-[\\/]$", "^(ab|c)+d?$"]).map(lambda pattern: {"pattern": pattern}),
    st.sampled_from(["date", "time", "uuid", "ipv4", "email", "duration"]).map(lambda name: {"format": name}),
)
NAMES = st.sampled_from(["a", "b", "key", 'q"', "ü"])


def _object(parts: tuple[dict[str, Any], set[str]]) -> dict[str, Any]:
    properties, required = parts
    return {"type": "object", "properties": properties, "required": sorted(required), "additionalProperties": False}


SCHEMAS = st.recursive(
    SIMPLE,
    lambda inner: st.one_of(
        st.tuples(st.dictionaries(NAMES, inner, min_size=1, max_size=4), st.just(set())).map(_object),
        st.dictionaries(NAMES, inner, min_size=1, max_size=3).map(lambda held: _object((held, set(held)))),
        st.tuples(inner, st.integers(0, 2)).map(
            lambda pair: {"type": "array", "items": pair[0], "minItems": pair[1], "maxItems": pair[1] + 2}
        ),
        st.lists(inner, min_size=1, max_size=3).map(lambda held: {"anyOf": held}),
    ),
    max_leaves=5,
)


@pytest.mark.slow
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(schema=SCHEMAS, seed=st.integers(0, 1000))
def test_what_is_generated_by_a_schema_is_valid(compiler: Compiler, schema: dict[str, Any], seed: int) -> None:
    """XGrammar's reading of our grammar, by a model that finds every token equally likely."""
    text, complete = sample(compiler, schema, seed)
    if complete:
        jsonschema_rs.Draft202012Validator(schema, validate_formats=True).validate(json.loads(text))


def test_checks_run_beside_each_other(server: serving.Server) -> None:
    answers: list[int] = []
    schemas = [{"type": "object", "properties": {f"n{index}": {"type": "integer"}}} for index in range(6)]
    threads = [
        threading.Thread(target=lambda each=each: answers.append(server.chat(response_format=form(each)).status_code))
        for each in schemas
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [200] * len(schemas)
