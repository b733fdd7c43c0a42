"""What an answer must look like: which grammar a request asks for, by any of the names that clients have for it.

A schema is translated here already, although the engine's process does it again, so that what cannot be enforced is
refused with the place in the request.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ..errors import ConfigError
from .ebnf import Alt, Rules, literal
from .errors import APIError
from .json_grammar import json_grammar
from .messages import Function, FunctionCalls, Grammar, JSONSchema, OutputFormat
from .patterns import Pattern
from .protocol import ChatRequest, ResponseFormat, StructuredOutputs
from .schemas import SchemaError
from .tools import offer

__all__ = ["output_format"]

MAX_SCHEMA_CHARACTERS = 64 * 1024
MAX_CHOICES = 1000
UNENFORCEABLE = "schema_unsupported"
ANY_OBJECT = {"type": "object"}


def output_format(request: ChatRequest) -> OutputFormat | None:
    """What the answer must look like; None for free text.

    Raises:
        APIError: The request contradicts itself, or asks for what cannot be enforced.
    """
    offered = offer(request)
    answer, name = _answer(request)
    if answer is not None and request.min_tokens:
        raise APIError(f"min_tokens and {name} exclude each other; choose one", "min_tokens")
    if not offered.tools:
        return answer
    if isinstance(answer, Grammar):
        raise APIError(f"{name} and tools exclude each other; choose one", name)
    if request.min_tokens:
        raise APIError("min_tokens and tools exclude each other; choose one", "min_tokens")
    every = [each.function.name for each in offered.tools]
    functions = []
    for tool in offered.callable:
        # Arguments are an object, whatever else the schema leaves open.
        schema = {**ANY_OBJECT, **(tool.function.parameters or {})}
        field = "functions.{}.parameters" if offered.legacy else "tools.{}.function.parameters"
        _check(schema, field.format(every.index(tool.function.name)))
        functions.append(Function(tool.function.name, schema))
    return FunctionCalls(functions, offered.required, offered.once, answer)


def _answer(request: ChatRequest) -> tuple[JSONSchema | Grammar | None, str]:
    """What an answer without calls must look like, and the field that says so."""
    given: dict[str, Any] = {}
    if request.response_format is not None and request.response_format.type != "text":
        given["response_format"] = request.response_format
    for name in ("structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar"):
        if getattr(request, name) is not None:
            given[name] = getattr(request, name)
    if len(given) > 1:
        raise APIError(f"{' and '.join(given)} exclude each other; choose one", list(given)[1])
    for name, value in given.items():
        if isinstance(value, ResponseFormat):
            return _response_format(value), name
        if not isinstance(value, StructuredOutputs):
            return _constraint(name.removeprefix("guided_"), value, name), name
        kinds = value.model_dump(exclude_none=True, by_alias=True)
        if len(kinds) != 1:
            message = f"structured_outputs takes one of json, regex, choice, grammar, json_object; found {len(kinds)}"
            raise APIError(message, name)
        ((kind, inner),) = kinds.items()
        return _constraint(kind, inner, f"{name}.{kind}"), name
    return None, ""


def _response_format(form: ResponseFormat) -> JSONSchema:
    if form.schema_ is not None and form.json_schema is not None:
        raise APIError("response_format has two schemas; leave one of the two out", "response_format")
    if form.schema_ is not None:
        return _check(form.schema_, "response_format.schema")
    if form.json_schema is not None and form.json_schema.schema_ is not None:
        return _check(form.json_schema.schema_, "response_format.json_schema.schema")
    if form.type == "json_object":
        return _check(ANY_OBJECT, "response_format")
    raise APIError("response_format of type json_schema needs json_schema.schema", "response_format")


def _constraint(kind: str, value: Any, place: str) -> JSONSchema | Grammar:
    """A constraint by vLLM's name for its kind."""
    if kind == "json_object":
        if value is not True:
            raise APIError(f"{place} is true or left out", place)
        return _check(ANY_OBJECT, place)
    if kind == "json":
        try:
            return _check(json.loads(value) if isinstance(value, str) else value, place)
        except ValueError as error:
            if isinstance(error, ConfigError):
                raise
            raise APIError(f"{place} is not JSON: {error}", place) from error
    text = value
    if kind in ("regex", "choice"):
        text = _of_regex(value, place) if kind == "regex" else _of_choice(value, place)
    if len(text) > MAX_SCHEMA_CHARACTERS:
        message = f"{place} has a grammar of {len(text)} characters, {MAX_SCHEMA_CHARACTERS} are allowed"
        raise APIError(message, place)
    return Grammar(text)


def _of_regex(value: str, place: str) -> str:
    rules = Rules(quoted=False)
    try:
        node = Pattern(value, whole=True).node(rules, "")
    except ConfigError as error:
        raise APIError(f"{place} cannot be enforced: {error}", place, UNENFORCEABLE) from error
    if not rules.productive(node):
        raise APIError(f"{place} matches no text", place, UNENFORCEABLE)
    return rules.render(node)


def _of_choice(value: list[str], place: str) -> str:
    if not value or len(value) > MAX_CHOICES or not all(value):
        raise APIError(f"{place} is a list of 1 to {MAX_CHOICES} texts that are not empty", place)
    return Rules().render(Alt([literal(each) for each in dict.fromkeys(value)]))


def _check(schema: Mapping[str, Any] | bool, place: str) -> JSONSchema:
    text = json.dumps(schema)
    if len(text) > MAX_SCHEMA_CHARACTERS:
        raise APIError(f"the schema has {len(text)} characters, {MAX_SCHEMA_CHARACTERS} are allowed", place)
    try:
        json_grammar(text)
    except SchemaError as error:
        where = f"{place}.{error.place}" if error.place else place
        raise APIError(f"the schema cannot be enforced: {where}: {error}", where, UNENFORCEABLE) from error
    except RecursionError as error:
        raise APIError(f"the schema cannot be enforced: {place} is nested too deeply", place, UNENFORCEABLE) from error
    return JSONSchema(text)
