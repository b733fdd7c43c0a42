"""The output of a Responses answer: items that grow delta by delta, and the events that say so.

A whole answer goes the same way, only without anybody who reads the events. So the joined deltas of a stream are the
text of the whole answer.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel

from ..answers import Answer, Running
from ..errors import APIError, as_api_error
from ..protocol import Usage
from .responses_items import new_id
from .responses_request import ResponsesRequest
from .responses_tools import ToolTable, custom_input

__all__ = ["Response", "events", "whole"]

Event = dict[str, Any]


class TextKind(NamedTuple):
    """An item with text.

    Attributes:
        fields: What it begins with.
        part: Its only part, empty.
        events: Beginning of its events' names.
        more: What these events hold besides.
    """

    fields: dict[str, Any]
    part: dict[str, Any]
    events: str
    more: dict[str, Any]


TEXTS = {
    "message": TextKind(
        {"role": "assistant", "content": []},
        {"type": "output_text", "text": "", "annotations": [], "logprobs": []},
        "response.output_text",
        {"logprobs": []},
    ),
    "reasoning": TextKind(
        {"summary": [], "content": []}, {"type": "reasoning_text", "text": ""}, "response.reasoning_text", {}
    ),
}


class Response(BaseModel):
    """An answer, and what was asked for."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    completed_at: int | None = None
    status: Literal["in_progress", "completed", "incomplete", "failed"] = "in_progress"
    background: Literal[False] = False
    error: dict[str, Any] | None = None
    incomplete_details: dict[str, Any] | None = None
    instructions: str | None
    max_output_tokens: int | None
    max_tool_calls: int | None
    metadata: dict[str, str]
    model: str
    output: list[dict[str, Any]] = []
    parallel_tool_calls: bool
    previous_response_id: str | None
    prompt_cache_key: str | None
    reasoning: dict[str, Any]
    safety_identifier: str | None
    service_tier: Literal["default"] = "default"
    store: bool
    temperature: float | None
    text: dict[str, Any]
    tool_choice: Any
    tools: list[dict[str, Any]]
    top_logprobs: int = 0
    top_p: float | None
    truncation: Literal["auto", "disabled"]
    usage: dict[str, Any] | None = None
    user: str | None

    @classmethod
    def begun(cls, body: ResponsesRequest, answer: Answer, replica: str = "") -> Response:
        """The response to a request that the engine has taken; its id names the replica that keeps it."""
        text = body.text.model_dump(by_alias=True, exclude_none=True) if body.text else {}
        reasoning = body.reasoning.model_dump(include={"effort", "summary"}) if body.reasoning else {}
        return cls(
            id=new_id("response", replica),
            created_at=answer.created,
            instructions=body.instructions,
            max_output_tokens=body.max_output_tokens,
            max_tool_calls=body.max_tool_calls,
            metadata=body.metadata or {},
            model=answer.model,
            parallel_tool_calls=body.parallel_tool_calls is not False,
            previous_response_id=body.previous_response_id,
            prompt_cache_key=body.prompt_cache_key,
            reasoning={"effort": None, "summary": None, **reasoning},
            safety_identifier=body.safety_identifier,
            store=body.store is not False,
            temperature=body.temperature,
            text={"format": {"type": "text"}, **text},
            tool_choice=body.tool_choice or "auto",
            tools=body.tools or [],
            top_p=body.top_p,
            truncation=body.truncation or "disabled",
            user=body.user,
        )


