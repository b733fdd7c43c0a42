"""Grammars that an answer must follow, in GenAI's words."""

from __future__ import annotations

import json
from typing import Any

from .json_grammar import json_grammar
from .messages import FunctionCalls, Grammar, JSONSchema, OutputFormat

__all__ = ["CALL_END", "call_begin", "structured_output"]

CALL_END = "}\n</tool_call>"


def call_begin(name: str) -> str:
    """What a call of a function begins with, up to its arguments."""
    return f'<tool_call>\n{{"name": {json.dumps(name)}, "arguments": '


def structured_output(output_format: OutputFormat) -> Any:
    """GenAI's configuration for what an answer must look like.

    Raises:
        SchemaError: A schema cannot be enforced.
    """
    import openvino_genai

    kind = openvino_genai.StructuredOutputConfig
    if isinstance(output_format, Grammar):
        return kind(grammar=output_format.text)
    if isinstance(output_format, JSONSchema):
        return kind(grammar=json_grammar(output_format.schema))
    assert isinstance(output_format, FunctionCalls)
    tags = [
        kind.Tag(call_begin(function.name), kind.EBNF(json_grammar(json.dumps(function.parameters))), CALL_END)
        for function in output_format.functions
    ]
    if output_format.required:
        return kind(structural_tags_config=tags[0] if len(tags) == 1 else kind.Union(tags))
    if output_format.answer is not None:
        return kind(structural_tags_config=kind.Union([*tags, kind.EBNF(json_grammar(output_format.answer.schema))]))
    return kind(structural_tags_config=kind.TriggeredTags(["<tool_call>"], tags, False, output_format.once))
