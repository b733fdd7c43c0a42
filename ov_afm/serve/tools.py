"""Tools, both ways: how a conversation with tools is rendered, and how calls are read from an answer.

A model that calls a function writes `<tool_call>`, a JSON object and `</tool_call>`, a form that
Hermes introduced. A grammar enforces it (`serve.output_format`). This module describes the tools in a message where
the chat template cannot, and reads calls out of a stream as they appear.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterator
from typing import Any

from ..system.json_text import parse
from .errors import APIError
from .grammar import CALL_END
from .protocol import ChatRequest, Message, Tool

__all__ = ["CallReader", "messages_for", "tools_for"]

BEGIN = "<tool_call>"
HEAD = re.compile(r'<tool_call>\s*\{"name": ("(?:[^"\\]|\\.)*"), "arguments": ')
MAX_HEAD_CHARACTERS = 400
INSTRUCTION = (
    "You may call functions. These are their signatures:\n<tools>\n{tools}\n</tools>\n"
    "To call one, answer with its name and arguments as JSON within tags:\n"
    '<tool_call>\n{{"name": "NAME", "arguments": {{...}}}}\n</tool_call>'
)


def tools_for(request: ChatRequest) -> list[Tool]:
    """The tools that the model may call."""
    if request.tool_choice == "none" or not request.tools:
        if request.tool_choice not in (None, "none", "auto"):
            raise APIError("tool_choice needs tools", "tool_choice")
        return []
    return request.tools


def messages_for(request: ChatRequest, *, template_knows_tools: bool) -> list[dict[str, Any]]:
    """The messages as a chat template takes them.

    Raises:
        APIError: A message has parts that are not text.
    """
    rendered = [_message(message, index, template_knows_tools) for index, message in enumerate(request.messages)]
    tools = tools_for(request)
    if tools and not template_knows_tools:
        lines = "\n".join(json.dumps(tool.function.model_dump(exclude_none=True)) for tool in tools)
        text = INSTRUCTION.format(tools=lines)
        if rendered[0]["role"] == "system":
            rendered[0]["content"] = f"{rendered[0]['content']}\n\n{text}"
        else:
            rendered.insert(0, {"role": "system", "content": text})
    return rendered


def _message(message: Message, index: int, template_knows_tools: bool) -> dict[str, Any]:
    role = {"developer": "system", "function": "tool"}.get(message.role, message.role)
    content = _text(message, index)
    if template_knows_tools:
        named = message.model_dump(include={"name", "tool_call_id"}, exclude_none=True)
        fields: dict[str, Any] = {"role": role, "content": content, **named}
        if message.tool_calls:
            fields["tool_calls"] = [
                {"type": "function", "function": {"name": name, "arguments": arguments}}
                for name, arguments in _calls(message)
            ]
        return fields
    if role == "tool":
        return {"role": "user", "content": f"<tool_response>\n{content}\n</tool_response>"}
    for name, arguments in _calls(message):
        call = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)
        content += f"{BEGIN}\n{call}\n</tool_call>"
    return {"role": role, "content": content}


def _text(message: Message, index: int) -> str:
    if message.content is None:
        if message.role != "assistant" or not message.tool_calls:
            where = f"messages.{index}.content"
            raise APIError(f"{where} is missing; only an assistant's tool calls have none", where)
        return ""
    if isinstance(message.content, str):
        return message.content
    for number, part in enumerate(message.content):
        if part.type not in ("text", "refusal") or part.text is None:
            where = f"messages.{index}.content.{number}"
            raise APIError(f"{where}: this model reads text only, found a part of type {part.type!r}", where)
    return "".join(part.text or "" for part in message.content)


def _calls(message: Message) -> Iterator[tuple[str, Any]]:
    for call in message.tool_calls or []:
        try:
            arguments = parse(call.function.arguments)
        except ValueError:
            arguments = call.function.arguments
        yield call.function.name, arguments


class CallReader:
    """Separates tool calls from text in a stream of pieces; gives deltas as the wire has them."""

    def __init__(self) -> None:
        self.calls = 0
        self._held = ""
        self._within = False

    def push(self, text: str) -> list[dict[str, Any]]:
        """Add text; returns the deltas that became certain."""
        self._held += text
        deltas: list[dict[str, Any]] = []
        while True:
            before = (self._held, self._within)
            deltas += self._arguments() if self._within else self._content()
            if before == (self._held, self._within):
                return deltas

    def finish(self) -> list[dict[str, Any]]:
        """What was still held back at the end of the answer."""
        rest, self._held = self._held, ""
        if not rest or (self.calls and not self._within and not rest.strip()):
            return []
        return [self._more(rest)] if self._within else [{"content": rest}]

    def _take(self, mark: str) -> tuple[str, bool]:
        """The text before a mark, or before what may become one, and whether the mark is there."""
        place = self._held.find(mark)
        complete = place >= 0
        if not complete:
            place = len(self._held) - _overlap(self._held, mark)
        text, self._held = self._held[:place], self._held[place:]
        return text, complete

    def _content(self) -> list[dict[str, Any]]:
        text, call = self._take(BEGIN)
        deltas: list[dict[str, Any]] = [{"content": text}] if text and not (self.calls and not text.strip()) else []
        if call and (head := HEAD.match(self._held)):
            self._held, self._within = self._held[head.end() :], True
            call_id = f"call_{secrets.token_hex(12)}"
            function = {"name": parse(head[1]), "arguments": ""}
            entry = {"index": self.calls, "id": call_id, "type": "function", "function": function}
            deltas.append({"tool_calls": [entry]})
            self.calls += 1
        elif call and len(self._held) > MAX_HEAD_CHARACTERS:
            deltas.append({"content": BEGIN})
            self._held = self._held[len(BEGIN) :]
        return deltas

    def _arguments(self) -> list[dict[str, Any]]:
        text, complete = self._take(CALL_END)
        if complete:
            self._held, self._within = self._held[len(CALL_END) :], False
        return [self._more(text)] if text else []

    def _more(self, arguments: str) -> dict[str, Any]:
        """More of the arguments of the last call."""
        return {"tool_calls": [{"index": self.calls - 1, "function": {"arguments": arguments}}]}


def _overlap(text: str, end: str) -> int:
    """Length of the longest end of `text` that is a beginning of `end`."""
    return next((size for size in range(min(len(text), len(end) - 1), 0, -1) if end.startswith(text[-size:])), 0)
