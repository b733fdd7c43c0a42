"""Requests in Ollama's form, and what they mean as a `protocol.ChatRequest` or `CompletionRequest`.

Ollama's clients send options that say how a model is loaded, which is decided here when the server starts: they are
accepted and change nothing. An option that would change the answer and cannot be honoured is refused by name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr, ValidationError

from ..errors import APIError, first_mistake
from ..messages import ModelInfo
from ..protocol import MAX_TOOLS, ChatRequest, CompletionRequest, RequestObject

__all__ = ["OllamaChat", "OllamaGenerate", "ShowRequest", "chat_request", "completion_request", "generate_request"]

T = TypeVar("T", bound=BaseModel)

# How a model is loaded and computed. `num_ctx` asks for a context; ours is the model's, whatever is asked for.
LOADING = frozenset(
    {"num_ctx", "num_batch", "num_gpu", "main_gpu", "num_thread", "num_keep", "draft_num_predict", "numa", "low_vram"}
    | {"f16_kv", "logits_all", "vocab_only", "use_mmap", "use_mlock", "embedding_only"}
)
# What an option must be so that it changes nothing, where nothing else can be done.
NEUTRAL: dict[str, tuple[Any, ...]] = {"mirostat": (0,), "tfs_z": (1,), "typical_p": (1,), "penalize_newline": (True,)}
# They belong to mirostat, and change nothing without it.
SILENT = frozenset({"mirostat_tau", "mirostat_eta"})
# Options by what OpenAI's API calls them.
FIELDS = {
    "num_predict": "max_tokens",
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repeat_penalty": "repetition_penalty",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
    "seed": "seed",
    "stop": "stop",
}
WHOLE = ("top_k", "seed")
# No limit but the context.
UNLIMITED = 2**62
DURATION = re.compile(r"-?(\d+(\.\d*)?|\.\d+)(ns|us|µs|ms|s|m|h)?(\d+(\.\d*)?(ns|us|µs|ms|s|m|h))*")

Think = StrictBool | Literal["low", "medium", "high"]
Format = Literal["", "json"] | dict[str, Any]


class FunctionCall(RequestObject):
    """Which function the assistant called, and with what."""

    name: StrictStr
    arguments: dict[str, Any] = Field(default_factory=dict)


class ToolCall(RequestObject):
    """A call in an earlier message."""

    id: StrictStr | None = None
    function: FunctionCall


class Message(RequestObject):
    """A message of a conversation."""

    role: Literal["system", "user", "assistant", "tool"]
    content: StrictStr | None = None
    thinking: StrictStr | None = None
    images: list[Any] | None = None
    tool_calls: list[ToolCall] | None = None
    tool_name: StrictStr | None = None
    tool_call_id: StrictStr | None = None


class Function(RequestObject):
    """A function that the model may call."""

    name: Annotated[StrictStr, Field(pattern=r"^[a-zA-Z0-9_.-]{1,128}$")]
    description: StrictStr | None = None
    parameters: dict[str, Any] | None = None


class Tool(RequestObject):
    """A tool on offer."""

    type: Literal["function"] = "function"
    function: Function


class OllamaRequest(BaseModel):
    """What chats and completions have in common."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    model: Annotated[StrictStr, Field(min_length=1)]
    stream: StrictBool | None = None
    format: Format | None = None
    options: dict[str, Any] | None = None
    # How long a model stays loaded is decided by `serve --idle-unload`.
    keep_alive: StrictStr | float | None = None
    think: Think | None = None
    logprobs: StrictBool | None = None
    top_logprobs: Annotated[StrictInt, Field(ge=0, le=20)] | None = None


class OllamaChat(OllamaRequest):
    """Body of `POST /api/chat`."""

    messages: list[Message] | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None
    # What to do with a conversation that is too long. It is refused in any case.
    truncate: StrictBool | None = None
    shift: StrictBool | None = None


class OllamaGenerate(OllamaRequest):
    """Body of `POST /api/generate`."""

    prompt: StrictStr | None = None
    system: StrictStr | None = None
    raw: StrictBool | None = None
    suffix: StrictStr | None = None
    template: StrictStr | None = None
    context: list[Any] | None = None
    images: list[Any] | None = None
    truncate: StrictBool | None = None
    shift: StrictBool | None = None


class ShowRequest(RequestObject):
    """Body of `POST /api/show`; older clients call the model's name `name`."""

    model: StrictStr | None = None
    name: StrictStr | None = None
    verbose: StrictBool | None = None


def chat_request(body: OllamaChat, info: ModelInfo | None) -> ChatRequest:
    """A chat in OpenAI's form.

    Raises:
        APIError: It asks for what this model cannot do.
    """
    tools = [{"type": "function", "function": tool.function.model_dump()} for tool in body.tools or []]
    return _chat(body, info, _messages(body.messages or []), tools)


def generate_request(body: OllamaGenerate, info: ModelInfo | None) -> ChatRequest:
    """A prompt as a chat of one question.

    Raises:
        APIError: It asks for what this model cannot do.
    """
    _refuse_fields(body)
    messages = [{"role": "user", "content": body.prompt or ""}]
    if body.system:
        messages.insert(0, {"role": "system", "content": body.system})
    return _chat(body, info, messages, [])


def completion_request(body: OllamaGenerate) -> CompletionRequest:
    """A raw prompt as a text to continue.

    Raises:
        APIError: It asks for what a continuation cannot have.
    """
    _refuse_fields(body)
    for name in ("system", "format", "think"):
        if getattr(body, name):
            raise APIError(f"{name} needs the chat template, and raw leaves it out", name)
    return _checked(CompletionRequest, {"model": body.model, "prompt": body.prompt or "", **_common(body)})


