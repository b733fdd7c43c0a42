"""Conversations as chat templates take them, whichever client kept the history.

A history comes back from agents of many kinds: with calls in OpenAI's older form, with arguments as objects, with
results in another order than their calls, with `null` where there is no text. One such turn must not make a
conversation unusable, so all forms become one here. What cannot be meant is refused by name.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..system.json_text import parse
from .errors import APIError
from .messages import Chat, ModelInfo
from .protocol import ChatRequest, FunctionCall, Message, TokenizeRequest
from .reasoning import template_options
from .tools import BEGIN, Offer, offer

__all__ = ["prompt_of"]

TEXT_PARTS = ("text", "input_text", "output_text", "refusal")
INSTRUCTION = (
    "You may call functions. These are their signatures:\n<tools>\n{tools}\n</tools>\n"
    "To call one, answer with its name and arguments as JSON within tags:\n"
    '<tool_call>\n{{"name": "NAME", "arguments": {{...}}}}\n</tool_call>'
)


@dataclass(slots=True)
class Call:
    """A call of a function in an earlier turn.

    Attributes:
        id: As the client gave it; None where it gave none.
        name: The function.
        arguments: Parsed; as text where they are no JSON.
        place: Number of its message, and its own number there.
        answered: A result for it was seen.
    """

    id: str | None
    name: str
    arguments: Any
    place: tuple[int, int]
    answered: bool = False


@dataclass(slots=True)
class Turn:
    """A message in the one form that all others become.

    Attributes:
        role: `system`, `user`, `assistant` or `tool`.
        content: Its text.
        fields: What else a template may read: `name`, `tool_call_id`, `reasoning_content`.
        calls: Functions that the assistant called.
        place: Of a result: the place of its call.
    """

    role: str
    content: str
    fields: dict[str, str] = field(default_factory=dict)
    calls: list[Call] = field(default_factory=list)
    place: tuple[int, int] = (0, 0)


def prompt_of(request: ChatRequest | TokenizeRequest, info: ModelInfo | None) -> Chat:
    """The prompt of a conversation, as a model's template takes it.

    Args:
        request: The request; it has messages.
        info: The model, if it was loaded before.

    Raises:
        APIError: The request contradicts itself, or asks for what the model cannot do.
    """
    offered = offer(request)
    knows_tools = info is not None and info.template_knows_tools
    turns = _in_order(list(_turns(request.messages or [])))
    continues = _continues(request, turns)
    messages = _messages(turns, knows_calls=info is not None and info.template_knows_calls)
    tools = [tool.model_dump(exclude_none=True) for tool in offered.tools] or None
    if tools and not knows_tools:
        messages, tools = _with_instruction(messages, offered), None
    options = template_options(request.reasoning_effort, info) | (request.chat_template_kwargs or {})
    open_turn = request.add_generation_prompt is not False and not continues
    return Chat(messages, tools, options or None, open_turn, continues)


def _continues(request: ChatRequest | TokenizeRequest, turns: Sequence[Turn]) -> bool:
    """Whether the answer continues the last message."""
    prefixes = [index for index, message in enumerate(request.messages or []) if message.prefix]
    if not request.continue_final_message and not prefixes:
        return False
    field = "continue_final_message" if request.continue_final_message else f"messages.{prefixes[0]}.prefix"
    if prefixes and prefixes != [len(turns) - 1]:
        raise APIError(f"{field}: only the last message can be continued", field)
    if request.add_generation_prompt or (prefixes and request.continue_final_message is False):
        other = "add_generation_prompt: true" if request.add_generation_prompt else "continue_final_message: false"
        raise APIError(f"{field} continues the last message, {other} begins a new one; set only one of them", field)
    last = turns[-1]
    if last.role != "assistant" or last.calls:
        what = "one with tool calls" if last.calls else f"one of role {last.role!r}"
        raise APIError(f"{field} needs a last message that is text of the assistant, found {what}", field)
    return True


# -- From messages to turns


def _turns(messages: Sequence[Message]) -> Iterator[Turn]:
    calls: list[Call] = []
    for index, message in enumerate(messages):
        role = {"developer": "system", "function": "tool"}.get(message.role, message.role)
        turn = Turn(role, _text(message, index))
        if message.name is not None:
            turn.fields["name"] = message.name
        if role == "assistant":
            thoughts = message.reasoning if message.reasoning_content is None else message.reasoning_content
            if thoughts is not None:
                turn.fields["reasoning_content"] = thoughts
            turn.calls = _calls(message, index)
            calls += turn.calls
        elif role == "tool":
            if message.tool_call_id is not None:
                turn.fields["tool_call_id"] = message.tool_call_id
            call = _call_of(message, index, calls)
            if call is not None:
                call.answered, turn.place = True, call.place
            else:
                turn.place = (index, 0)
        yield turn


def _text(message: Message, index: int) -> str:
    where = f"messages.{index}.content"
    if message.audio is not None:
        raise APIError(f"messages.{index}.audio: this model reads text only", f"messages.{index}.audio")
    content = message.content
    if content is None:
        # Assistants that call tools say nothing, tools may return nothing, and some clients send null for both.
        if message.role in ("system", "developer", "user") and "content" not in message.model_fields_set:
            raise APIError(f"{where} is missing", where)
        return message.refusal or ""
    if isinstance(content, str):
        return content
    for number, part in enumerate(content):
        if part.type not in TEXT_PARTS or (part.text is None and part.refusal is None):
            place = f"{where}.{number}"
            raise APIError(f"{place}: this model reads text only, found a part of type {part.type!r}", place)
    return "".join(part.text or part.refusal or "" for part in content)


def _calls(message: Message, index: int) -> list[Call]:
    """The calls of an assistant's message, in either of OpenAI's forms."""
    calls: list[tuple[str | None, FunctionCall]] = [(call.id, call.function) for call in message.tool_calls or []]
    if message.function_call is not None and not calls:
        calls = [(None, message.function_call)]
    return [
        Call(call_id, function.name, _arguments(function.arguments), (index, number))
        for number, (call_id, function) in enumerate(calls)
    ]


def _arguments(given: str | dict[str, Any] | None) -> Any:
    if not isinstance(given, str):
        return given or {}
    try:
        arguments = parse(given) if given.strip() else {}
    except ValueError:
        # An answer that was cut off; the model may see what it wrote.
        return given
    return {} if arguments is None else arguments


def _call_of(message: Message, index: int, calls: Sequence[Call]) -> Call | None:
    """The call that a result belongs to: by its id, else the first one of the last turn that has no result.

    Raises:
        APIError: No call has its id.
    """
    wanted = message.tool_call_id
    if wanted is None or all(call.id is None for call in calls):
        last = calls[-1].place[0] if calls else None
        waiting = [call for call in calls if call.place[0] == last and not call.answered]
        named = [call for call in waiting if call.name == message.name]
        if calls or wanted is None:
            return next(iter(named or waiting), None)
    same = [call for call in calls if call.id == wanted]
    if not same:
        raise _unknown(message, index, calls)
    # Some servers number the calls of each turn from 0, so an id may come again.
    last = same[-1].place[0]
    return next((call for call in same if call.place[0] == last and not call.answered), same[-1])


def _unknown(message: Message, index: int, calls: Sequence[Call]) -> APIError:
    where = f"messages.{index}.tool_call_id"
    known = ", ".join(repr(call.id) for call in calls[-8:]) or "none"
    return APIError(f"{where}: no call before it has the id {message.tool_call_id!r}; there are: {known}", where)


def _in_order(turns: Sequence[Turn]) -> list[Turn]:
    """The same turns, with neighbouring results in the order of their calls."""
    ordered: list[Turn] = []
    for are_results, group in itertools.groupby(turns, key=lambda turn: turn.role == "tool"):
        same = list(group)
        ordered += sorted(same, key=lambda turn: turn.place) if are_results else same
    return ordered


# -- From turns to a template's messages


def _messages(turns: Sequence[Turn], *, knows_calls: bool) -> list[dict[str, Any]]:
    """The messages as a chat template takes them; calls and results in words where it would leave them out."""
    messages: list[dict[str, Any]] = []
    previous = ""
    for turn in turns:
        message: dict[str, Any] = {"role": turn.role, "content": turn.content, **turn.fields}
        if knows_calls and turn.calls:
            message["tool_calls"] = [_call(call) for call in turn.calls]
        elif turn.calls:
            message["content"] += "".join(_call_in_words(call) for call in turn.calls)
        elif turn.role == "tool" and not knows_calls:
            words = f"<tool_response>\n{turn.content}\n</tool_response>"
            if previous == "tool":
                messages[-1]["content"] += f"\n{words}"
                continue
            message = {"role": "user", "content": words}
        messages.append(message)
        previous = turn.role
    return messages


def _call(call: Call) -> dict[str, Any]:
    named = {} if call.id is None else {"id": call.id}
    return {**named, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def _call_in_words(call: Call) -> str:
    words = json.dumps({"name": call.name, "arguments": call.arguments}, ensure_ascii=False)
    return f"{BEGIN}\n{words}\n</tool_call>"


def _with_instruction(messages: list[dict[str, Any]], offered: Offer) -> list[dict[str, Any]]:
    """The messages with a description of the tools in the system's message."""
    lines = "\n".join(json.dumps(tool.function.model_dump(exclude_none=True)) for tool in offered.tools)
    text = INSTRUCTION.format(tools=lines)
    if messages[0]["role"] != "system":
        return [{"role": "system", "content": text}, *messages]
    system = {**messages[0], "content": f"{messages[0]['content']}\n\n{text}"}
    return [system, *messages[1:]]
