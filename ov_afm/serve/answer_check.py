"""The last check before an answer is said to be complete: what it was to look like, it does look like.

The grammar that guides the engine is made of code of ours and XGrammar's. Should one of them be wrong, the client
gets an error that says so, not text that it would take for what it asked for.
"""

from __future__ import annotations

import collections
import json
from typing import Any

from .errors import APIError
from .json_validation import mistake
from .messages import FunctionCalls, JSONSchema, OutputFormat

__all__ = ["AnswerCheck"]


class AnswerCheck:
    """Collects answers to a request and checks each at its end.

    Args:
        output_format: What they must look like.
    """

    def __init__(self, output_format: OutputFormat | None) -> None:
        calls = output_format if isinstance(output_format, FunctionCalls) else None
        answer = calls.answer if calls else output_format
        self._schema = answer.schema if isinstance(answer, JSONSchema) else None
        self._parameters = {each.name: json.dumps(each.parameters) for each in calls.functions} if calls else {}
        self._content: collections.defaultdict[int, list[str]] = collections.defaultdict(list)
        self._calls: collections.defaultdict[int, list[dict[str, Any]]] = collections.defaultdict(list)

    def take(self, index: int, deltas: list[dict[str, Any]], end: str | None, *, cut: bool) -> None:
        """Add to an answer.

        Args:
            index: Which of several answers.
            deltas: What was added.
            end: OpenAI's `finish_reason`; None if the answer goes on.
            cut: A stop string of the client has ended it.

        Raises:
            APIError: The answer is complete and not what it must be.
        """
        if self._schema is None and not self._parameters:
            return
        for delta in deltas:
            self._content[index].append(delta.get("content") or "")
            for call in delta.get("tool_calls", []):
                function = call["function"]
                if "name" in function:
                    self._calls[index].append({"name": function["name"], "arguments": ""})
                self._calls[index][-1]["arguments"] += function.get("arguments") or ""
        if end is None or end == "length" or cut:
            return
        for call in self._calls[index]:
            if call["name"] in self._parameters:
                self._check(call["arguments"], self._parameters[call["name"]], f"the arguments of {call['name']}")
        if self._schema is not None and not self._calls[index]:
            self._check("".join(self._content[index]), self._schema, "the answer")

    def _check(self, text: str, schema: str, name: str) -> None:
        if found := mistake(text, schema):
            message = f"{name} did not follow the schema and cannot be used: {found}"
            raise APIError(message, code="schema_violated", status=502)