class Output:
    """The items of one answer as they grow.

    Args:
        tools: The tools of the request.

    Attributes:
        items: The items so far; the last one may grow.
    """

    def __init__(self, tools: ToolTable) -> None:
        self.items: list[dict[str, Any]] = []
        self._tools = tools
        self._open = False
        # Of a custom tool's call: its input is known when they are complete.
        self._arguments = ""

    def push(self, delta: dict[str, Any]) -> Iterator[Event]:
        """Add a delta in chat's form."""
        for kind, field in (("reasoning", "reasoning_content"), ("message", "content")):
            if delta.get(field):
                yield from self._text(kind, delta[field])
        for call in delta.get("tool_calls", ()):
            yield from self._call(call)

    def close(self, status: str = "completed") -> Iterator[Event]:
        """Complete the last item, or leave it as it was cut off."""
        if not self._open:
            return
        self._open = False
        item = self.items[-1]
        item["status"] = status
        if (kind := TEXTS.get(item["type"])) is not None:
            part = item["content"][0]
            yield self._event(f"{kind.events}.done", content_index=0, text=part["text"], **kind.more)
            yield self._event("response.content_part.done", content_index=0, part=part)
        elif item["type"] == "function_call":
            arguments = item["arguments"]
            yield self._event("response.function_call_arguments.done", arguments=arguments, name=item["name"])
        else:
            item["input"] = custom_input(self._arguments)
            yield self._event("response.custom_tool_call_input.delta", delta=item["input"])
            yield self._event("response.custom_tool_call_input.done", input=item["input"])
        yield self._item_event("done")

    def end(self, status: str) -> Iterator[Event]:
        """Complete the answer, which is a message at least."""
        if not self.items:
            yield from self._begin_text("message")
        yield from self.close(status)

    def _begin(self, kind: str, fields: Mapping[str, Any]) -> Iterator[Event]:
        yield from self.close()
        self._open, self._arguments = True, ""
        self.items.append({"id": new_id(kind), "type": kind, "status": "in_progress", **fields})
        yield self._item_event("added")

    def _begin_text(self, name: str) -> Iterator[Event]:
        kind = copy.deepcopy(TEXTS[name])
        yield from self._begin(name, kind.fields)
        self.items[-1]["content"].append(kind.part)
        yield self._event("response.content_part.added", content_index=0, part=dict(kind.part))

    def _text(self, name: str, text: str) -> Iterator[Event]:
        if not self._open or self.items[-1]["type"] != name:
            yield from self._begin_text(name)
        self.items[-1]["content"][0]["text"] += text
        kind = TEXTS[name]
        yield self._event(f"{kind.events}.delta", content_index=0, delta=text, **kind.more)

    def _call(self, call: dict[str, Any]) -> Iterator[Event]:
        function = call["function"]
        if call.get("id"):
            item = self._tools.call_item(function["name"], call["id"])
            yield from self._begin(item.pop("type"), item)
        item, text = self.items[-1], function.get("arguments") or ""
        self._arguments += text
        if text and item["type"] == "function_call":
            item["arguments"] += text
            yield self._event("response.function_call_arguments.delta", delta=text)

    def _event(self, kind: str, **fields: Any) -> Event:
        """An event about the last item."""
        return {"type": kind, "item_id": self.items[-1]["id"], "output_index": len(self.items) - 1, **fields}

    def _item_event(self, what: str) -> Event:
        item = copy.deepcopy(self.items[-1])
        return {"type": f"response.output_item.{what}", "output_index": len(self.items) - 1, "item": item}


async def _answer(
    running: Running, response: Response, tools: ToolTable, keep: Callable[[Response], None]
) -> AsyncIterator[Event]:
    """The events of an answer; `response` grows with it and goes to `keep` when it is complete.

    Raises:
        Exception: The answer cannot be completed.
    """
    output = Output(tools)
    response.output = output.items
    finish = None
    async for part in running.parts():
        for delta in part.deltas:
            for event in output.push(delta):
                yield event
        finish = part.finish or finish
    response.status = "incomplete" if finish == "length" else "completed"
    for event in output.end(response.status):
        yield event
    response.usage = _usage(running.answer.usage)
    if response.status == "incomplete":
        response.incomplete_details = {"reason": "max_output_tokens"}
    else:
        response.completed_at = int(time.time())
    keep(response)
    yield {"type": f"response.{response.status}", "response": response.model_dump()}


async def whole(running: Running, response: Response, tools: ToolTable, keep: Callable[[Response], None]) -> Response:
    """The answer to a request that wants no stream.

    Raises:
        Exception: The answer cannot be completed.
    """
    async for _ in _answer(running, response, tools, keep):
        pass
    return response


async def events(
    running: Running, response: Response, tools: ToolTable, keep: Callable[[Response], None]
) -> AsyncIterator[bytes]:
    """The events of a stream, as bytes."""
    number = 0

    def sent(event: Event) -> bytes:
        nonlocal number
        kind = event["type"]
        data = json.dumps({"type": kind, "sequence_number": number, **event})
        number += 1
        return f"event: {kind}\ndata: {data}\n\n".encode()

    for kind in ("created", "in_progress"):
        yield sent({"type": f"response.{kind}", "response": response.model_dump()})
    try:
        async for event in _answer(running, response, tools, keep):
            yield sent(event)
    except Exception as error:  # noqa: BLE001 - the status is out already, so the error can only be an event
        response.status, response.error = "failed", _error(as_api_error(error))
        if response.output and response.output[-1]["status"] == "in_progress":
            response.output[-1]["status"] = "incomplete"
        response.usage = _usage(running.answer.usage)
        yield sent({"type": "response.failed", "response": response.model_dump()})


def _error(error: APIError) -> dict[str, Any]:
    """An error with one of the codes that this API has."""
    code = "rate_limit_exceeded" if error.status == 429 else "server_error" if error.status >= 500 else "invalid_prompt"
    return {"code": code, "message": str(error)}


def _usage(usage: Usage) -> dict[str, Any]:
    known = usage.model_dump()
    prompt, completion = known.get("prompt_tokens_details") or {}, known.get("completion_tokens_details") or {}
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": prompt.get("cached_tokens") or 0, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": completion.get("reasoning_tokens") or 0},
        "total_tokens": usage.total_tokens,
    }
