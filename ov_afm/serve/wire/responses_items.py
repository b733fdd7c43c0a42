"""Items of a Responses conversation: checked, and as messages of a chat."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictStr, ValidationError

from ..errors import APIError, first_mistake
from .responses_tools import CUSTOM_INPUT, function_name

__all__ = ["chat_messages", "checked_items", "new_id", "refers"]

Status = Literal["in_progress", "completed", "incomplete"]
# The beginning of an item's id, by its type.
PREFIXES = {
    "message": "msg",
    "reasoning": "rs",
    "function_call": "fc",
    "function_call_output": "fco",
    "custom_tool_call": "ctc",
    "custom_tool_call_output": "ctco",
    "response": "resp",
}
SYSTEM = ("system", "developer")
# Parts that are text.
TEXTS = ("input_text", "output_text", "text", "refusal")


def new_id(kind: str, replica: str = "") -> str:
    """An id for a new item or response."""
    return f"{PREFIXES[kind]}_{replica}{secrets.token_hex(24)}"


class Item(BaseModel):
    """An item of a conversation; unknown fields are refused by name."""

    model_config = ConfigDict(extra="forbid")

    id: StrictStr | None = None
    status: Status | None = None


class Part(BaseModel):
    """A piece of text; annotations and log probabilities come with answers that are sent back."""

    model_config = ConfigDict(extra="forbid")

    type: StrictStr
    text: StrictStr | None = None
    refusal: StrictStr | None = None
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None


class MessageItem(Item):
    """What somebody said."""

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: StrictStr | list[Any]
    phase: StrictStr | None = None


class CallItem(Item):
    """A function that the model called."""

    type: Literal["function_call"]
    call_id: StrictStr
    name: StrictStr
    namespace: StrictStr | None = None
    arguments: StrictStr


class CallOutputItem(Item):
    """What a function or a custom tool returned."""

    type: Literal["function_call_output", "custom_tool_call_output"]
    call_id: StrictStr
    output: StrictStr | list[Any]
    name: StrictStr | None = None
    namespace: StrictStr | None = None


class CustomCallItem(Item):
    """A custom tool that the model called."""

    type: Literal["custom_tool_call"]
    call_id: StrictStr
    name: StrictStr
    namespace: StrictStr | None = None
    input: StrictStr


class Thought(BaseModel):
    """A piece of reasoning."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["reasoning_text", "summary_text"]
    text: StrictStr


class ReasoningItem(Item):
    """What the model thought. Reasoning that another server has encrypted cannot be read here."""

    type: Literal["reasoning"]
    summary: list[Thought] = []
    content: list[Thought] | None = None
    encrypted_content: Annotated[StrictStr, Field(max_length=0)] | None = None


class Reference(BaseModel):
    """An item that is kept here, by its id."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["item_reference"] | None = None
    id: StrictStr


KINDS: dict[Any, type[BaseModel]] = {
    "message": MessageItem,
    "function_call": CallItem,
    "function_call_output": CallOutputItem,
    "custom_tool_call": CustomCallItem,
    "custom_tool_call_output": CallOutputItem,
    "reasoning": ReasoningItem,
}


def refers(raw: Mapping[str, Any]) -> bool:
    """Whether an item stands for one that is kept here."""
    return raw.get("type") == "item_reference" or (raw.get("type") is None and set(raw) - {"type"} == {"id"})


def checked_items(items: str | list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The items of a request in one form, each with an id; references stay as they are.

    Raises:
        APIError: An item is not available, or not as it must be.
    """
    if isinstance(items, str):
        items = [{"type": "message", "role": "user", "content": items}]
    return [_checked(raw, f"input.{index}") for index, raw in enumerate(items)]