def _refuse_fields(body: OllamaGenerate) -> None:
    reasons = {
        "suffix": "the model continues text, it does not fill in",
        "template": "the model's own chat template is used; raw takes a prompt without one",
        "context": "send the conversation to /api/chat instead",
        "images": "this model reads text only",
    }
    for name, reason in reasons.items():
        if getattr(body, name):
            raise APIError(f"{name} is not available: {reason}", name, "unsupported_parameter")


def _chat(
    body: OllamaRequest, info: ModelInfo | None, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any]
) -> ChatRequest:
    fields = {
        "model": body.model,
        "messages": messages,
        "tools": tools or None,
        "response_format": _response_format(body.format),
        "reasoning_effort": _effort(body, info),
        # Ollama, too, continues an answer that has begun.
        "continue_final_message": _continues(messages[-1]),
        "logprobs": body.logprobs,
        "top_logprobs": body.top_logprobs,
        **_common(body),
    }
    return _checked(ChatRequest, fields)


def _continues(last: Mapping[str, Any]) -> bool | None:
    begun = last["role"] == "assistant" and last["content"] and not last.get("tool_calls")
    return True if begun else None


def _effort(body: OllamaRequest, info: ModelInfo | None) -> str | None:
    if body.think is None:
        return None
    if body.think is False:
        return "none" if info is not None and info.reasoning is not None else None
    if info is None or info.reasoning is None:
        raise APIError(f"{body.model[:60]!r} does not support thinking: its chat template has none", "think")
    return "medium" if body.think is True else body.think


def _response_format(form: str | Mapping[str, Any] | None) -> dict[str, Any] | None:
    if not form:
        return None
    if form == "json":
        return {"type": "json_object"}
    return {"type": "json_schema", "json_schema": {"schema": form}}


def _common(body: OllamaRequest) -> dict[str, Any]:
    """Sampling and limits."""
    if isinstance(body.keep_alive, str) and not DURATION.fullmatch(body.keep_alive):
        raise APIError(f"keep_alive: a duration such as 5m is needed, found {body.keep_alive[:60]!r}", "keep_alive")
    fields: dict[str, Any] = {"stream": body.stream is not False}
    options = {name: value for name, value in (body.options or {}).items() if value is not None}
    for name, value in options.items():
        if name in FIELDS:
            whole = name in WHOLE and isinstance(value, float) and value.is_integer()
            fields[FIELDS[name]] = int(value) if whole else value
        elif name == "repeat_last_n":
            _check_window(value, options)
        else:
            _check_option(name, value)
    if fields.get("max_tokens") in (-1, -2):
        fields["max_tokens"] = UNLIMITED
    if options.get("repeat_last_n") == 0:
        fields["repetition_penalty"] = 1.0
    # 0 is Ollama's word for a penalty or a limit that is off.
    if fields.get("repetition_penalty") == 0:
        del fields["repetition_penalty"]
    if fields.get("top_p") == 0:
        fields["top_p"] = 1e-6
    return fields


def _check_window(value: Any, options: Mapping[str, Any]) -> None:
    """The penalty covers the whole text here; -1 asks for that, and 0 for no penalty."""
    if value not in (-1, 0) and options.get("repeat_penalty", 1) != 1:
        shown = repr(value)[:60]
        message = f"options.repeat_last_n: the penalty covers the whole text here, which is -1; found {shown}"
        raise APIError(message, "options.repeat_last_n")


def _check_option(name: str, value: Any) -> None:
    if name in NEUTRAL:
        if value not in NEUTRAL[name]:
            raise APIError(f"options.{name} is not available; leave it out", f"options.{name}")
    elif name not in LOADING | SILENT:
        raise APIError(f"options.{name[:60]}: there is no such option", "options")


def _messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """The messages in OpenAI's form. Ollama's calls have no ids, so results are matched by name, then by order."""
    rendered: list[dict[str, Any]] = []
    waiting: list[tuple[str, str]] = []
    for index, message in enumerate(messages):
        if message.images:
            where = f"messages.{index}.images"
            raise APIError(f"{where}: this model reads text only", where)
        fields: dict[str, Any] = {"role": message.role, "content": message.content or ""}
        if message.role == "assistant":
            fields["reasoning_content"] = message.thinking or None
            calls = [
                (call.id or f"call_{index}_{number}", call.function)
                for number, call in enumerate(message.tool_calls or [])
            ]
            waiting = [(call_id, function.name) for call_id, function in calls] or waiting
            if calls:
                fields["tool_calls"] = [
                    {
                        "id": call_id,
                        "type": "function",
                        "function": {"name": function.name, "arguments": json.dumps(function.arguments)},
                    }
                    for call_id, function in calls
                ]
        elif message.role == "tool":
            fields["tool_call_id"] = message.tool_call_id or _take(waiting, message.tool_name)
        rendered.append(fields)
    return rendered


def _take(waiting: list[tuple[str, str]], name: str | None) -> str | None:
    """The id of the call that a result answers, which is not waiting any more."""
    place = next((index for index, (_, called) in enumerate(waiting) if name in (None, called)), None)
    return None if place is None else waiting.pop(place)[0]


def _checked(kind: type[T], fields: Mapping[str, Any]) -> T:
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        names = {field: f"options.{name}" for name, field in FIELDS.items()}
        mistake = error.errors()[0]
        first, *rest = mistake["loc"]
        raise first_mistake([{**mistake, "loc": rest}], names.get(str(first), str(first))) from error
