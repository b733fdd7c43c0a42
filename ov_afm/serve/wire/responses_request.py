"""OpenAI's Responses API: what a request may hold, and the chat request that it stands for.

A conversation is a list of items here: messages, calls, results of calls, and the reasoning before them. What we
cannot honour is refused by its name; hints that change no answer, such as `prompt_cache_key`, are taken.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictStr, ValidationError

from ..errors import APIError, first_mistake
from ..protocol import MAX_TOOLS, ChatRequest
from .responses_items import chat_messages
from .responses_tools import ToolTable

__all__ = ["ResponsesRequest", "chat_request", "in_our_words"]

Label = Annotated[StrictStr, Field(max_length=64)]
# What can be asked for besides the answer. Only reasoning exists here, and it is never encrypted; the others add to
# items of tools that we refuse.
Include = Literal[
    "code_interpreter_call.outputs",
    "computer_call_output.output.image_url",
    "file_search_call.results",
    "message.input_image.image_url",
    "reasoning.encrypted_content",
    "web_search_call.action.sources",
    "web_search_call.results",
]
# What our server cannot do, by the field that asks for it.
UNAVAILABLE = {
    "background": "an answer is generated while the client waits",
    "conversation": "use previous_response_id",
    "context_management": "shorten the conversation yourself, or set truncation to auto",
    "moderation": "there is no moderation here",
    "prompt": "no prompts are kept here; send instructions and input",
    "prompt_cache_options": "prompts are cached as long as there is memory",
    "top_logprobs": "the engine reports only the chosen token's probability",
}
# What both APIs call by the same name; `ChatRequest` checks the values. The last ones are ours, not OpenAI's.
SAME_FIELDS = (
    *("model", "stream", "temperature", "top_p", "parallel_tool_calls"),
    *("top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "seed", "chat_template_kwargs"),
)
# How errors about the chat request name their fields, and what the client called them.
OUR_WORDS = {
    r"\bresponse_format\b": "text.format",
    r"\breasoning_effort\b": "reasoning.effort",
    r"\bmax_(completion_)?tokens\b": "max_output_tokens",
    r"^messages\b(\.\w+)*|\bmessages(\.\w+)+": "input",
    r"\b(tools\.\d+)\.function\b": r"\1",
}


class Strict(BaseModel):
    """An object of a request; unknown fields are refused by name."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class TextFormat(Strict):
    """What the answer must look like."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    name: StrictStr | None = None
    description: StrictStr | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: StrictBool | None = None


class TextOptions(Strict):
    """How text is answered; the model has one verbosity."""

    format: TextFormat | None = None
    verbosity: Literal["medium"] | None = None


class ReasoningOptions(Strict):
    """How much the model thinks; its thoughts are given as they are, nobody summarizes them."""

    effort: StrictStr | None = None
    summary: Literal["auto"] | None = None
    generate_summary: Literal["auto"] | None = None


class ResponsesStreamOptions(Strict):
    """What a stream carries besides the answer; nothing is padded here."""

    include_obfuscation: Literal[False] | None = None


class ResponsesRequest(Strict):
    """Body of `POST /v1/responses`."""

    model: StrictStr | None = None
    input: StrictStr | list[dict[str, Any]]
    instructions: StrictStr | None = None
    previous_response_id: StrictStr | None = None
    store: StrictBool | None = None
    stream: StrictBool | None = None
    stream_options: ResponsesStreamOptions | None = None
    include: list[Include] | None = None
    max_output_tokens: Annotated[int, Field(ge=1, lt=2**63)] | None = None
    temperature: float | None = None
    top_p: float | None = None
    tools: Annotated[list[dict[str, Any]], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: StrictStr | dict[str, Any] | None = None
    parallel_tool_calls: StrictBool | None = None
    # Of tools that we run, and there are none.
    max_tool_calls: Annotated[int, Field(ge=1)] | None = None
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    truncation: Literal["auto", "disabled"] | None = None
    metadata: Annotated[dict[Label, Annotated[StrictStr, Field(max_length=512)]], Field(max_length=16)] | None = None
    service_tier: Literal["auto", "default"] | None = None
    # Hints for caches, and labels for the log of a service.
    prompt_cache_key: StrictStr | None = None
    prompt_cache_retention: StrictStr | None = None
    safety_identifier: StrictStr | None = None
    user: StrictStr | None = None
    client_metadata: dict[str, Any] | None = None
    # Refused by name.
    background: StrictBool | None = None
    context_management: list[Any] | None = None
    conversation: StrictStr | dict[str, Any] | None = None
    moderation: dict[str, Any] | None = None
    prompt: dict[str, Any] | None = None
    prompt_cache_options: dict[str, Any] | None = None
    top_logprobs: int | None = None
    # Not OpenAI's here; as in chat.
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    def check(self) -> None:
        """Refuse what cannot be done.

        Raises:
            APIError: It names the field.
        """
        for field, reason in UNAVAILABLE.items():
            if getattr(self, field):
                raise APIError(f"{field} is not available: {reason}", field, "unsupported_parameter")
        if self.stream_options is not None and not self.stream:
            raise APIError("stream_options needs stream: true", "stream_options")


def chat_request(body: ResponsesRequest, conversation: list[dict[str, Any]], tools: ToolTable) -> ChatRequest:
    """The chat request that a request stands for.

    Args:
        body: The request.
        conversation: Its items and those before them.
        tools: Its tools.

    Raises:
        APIError: A value is none that is allowed.
    """
    fields = {name: getattr(body, name) for name in SAME_FIELDS}
    fields["messages"] = chat_messages(conversation, body.instructions)
    fields["max_completion_tokens"] = body.max_output_tokens
    if body.text is not None and body.text.format is not None:
        fields["response_format"] = _response_format(body.text.format)
    if body.reasoning is not None and body.reasoning.effort is not None:
        fields["reasoning_effort"] = body.reasoning.effort
    if tools.functions:
        fields["tools"] = tools.functions
    fields["tool_choice"] = tools.choice(body.tool_choice)
    try:
        return ChatRequest.model_validate({name: value for name, value in fields.items() if value is not None})
    except ValidationError as error:
        raise in_our_words(first_mistake(error.errors())) from None


def _response_format(asked: TextFormat) -> dict[str, Any]:
    if asked.type != "json_schema":
        return {"type": asked.type}
    if asked.schema_ is None:
        raise APIError("text.format of type json_schema needs a schema", "text.format.schema")
    schema = {"name": asked.name or "answer", "schema": asked.schema_, "strict": asked.strict}
    return {"type": "json_schema", "json_schema": schema}


def in_our_words(error: APIError) -> APIError:
    """An error about a chat request with the names that this API has for its fields."""
    message, param = str(error), error.param
    for chat, ours in OUR_WORDS.items():
        message = re.sub(chat, ours, message)
        param = re.sub(chat, ours, param) if param else param
    return APIError(message, param, error.api_code, status=error.status, headers=error.headers)
