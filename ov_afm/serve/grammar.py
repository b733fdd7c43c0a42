"""Grammars that an answer must follow, in GenAI's words."""

from __future__ import annotations

import json
from typing import Any

from .json_grammar import json_grammar
from .messages import AfterThoughts, FunctionCalls, Grammar, JSONSchema, OutputFormat

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
    if isinstance(output_format, AfterThoughts):
        return kind(structural_tags_config=_after_thoughts(output_format))
    if isinstance(output_format, FunctionCalls):
        return kind(structural_tags_config=_calls(output_format))
    return kind(grammar=_ebnf(output_format))


def _ebnf(output_format: Grammar | JSONSchema) -> str:
    return output_format.text if isinstance(output_format, Grammar) else json_grammar(output_format.schema)


def _calls(output_format: FunctionCalls) -> Any:
    import openvino_genai

    kind = openvino_genai.StructuredOutputConfig
    tags = [
        kind.Tag(call_begin(function.name), kind.EBNF(json_grammar(json.dumps(function.parameters))), CALL_END)
        for function in output_format.functions
    ]
    if output_format.required:
        return tags[0] if len(tags) == 1 else kind.Union(tags)
    if output_format.answer is not None:
        return kind.Union([*tags, kind.EBNF(json_grammar(output_format.answer.schema))])
    return kind.TriggeredTags(["<tool_call>"], tags, False, output_format.once)


def _after_thoughts(output_format: AfterThoughts) -> Any:
    """Any text up to the end of thoughts, then the format; at once where the prompt begins no thoughts."""
    import openvino_genai

    kind, inner = openvino_genai.StructuredOutputConfig, output_format.format
    answer = _calls(inner) if isinstance(inner, FunctionCalls) else kind.EBNF(_ebnf(inner))
    thoughts = kind.Tag("" if output_format.thinking else output_format.begin, kind.AnyText(), output_format.end)
    # Models are used to an empty line there.
    both = kind.Concat([thoughts, kind.Regex(r"\n{0,2}"), answer])
    return both if output_format.thinking else kind.Union([both, answer])
