"""Requests in the form of Anthropic's Messages API, and what they mean as a `protocol.ChatRequest`.

A message there is a list of blocks: text, calls of tools, their results, thoughts. Results come in the user's turn, and
consecutive turns of one role are one turn. Fields that change nothing in the answer are accepted, and named here; what
the model cannot do is refused by name, and so is a field that is not known.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, StrictBool, StrictInt, StrictStr, Tag, ValidationError

from ..errors import APIError, first_mistake
from ..messages import ModelInfo
from ..protocol import MAX_TOOLS, ChatRequest, RequestObject, Stop
from ..reasoning import SWITCHES

__all__ = ["CountRequest", "MessagesRequest", "chat_request"]

# What an operator says within a conversation. Few templates take a system message there, so it becomes part of the
# user's turn, in the tags that Anthropic's own agent uses for it.
REMINDER = "<system-reminder>\n{text}\n</system-reminder>"
# Claude Code's first line for Anthropic's accounts. It is no part of the prompt there either, and it changes from one
# conversation to the next, so nothing after it would be found in the prefix cache.
BILLING = "x-anthropic-billing-header:"
EFFORT_VARIABLES = frozenset({*SWITCHES, "reasoning_effort"})
EDITS = ("clear_thinking_20251015",)
READABLE = "this model reads text only"


class TextBlock(RequestObject):
    """Text."""

    type: Literal["text"]
    text: StrictStr


class ThinkingBlock(RequestObject):
    """What the model thought before an earlier answer."""

    type: Literal["thinking"]
    thinking: StrictStr


class ToolUseBlock(RequestObject):
    """A call of a tool."""

    type: Literal["tool_use"]
    id: StrictStr
    name: StrictStr
    input: dict[str, Any]


class OtherBlock(RequestObject):
    """Any other block; refused unless it is a document of text, or thoughts that are hidden."""

    type: StrictStr
    source: Any = None
    title: Any = None
    context: Any = None


def _kind(block: Any) -> str:
    kind = block.get("type") if isinstance(block, dict) else getattr(block, "type", None)
    return str(kind) if kind in ("text", "thinking", "tool_use", "tool_result") else "other"


def _form(content: Any) -> str:
    return "text" if isinstance(content, str) else "blocks"


ResultBlock = Annotated[
    Annotated[TextBlock, Tag("text")] | Annotated[OtherBlock, Tag("other")],
    Discriminator(lambda block: "text" if _kind(block) == "text" else "other"),
]


class ToolResultBlock(RequestObject):
    """What a tool returned."""

    type: Literal["tool_result"]
    tool_use_id: StrictStr
    content: (
        Annotated[Annotated[StrictStr, Tag("text")] | Annotated[list[ResultBlock], Tag("blocks")], Discriminator(_form)]
        | None
    ) = None
    is_error: StrictBool | None = None


Block = Annotated[
    Annotated[TextBlock, Tag("text")]
    | Annotated[ThinkingBlock, Tag("thinking")]
    | Annotated[ToolUseBlock, Tag("tool_use")]
    | Annotated[ToolResultBlock, Tag("tool_result")]
    | Annotated[OtherBlock, Tag("other")],
    Discriminator(_kind),
]
Content = Annotated[Annotated[StrictStr, Tag("text")] | Annotated[list[Block], Tag("blocks")], Discriminator(_form)]
System = Annotated[Annotated[StrictStr, Tag("text")] | Annotated[list[TextBlock], Tag("blocks")], Discriminator(_form)]


class Message(RequestObject):
    """A turn."""

    role: Literal["user", "assistant", "system"]
    content: Content


class Tool(RequestObject):
    """A tool that the client runs; Anthropic's own have another type and no schema."""

    type: StrictStr | None = None
    name: Annotated[StrictStr, Field(pattern=r"^[a-zA-Z0-9_.-]{1,128}$")]
    description: StrictStr | None = None
    input_schema: dict[str, Any] | None = None
    strict: StrictBool | None = None
    input_examples: list[dict[str, Any]] | None = None
    defer_loading: StrictBool | None = None
    allowed_callers: list[StrictStr] | None = None


class ToolChoice(RequestObject):
    """Whether a tool may or must be called."""

    type: Literal["auto", "any", "tool", "none"]
    name: StrictStr | None = None
    disable_parallel_tool_use: StrictBool | None = None


class Thinking(RequestObject):
    """Whether the model thinks first. A budget cannot be enforced: thoughts count among `max_tokens`."""

    type: Literal["enabled", "disabled", "adaptive", "between_tools"]
    budget_tokens: Annotated[StrictInt, Field(ge=0, lt=2**63)] | None = None
    display: Literal["summarized", "omitted"] | None = None


class OutputFormat(RequestObject):
    """The schema of the answer."""

    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(RequestObject):
    """How much effort, and in which form."""

    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: OutputFormat | None = None


