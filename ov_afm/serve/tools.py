"""Tools: which ones a request offers and which of them may be called, and calls read from an answer.

A model that calls a function writes `<tool_call>`, a JSON object and `</tool_call>`, a form that
Hermes introduced. A grammar enforces it (`serve.output_format`), so a call is recognized by its exact beginning.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..runtime.detokenize import overlap
from ..system.json_text import parse
from .errors import APIError
from .grammar import CALL_END, call_begin
from .protocol import AllowedToolsChoice, ChatRequest, NamedFunction, NamedTool, TokenizeRequest, Tool, ToolChoice

__all__ = ["CallReader", "Offer", "offer"]

BEGIN = "<tool_call>"


@dataclass(frozen=True, slots=True)
class Offer:
    """The tools of a request.

    Attributes:
        tools: All that the model is told of.
        callable: Those that it may call.
        required: It must call one.
        once: It may call only one.
        legacy: The request names them `functions`, and so does the answer.
    """

    tools: Sequence[Tool] = ()
    callable: Sequence[Tool] = ()
    required: bool = False
    once: bool = False
    legacy: bool = False


def offer(request: ChatRequest | TokenizeRequest) -> Offer:
    """What a request offers, in whichever of OpenAI's two forms it says so.

    Raises:
        APIError: The request contradicts itself.
    """
    # Some clients send empty lists of both.
    legacy = bool(request.functions) or request.function_call is not None
    if legacy and (request.tools or request.tool_choice is not None):
        raise APIError("give either tools and tool_choice, or functions and function_call", "functions")
    choice: ToolChoice | NamedFunction | None
    tools: Sequence[Tool]
    if legacy:
        tools = [Tool(type="function", function=function) for function in request.functions or []]
        choice, field = request.function_call, "function_call"
    else:
        tools = request.tools or []
        choice, field = request.tool_choice, "tool_choice"
    if choice == "none" or not tools:
        if choice not in (None, "none", "auto"):
            raise APIError(f"{field} needs {'functions' if legacy else 'tools'}", field)
        return Offer(legacy=legacy)
    names, required = None, choice == "required"
    if isinstance(choice, AllowedToolsChoice):
        names = [tool.function.name for tool in choice.allowed_tools.tools]
        required = choice.allowed_tools.mode == "required"
    elif isinstance(choice, (NamedTool, NamedFunction)):
        names = [choice.function.name if isinstance(choice, NamedTool) else choice.name]
        required = True
    once = legacy or (isinstance(request, ChatRequest) and request.parallel_tool_calls is False)
    return Offer(tools, _selected(tools, names, field), required, once, legacy)


def _selected(tools: Sequence[Tool], names: Sequence[str] | None, field: str) -> Sequence[Tool]:
    """The tools with these names; None stands for all."""
    if names is None:
        return tools
    for name in names:
        if all(tool.function.name != name for tool in tools):
            raise APIError(f"{field} names {name!r}, which is not among the tools", field)
    return [tool for tool in tools if tool.function.name in names]


class CallReader:
    """Separates tool calls from text in a stream of pieces; gives deltas as the wire has them.

    Args:
        names: Functions that may be called.

    Attributes:
        calls: Calls that have begun.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.calls = 0
        self._begins = {call_begin(name): name for name in names}
        self._held = self._space = ""
        self._within = self._in_text = False
        self._arguments: list[str] = []

    @property
    def complete(self) -> bool:
        """Whether there are calls, and all of them have ended."""
        return self.calls > 0 and not self._within

    def push(self, text: str) -> list[dict[str, Any]]:
        """Add text; returns the deltas that became certain."""
        self._held += text
        deltas: list[dict[str, Any]] = []
        while True:
            before = (self._held, self._within)
            deltas += self._take_arguments() if self._within else self._take_content()
            if before == (self._held, self._within):
                return deltas

    def finish(self, end: str) -> list[dict[str, Any]]:
        """The rest at the end of the answer, wherever that comes: no part of a tag is text or an argument.

        Args:
            end: Why the answer ends; at its `length`, it may end within a tag.
        """
        rest, self._held = self._held, ""
        if not self._within:
            # The grammar lets no answer stop by itself once `BEGIN` is there; less of it is text.
            text = rest if end == "stop" and not rest.startswith(BEGIN) else ""
            return self._content(text) or ([{"content": self._space}] if self._space and not self.calls else [])
        try:
            parse("".join(self._arguments))
        except ValueError:
            return [self._more(rest)] if rest else []
        # They are whole: the rest is the beginning of the end.
        return []

    def _take_content(self) -> list[dict[str, Any]]:
        """Text up to the beginning of a call, or what may become one."""
        place = self._held.find("<")
        while place >= 0:
            candidate = self._held[place:]
            if begin := next((begin for begin in self._begins if candidate.startswith(begin)), None):
                deltas = self._content(self._held[:place])
                self._held, self._within, self._arguments = candidate[len(begin) :], True, []
                self._space, self._in_text = "", False
                return [*deltas, self._call(self._begins[begin])]
            if any(begin.startswith(candidate) for begin in self._begins):
                break
            place = self._held.find("<", place + 1)
        end = len(self._held) if place < 0 else place
        text, self._held = self._held[:end], self._held[end:]
        return self._content(text)

    def _content(self, text: str) -> list[dict[str, Any]]:
        """A delta of text; white space waits for more, since white space alone beside calls is none."""
        text = self._space + text
        self._space = "" if text.strip() or self._in_text else text
        if not text or self._space:
            return []
        self._in_text = True
        return [{"content": text}]

    def _call(self, name: str) -> dict[str, Any]:
        """The beginning of a call."""
        entry = {
            "index": self.calls,
            "id": f"call_{secrets.token_hex(12)}",
            "type": "function",
            "function": {"name": name, "arguments": ""},
        }
        self.calls += 1
        return {"tool_calls": [entry]}

    def _take_arguments(self) -> list[dict[str, Any]]:
        """Arguments up to the end of a call, or what may become one."""
        place = self._held.find(CALL_END)
        complete = place >= 0
        if not complete:
            place = len(self._held) - overlap(self._held, CALL_END)
        text, self._held = self._held[:place], self._held[place:]
        if complete:
            self._held, self._within = self._held[len(CALL_END) :], False
        return [self._more(text)] if text else []

    def _more(self, arguments: str) -> dict[str, Any]:
        """More of the arguments of the last call."""
        self._arguments.append(arguments)
        return {"tool_calls": [{"index": self.calls - 1, "function": {"arguments": arguments}}]}