def _checked(raw: dict[str, Any], place: str) -> dict[str, Any]:
    if refers(raw):
        return _valid(Reference, raw, place).model_dump()
    kind = str(raw.get("type") or ("message" if "role" in raw else None))
    if kind not in KINDS:
        message = f"{place}: an item of type {kind[:60]!r} is not available here; leave it out"
        raise APIError(message, place, "unsupported_value")
    item = _valid(KINDS[kind], {**raw, "type": kind}, place).model_dump(exclude_none=True)
    for field in ("content", "output"):
        if kind != "reasoning" and field in item:
            _text(item[field], f"{place}.{field}")
    if kind == "message" and isinstance(item["content"], str):
        part: dict[str, Any] = {"type": "input_text", "text": item["content"]}
        if item["role"] == "assistant":
            part = {"type": "output_text", "text": item["content"], "annotations": []}
        item["content"] = [part]
    return {"id": new_id(kind), "status": "completed", **item}


def _valid(kind: type[BaseModel], raw: dict[str, Any], place: str) -> BaseModel:
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        raise first_mistake(error.errors(), place) from None


def _text(content: str | list[Any], place: str = "") -> str:
    """The text of a message or of a result.

    Raises:
        APIError: A part is not text.
    """
    if isinstance(content, str):
        return content
    texts = []
    for index, raw in enumerate(content):
        where = f"{place}.{index}"
        kind = raw.get("type") if isinstance(raw, dict) else type(raw).__name__
        if kind not in TEXTS:
            message = f"{where}: this model reads text only, found a part of type {str(kind)[:60]!r}"
            raise APIError(message, where, "unsupported_value")
        part = _valid(Part, raw, where)
        assert isinstance(part, Part)
        text = part.refusal if part.type == "refusal" else part.text
        if text is None:
            raise APIError(f"{where}: the part has no text", where)
        texts.append(text)
    return "".join(texts)


def chat_messages(items: list[dict[str, Any]], instructions: str | None) -> list[dict[str, Any]]:
    """A conversation as chat messages.

    Instructions and the system messages at the beginning become one: many templates know no second one. Calls belong to
    the assistant's message before them, and so does the reasoning before both.

    Raises:
        APIError: A result belongs to no call, or there is nothing to answer.
    """
    system = [instructions] if instructions else []
    begin = next((index for index, each in enumerate(items) if each.get("role") not in SYSTEM), len(items))
    system += [_text(each["content"]) for each in items[:begin]]
    messages: list[dict[str, Any]] = [{"role": "system", "content": "\n\n".join(system)}] if system else []
    called: set[str] = set()
    reasoning = ""
    for item in items[begin:]:
        kind = item["type"]
        if kind == "reasoning":
            reasoning += "".join(each["text"] for each in item.get("content") or item["summary"])
            continue
        if kind.endswith("_output"):
            if item["call_id"] not in called:
                raise APIError(f"input: no call has the id {item['call_id'][:60]!r} that a result names", "input")
            messages.append({"role": "tool", "tool_call_id": item["call_id"], "content": _text(item["output"])})
            continue
        if kind == "message" and item["role"] != "assistant":
            # Reasoning of an answer that never came.
            reasoning = ""
            messages.append({"role": item["role"], "content": _text(item["content"])})
            continue
        if kind == "message" or reasoning or not messages or messages[-1]["role"] != "assistant":
            messages.append({"role": "assistant", "content": None})
            if reasoning:
                messages[-1]["reasoning_content"], reasoning = reasoning, ""
        if kind == "message":
            messages[-1]["content"] = _text(item["content"])
        else:
            called.add(item["call_id"])
            messages[-1].setdefault("tool_calls", []).append(_call(item))
    if not messages:
        raise APIError("input is empty; send text or at least one message", "input")
    return messages


def _call(item: dict[str, Any]) -> dict[str, Any]:
    arguments = item["arguments"] if "arguments" in item else json.dumps({CUSTOM_INPUT: item["input"]})
    function = {"name": function_name(item["name"], item.get("namespace")), "arguments": arguments}
    return {"id": item["call_id"], "type": "function", "function": function}