class ContextManagement(RequestObject):
    """What to leave out of the conversation."""

    edits: list[dict[str, Any]] | None = None


class CountRequest(BaseModel):
    """Body of `POST /v1/messages/count_tokens`."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    model: Annotated[StrictStr, Field(min_length=1)]
    messages: Annotated[list[Message], Field(min_length=1)]
    system: System | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    output_format: OutputFormat | None = None
    context_management: ContextManagement | None = None
    # These change nothing in an answer: the prefix cache needs no marks, and there is one machine at one speed.
    cache_control: dict[str, Any] | None = None
    speed: Literal["standard", "fast"] | None = None
    # What only Anthropic's servers have.
    mcp_servers: list[Any] | None = None
    container: Any = None


class MessagesRequest(CountRequest):
    """Body of `POST /v1/messages`."""

    max_tokens: Annotated[StrictInt, Field(ge=0, lt=2**63)]
    stop_sequences: Annotated[list[Stop], Field(max_length=16)] | None = None
    stream: StrictBool | None = None
    temperature: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    top_k: Annotated[StrictInt, Field(ge=0, lt=2**31)] | None = None
    # These change nothing in an answer.
    metadata: dict[str, Any] | None = None
    service_tier: Literal["auto", "standard_only"] | None = None
    inference_geo: StrictStr | None = None
    diagnostics: dict[str, Any] | None = None


def chat_request(body: CountRequest, info: ModelInfo | None) -> ChatRequest:
    """The request in OpenAI's form.

    Args:
        body: The request.
        info: The model, once it is known.

    Raises:
        APIError: It contradicts itself, or asks for what this model cannot do.
    """
    _refuse_unavailable(body)
    fields = {"model": body.model, **_conversation(body), **_tools(body), "reasoning_effort": _effort(body, info)}
    output = (body.output_config and body.output_config.format) or body.output_format
    if output is not None:
        fields["response_format"] = {"type": "json_schema", "json_schema": {"schema": output.schema_, "strict": True}}
    if isinstance(body, MessagesRequest):
        fields |= {
            "max_tokens": max(1, body.max_tokens),
            "stop": body.stop_sequences or None,
            "temperature": body.temperature,
            "top_p": None if body.top_p is None else max(body.top_p, 1e-6),
            "top_k": body.top_k,
            "stream": body.stream,
        }
    try:
        return ChatRequest.model_validate(fields)
    except ValidationError as error:
        raise first_mistake(error.errors()) from error


def _refuse_unavailable(body: CountRequest) -> None:
    for field in ("mcp_servers", "container"):
        if getattr(body, field):
            raise APIError(f"{field}: this server runs no tools itself; let the client run them", field)
    edits = (body.context_management and body.context_management.edits) or []
    for index, edit in enumerate(edits):
        if edit.get("type") not in EDITS:
            where = f"context_management.edits.{index}"
            message = f"{where}: available is {', '.join(EDITS)}, found {str(edit.get('type'))[:60]!r}"
            raise APIError(f"{message}; shorten the conversation in the client", where)


def _effort(body: CountRequest, info: ModelInfo | None) -> str | None:
    """How much to think, where the model's template can be told; agents ask every model for it."""
    if info is None or not info.template_variables & EFFORT_VARIABLES:
        return None
    asked = body.output_config.effort if body.output_config else None
    effort = "xhigh" if asked == "max" else asked
    if body.thinking is None or body.thinking.type in ("adaptive", "between_tools"):
        return effort
    return "none" if body.thinking.type == "disabled" else effort or "medium"


# -- Tools


def _tools(body: CountRequest) -> dict[str, Any]:
    choice = body.tool_choice
    if choice is None:
        return {"tools": [_tool(tool, index) for index, tool in enumerate(body.tools or [])] or None}
    if choice.type == "tool" and choice.name is None:
        raise APIError("tool_choice.name: which tool must be called?", "tool_choice.name")
    chosen: Any = {"type": "function", "function": {"name": choice.name}}
    return {
        "tools": [_tool(tool, index) for index, tool in enumerate(body.tools or [])] or None,
        "tool_choice": {"auto": "auto", "any": "required", "none": "none"}.get(choice.type, chosen),
        "parallel_tool_calls": False if choice.disable_parallel_tool_use else None,
    }


