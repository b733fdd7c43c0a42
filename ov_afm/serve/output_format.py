"""What an answer must look like: which grammar a request asks for, and the limits of its schemas."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from .errors import APIError
from .messages import Function, FunctionCalls, JSONSchema, OutputFormat
from .protocol import ChatRequest, ResponseFormat
from .tools import offer

__all__ = ["output_format"]

MAX_SCHEMA_CHARACTERS = 64 * 1024
# A grammar grows with repetitions, and while it is compiled nobody else is served.
MAX_REPETITIONS = 2048
REPETITIONS = ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties")


def output_format(request: ChatRequest) -> OutputFormat | None:
    """What the answer must look like; None for free text.

    Raises:
        APIError: The request contradicts itself or its schema is too large.
    """
    offered = offer(request)
    response_format = request.response_format
    answer = None
    if response_format is not None and response_format.type != "text":
        answer = _json_schema(response_format)
    if not offered.tools:
        return answer
    functions = []
    for tool in offered.callable:
        schema = tool.function.parameters or {}
        _check_schema(schema, "tools")
        # Arguments are an object, whatever else the schema leaves open.
        functions.append(Function(tool.function.name, {"type": "object", **schema}))
    return FunctionCalls(functions, offered.required, offered.once, answer)


def _json_schema(response_format: ResponseFormat) -> JSONSchema:
    if response_format.type == "json_object":
        return JSONSchema('{"type": "object"}')
    if response_format.json_schema is None or response_format.json_schema.schema_ is None:
        raise APIError("response_format of type json_schema needs json_schema.schema", "response_format")
    _check_schema(response_format.json_schema.schema_, "response_format")
    return JSONSchema(json.dumps(response_format.json_schema.schema_))


def _check_schema(schema: Mapping[str, Any], param: str) -> None:
    size = len(json.dumps(schema))
    if size > MAX_SCHEMA_CHARACTERS:
        raise APIError(f"the schema has {size} characters, {MAX_SCHEMA_CHARACTERS} are allowed", param)
    waiting: list[Any] = [schema]
    while waiting:
        node = waiting.pop()
        if isinstance(node, list):
            waiting += node
        elif isinstance(node, dict):
            waiting += node.values()
            for key in REPETITIONS:
                count = node.get(key)
                if isinstance(count, (int, float)) and count > MAX_REPETITIONS:
                    raise APIError(f"{key} is {count}, at most {MAX_REPETITIONS} is allowed", param)
