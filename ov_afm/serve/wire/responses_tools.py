"""The tools of a Responses request as functions, and their calls as its items.

Functions of a namespace are called `NAMESPACE.NAME` before the model, and a custom tool, whose input is free text, is a
function with one string. The way back splits names and unpacks the text.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictStr, ValidationError

from ..errors import APIError, first_mistake

__all__ = ["CUSTOM_INPUT", "ToolTable", "custom_input", "function_name"]

CUSTOM_INPUT = "input"
CUSTOM_PARAMETERS = {
    "type": "object",
    "properties": {CUSTOM_INPUT: {"type": "string"}},
    "required": [CUSTOM_INPUT],
    "additionalProperties": False,
}
# Tools that OpenAI's servers run, and what to do instead where there is something.
HINTS = {"web_search": ' (Codex: web_search = "disabled")', "local_shell": ", or offer a function that runs commands"}


class Tool(BaseModel):
    """A tool; unknown fields are refused by name."""

    model_config = ConfigDict(extra="forbid")

    name: Annotated[StrictStr, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    description: StrictStr | None = None
    # Programs and searches for tools are OpenAI's; `false` and `direct` ask for nothing.
    defer_loading: Literal[False] | None = None
    allowed_callers: list[Literal["direct"]] | None = None
    async_: Annotated[Literal[False] | None, Field(alias="async")] = None


class FunctionTool(Tool):
    """A function; `parameters` is a JSON schema, which is always enforced."""

    type: Literal["function"]
    parameters: dict[str, Any] | None = None
    strict: StrictBool | None = None
    output_schema: dict[str, Any] | None = None


class CustomFormat(BaseModel):
    """What the input of a custom tool looks like; there are no grammars for it."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["text"]


class CustomTool(Tool):
    """A tool whose input is text."""

    type: Literal["custom"]
    format: CustomFormat | None = None


class Namespace(BaseModel):
    """Functions with a common name."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["namespace"]
    name: Annotated[StrictStr, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    description: StrictStr | None = None
    tools: list[dict[str, Any]]


KINDS: dict[Any, type[BaseModel]] = {"function": FunctionTool, "custom": CustomTool, "namespace": Namespace}


def function_name(name: str, namespace: str | None = None) -> str:
    """What the model calls a function of a namespace."""
    return f"{namespace}.{name}" if namespace else name


class ToolTable:
    """The tools of one request.

    Args:
        tools: The tools as the client sent them.

    Attributes:
        functions: The same as functions in chat's form.

    Raises:
        APIError: A tool is not available, or there are two with one name.
    """

    def __init__(self, tools: list[dict[str, Any]]) -> None:
        self.functions: list[dict[str, Any]] = []
        self._names: dict[str, tuple[str, str | None]] = {}
        self._custom: set[str] = set()
        for index, tool in enumerate(tools):
            self._add(tool, f"tools.{index}", None)

    def _add(self, raw: dict[str, Any], place: str, namespace: str | None) -> None:
        tool = _checked(raw, place)
        if isinstance(tool, Namespace):
            if namespace is not None:
                raise APIError(f"{place}: a namespace within a namespace is not available", place)
            for index, each in enumerate(tool.tools):
                self._add(each, f"{place}.tools.{index}", tool.name)
            return
        assert isinstance(tool, (FunctionTool, CustomTool))
        name = function_name(tool.name, namespace)
        if name in self._names:
            raise APIError(f"{place}.name: there are two tools of the name {name!r}", f"{place}.name")
        self._names[name] = tool.name, namespace
        if isinstance(tool, CustomTool):
            self._custom.add(name)
        parameters = tool.parameters if isinstance(tool, FunctionTool) else CUSTOM_PARAMETERS
        function = {"name": name, "description": tool.description, "parameters": parameters}
        function = {key: value for key, value in function.items() if value is not None}
        self.functions.append({"type": "function", "function": function})

    def choice(self, choice: str | dict[str, Any] | None) -> str | dict[str, Any] | None:
        """A `tool_choice` in chat's form.

        Raises:
            APIError: It names a tool that is not available.
        """
        if not isinstance(choice, dict):
            return choice
        kind, place = choice.get("type"), "tool_choice"
        if kind in ("function", "custom"):
            return {"type": "function", "function": {"name": self._named(choice, place)}}
        if kind == "allowed_tools":
            allowed = choice.get("tools")
            if not isinstance(allowed, list) or not all(isinstance(each, dict) for each in allowed):
                raise APIError("tool_choice.tools: allowed_tools needs a list of tools", "tool_choice.tools")
            names = [self._named(each, f"tool_choice.tools.{index}") for index, each in enumerate(allowed)]
            tools = [{"type": "function", "function": {"name": name}} for name in names]
            return {"type": "allowed_tools", "allowed_tools": {"mode": choice.get("mode", "auto"), "tools": tools}}
        raise APIError(f"tool_choice: a tool of type {kind!r} is not available", place, "unsupported_value")

    def _named(self, choice: dict[str, Any], place: str) -> str:
        name, namespace = choice.get("name"), choice.get("namespace")
        full = function_name(str(name), namespace if isinstance(namespace, str) else None)
        if full not in self._names:
            raise APIError(f"{place} names {full!r}, which is not among the tools", place)
        return full

    def call_item(self, function: str, call_id: str) -> dict[str, Any]:
        """The item of a call that has just begun, without id and status."""
        name, namespace = self._names.get(function, (function, None))
        item: dict[str, Any] = {"call_id": call_id, "name": name}
        if namespace is not None:
            item["namespace"] = namespace
        if function in self._custom:
            return {"type": "custom_tool_call", **item, "input": ""}
        return {"type": "function_call", **item, "arguments": ""}


def _checked(raw: dict[str, Any], place: str) -> BaseModel:
    kind = raw.get("type")
    if kind not in KINDS:
        hint = HINTS.get(str(kind), "")
        message = f"{place}: a tool of type {str(kind)[:60]!r} is not available here; leave it out{hint}"
        raise APIError(message, place, "unsupported_value")
    try:
        return KINDS[kind].model_validate(raw)
    except ValidationError as error:
        raise first_mistake(error.errors(), place) from None


def custom_input(arguments: str) -> str:
    """The text within the arguments of a custom tool's call, which may have been cut off."""
    for end in ("", '"}', '\\"}'):
        try:
            return str(json.loads(arguments + end)[CUSTOM_INPUT])
        except (ValueError, TypeError, KeyError):
            continue
    return ""