def _tool(tool: Tool, index: int) -> dict[str, Any]:
    where = f"tools.{index}"
    if tool.type not in (None, "custom"):
        message = f"{where}: {tool.type[:60]!r} is a tool of Anthropic's servers; define a tool with an input_schema"
        raise APIError(message, where)
    if tool.input_schema is None:
        raise APIError(f"{where}.input_schema: field required", f"{where}.input_schema")
    if tool.defer_loading:
        raise APIError(f"{where}.defer_loading needs a tool search, which this server does not have", where)
    if tool.allowed_callers not in (None, [], ["direct"]):
        raise APIError(f"{where}.allowed_callers: only the model itself calls tools here, which is 'direct'", where)
    description = tool.description
    if tool.input_examples:
        examples = "\n".join(json.dumps(each, ensure_ascii=False) for each in tool.input_examples)
        description = f"{description or ''}\nExamples of its input:\n{examples}".strip()
    function = {"name": tool.name, "description": description, "parameters": tool.input_schema, "strict": tool.strict}
    return {"type": "function", "function": function}


# -- Messages


def _conversation(body: CountRequest) -> dict[str, Any]:
    """The messages, and whether the answer continues the last one."""
    system = [body.system] if isinstance(body.system, str) else [block.text for block in body.system or []]
    turns: list[dict[str, Any]] = []
    for index, message in enumerate(body.messages):
        where = f"messages.{index}.content"
        if message.role == "assistant":
            _add_assistant(turns, message.content, where)
        elif message.role == "user":
            _add_user(turns, message.content, where)
        elif turns:
            _add_text(turns, REMINDER.format(text=_text(message.content, where)))
        else:
            system.append(_text(message.content, where))
    if not turns:
        raise APIError("messages: at least one message must be the user's", "messages")
    last, continues = turns[-1], body.messages[-1].role == "assistant"
    if continues and last.get("tool_calls"):
        raise APIError(
            "messages: the last message calls tools; a user's message with their results follows", "messages"
        )
    if continues and not last["content"] and len(turns) > 1:
        # The one turn that may be empty: it says only whose turn it is.
        turns, continues = turns[:-1], False
    text = "\n\n".join(each for each in system if each and not each.startswith(BILLING))
    messages = [{"role": "system", "content": text}, *turns] if text else turns
    return {"messages": messages, "continue_final_message": True if continues else None}


def _add_user(turns: list[dict[str, Any]], content: str | Sequence[Any], where: str) -> None:
    texts = [content] if isinstance(content, str) else []
    results = 0
    for number, block in enumerate([] if isinstance(content, str) else content):
        if isinstance(block, ToolResultBlock):
            text = _text(block.content or "", f"{where}.{number}.content")
            results += 1
            result = f"Error: {text}" if block.is_error else text
            turns.append({"role": "tool", "tool_call_id": block.tool_use_id, "content": result})
        else:
            texts.append(_readable(block, f"{where}.{number}"))
    if texts or not results:
        _add_text(turns, "\n\n".join(texts))


def _add_text(turns: list[dict[str, Any]], text: str) -> None:
    """Add to the user's turn, or begin one."""
    if turns and turns[-1]["role"] == "user":
        turns[-1]["content"] += f"\n\n{text}"
    else:
        turns.append({"role": "user", "content": text})


def _add_assistant(turns: list[dict[str, Any]], content: str | Sequence[Any], where: str) -> None:
    if not turns or turns[-1]["role"] != "assistant":
        turns.append({"role": "assistant", "content": ""})
    turn = turns[-1]
    if isinstance(content, str):
        turn["content"] += content
        return
    for number, block in enumerate(content):
        if isinstance(block, ToolUseBlock):
            function = {"name": block.name, "arguments": json.dumps(block.input, ensure_ascii=False)}
            turn.setdefault("tool_calls", []).append({"id": block.id, "type": "function", "function": function})
        elif isinstance(block, ThinkingBlock):
            turn["reasoning_content"] = turn.get("reasoning_content", "") + block.thinking
        elif block.type != "redacted_thinking":
            turn["content"] += _readable(block, f"{where}.{number}")


def _text(content: str | Sequence[Any], where: str) -> str:
    if isinstance(content, str):
        return content
    return "\n\n".join(_readable(block, f"{where}.{number}") for number, block in enumerate(content))


def _readable(block: Any, where: str) -> str:
    """The text of a block.

    Raises:
        APIError: It has none, or its place is wrong.
    """
    if isinstance(block, TextBlock):
        return block.text
    if block.type == "document" and isinstance(block.source, dict) and isinstance(block.source.get("data"), str):
        if block.source.get("type") == "text":
            head = [each for each in (block.title, block.context) if isinstance(each, str)]
            return "\n".join([*head, block.source["data"]])
        raise APIError(f"{where}.source: {READABLE}, found a source of type {block.source.get('type')!r}", where)
    if block.type in ("thinking", "tool_use"):
        raise APIError(f"{where}: a block of type {block.type!r} belongs into a message of the assistant", where)
    if block.type == "tool_result":
        raise APIError(f"{where}: a block of type 'tool_result' belongs into a message of the user", where)
    raise APIError(f"{where}: {READABLE}, found a block of type {block.type[:60]!r}", where)
