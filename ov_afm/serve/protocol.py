"""The HTTP API's objects: requests as they are checked, answers as they are sent.

The names are OpenAI's. `null` means absent everywhere. Fields that our engines cannot honour are
declared here only to be refused by name, and unknown fields are refused too, except in messages, where clients
send back what servers gave them.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr, model_validator

MAX_CHOICES = 16
MAX_TOOLS = 128
_INT64 = 2**63
Stop = Annotated[StrictStr, Field(min_length=1, max_length=1000)]
Token = Annotated[StrictInt, Field(ge=0, lt=2**31)]


class RequestObject(BaseModel):
    """An object of a request; unknown fields are accepted."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())


class StrictObject(RequestObject):
    """An object of a request; unknown fields are refused, because nobody would honour them."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class TextPart(RequestObject):
    """A piece of a message."""

    type: StrictStr
    text: StrictStr | None = None
    refusal: StrictStr | None = None


class FunctionCall(RequestObject):
    """Which function an assistant called, and with what: JSON text, or the object itself."""

    name: StrictStr
    arguments: StrictStr | dict[str, Any] | None = None


class ToolCall(RequestObject):
    """A call in an assistant's earlier message."""

    id: StrictStr | None = None
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(RequestObject):
    """A message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: StrictStr | list[TextPart] | None = None
    name: StrictStr | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: StrictStr | None = None
    refusal: StrictStr | None = None
    # Not OpenAI's: what the model thought before an earlier answer, by the two names that servers give it.
    reasoning_content: StrictStr | None = None
    reasoning: StrictStr | None = None
    # Not OpenAI's: DeepSeek's and Mistral's name for a last message that the answer continues.
    prefix: StrictBool | None = None
    # OpenAI's form before tools.
    function_call: FunctionCall | None = None
    audio: dict[str, Any] | None = None


class JsonSchemaFormat(StrictObject):
    """A schema and its name."""

    name: StrictStr = "answer"
    description: StrictStr | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: StrictBool | None = None


class ResponseFormat(StrictObject):
    """What the answer must look like; `schema` is llama.cpp's and Together's place for the schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None
    schema_: dict[str, Any] | StrictBool | None = Field(None, alias="schema")


class StructuredOutputs(StrictObject):
    """vLLM's form of the same; one of them."""

    # `json` is a method of pydantic's.
    json_: dict[str, Any] | StrictStr | None = Field(None, alias="json")
    regex: StrictStr | None = None
    choice: list[StrictStr] | None = None
    grammar: StrictStr | None = None
    json_object: StrictBool | None = None


class Function(RequestObject):
    """A function that the model may call; `parameters` is a JSON schema."""

    name: Annotated[StrictStr, Field(pattern=r"^[a-zA-Z0-9_.-]{1,128}$")]
    description: StrictStr | None = None
    parameters: dict[str, Any] | None = None
    strict: StrictBool | None = None


class Tool(RequestObject):
    """A tool on offer."""

    type: Literal["function"]
    function: Function


class NamedFunction(RequestObject):
    """A function's name."""

    name: StrictStr


class NamedTool(RequestObject):
    """The tool that must be called."""

    type: Literal["function"]
    function: NamedFunction


class AllowedTools(RequestObject):
    """Tools of a request that may be called this time."""

    mode: Literal["auto", "required"] = "auto"
    tools: Annotated[list[NamedTool], Field(min_length=1)]


class AllowedToolsChoice(RequestObject):
    """Only some of the tools may be called."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


class StreamOptions(StrictObject):
    """What a stream carries besides the answer; padding against eavesdroppers is OpenAI's and is not sent."""

    include_usage: StrictBool | None = None
    include_obfuscation: StrictBool | None = None


ToolChoice = Literal["none", "auto", "required"] | NamedTool | AllowedToolsChoice


# Fields of other servers that change nothing where they have these values, which some clients always send.
NEUTRAL: dict[str, Any] = {
    "add_special_tokens": False,
    "allowed_token_ids": [],
    "bad_words": [],
    "cache_prompt": True,
    "include_stop_str_in_output": False,
    "length_penalty": 1,
    "prompt_logprobs": 0,
    "return_token_ids": False,
    "return_tokens_as_token_ids": False,
    "skip_special_tokens": True,
    "spaces_between_special_tokens": True,
    "typical_p": 1,
    "use_beam_search": False,
}


class SamplingRequest(StrictObject):
    """What chat and plain completions have in common."""

    model: StrictStr | None = None
    max_tokens: Annotated[int, Field(ge=1, lt=_INT64)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(ge=1e-6, le=1, allow_inf_nan=False)] | None = None
    top_k: Annotated[StrictInt, Field(ge=-1, lt=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100, allow_inf_nan=False)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)] | None = None
    seed: Annotated[StrictInt, Field(ge=-_INT64, lt=_INT64)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    n: Annotated[StrictInt, Field(ge=1, le=MAX_CHOICES)] | None = None
    stream: StrictBool | None = None
    stream_options: StreamOptions | None = None
    logit_bias: dict[str, float] | None = None
    # About the client's own bookkeeping, or about OpenAI's service; no answer depends on them.
    user: StrictStr | None = None
    metadata: dict[str, Any] | None = None
    store: StrictBool | None = None
    service_tier: StrictStr | None = None
    safety_identifier: StrictStr | None = None
    prompt_cache_key: StrictStr | None = None
    prompt_cache_retention: StrictStr | None = None
    # vLLM's.
    min_tokens: Annotated[StrictInt, Field(ge=0, lt=2**31)] | None = None
    stop_token_ids: Annotated[list[Token], Field(max_length=64)] | None = None
    priority: StrictInt | None = None
    request_id: StrictStr | None = None
    # Not OpenAI's: load generators (guidellm, vLLM's) set it to get answers of a fixed length.
    ignore_eos: StrictBool | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_neutral(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        neutral = {
            key for key in NEUTRAL.keys() & value.keys() - cls.model_fields.keys() if _changes_nothing(key, value[key])
        }
        return {key: each for key, each in value.items() if key not in neutral}


def _changes_nothing(key: str, value: Any) -> bool:
    return value is None or (value == NEUTRAL[key] and isinstance(value, bool) == isinstance(NEUTRAL[key], bool))


class ChatRequest(SamplingRequest):
    """Body of `POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1, lt=_INT64)] | None = None
    logprobs: StrictBool | None = None
    top_logprobs: Annotated[StrictInt, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    # vLLM's names for what an answer must look like.
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | StrictStr | None = None
    guided_regex: StrictStr | None = None
    guided_choice: list[StrictStr] | None = None
    guided_grammar: StrictStr | None = None
    # Hints that change nothing: how long the answer should be, and what it may resemble.
    verbosity: Literal["low", "medium", "high"] | None = None
    prediction: dict[str, Any] | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: StrictBool | None = None
    # OpenAI's form before tools; the answer has it too.
    functions: Annotated[list[Function], Field(max_length=MAX_TOOLS)] | None = None
    function_call: Literal["none", "auto"] | NamedFunction | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    # Not OpenAI's: vLLM's names for what a chat template can do.
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: StrictBool | None = None
    continue_final_message: StrictBool | None = None
    chat_template: StrictStr | None = None
    documents: list[Any] | None = None
    modalities: list[StrictStr] | None = None
    audio: dict[str, Any] | None = None


class CompletionRequest(SamplingRequest):
    """Body of `POST /v1/completions`; one prompt, as text or as token ids."""

    prompt: StrictStr | list[Token] | list[StrictStr] | list[list[Token]]
    logprobs: Annotated[StrictInt, Field(ge=0, le=20)] | None = None
    echo: StrictBool | None = None
    suffix: StrictStr | None = None
    best_of: Annotated[StrictInt, Field(ge=0, le=20)] | None = None


class TokenizeRequest(StrictObject):
    """Body of `POST /tokenize`: text, or a conversation with what else changes its prompt."""

    model: StrictStr | None = None
    prompt: StrictStr | None = None
    add_special_tokens: StrictBool | None = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: ToolChoice | None = None
    functions: Annotated[list[Function], Field(max_length=MAX_TOOLS)] | None = None
    function_call: Literal["none", "auto"] | NamedFunction | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: StrictBool | None = None
    continue_final_message: StrictBool | None = None
    chat_template: StrictStr | None = None
    documents: list[Any] | None = None


class DetokenizeRequest(StrictObject):
    """Body of `POST /detokenize`."""

    model: StrictStr | None = None
    tokens: Annotated[list[Token], Field(max_length=1_000_000)]


class ErrorBody(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorEnvelope(BaseModel):
    """Every error has this form."""

    error: ErrorBody


class CompletionDetails(BaseModel):
    """What the tokens of an answer were."""

    reasoning_tokens: int = 0


class Usage(BaseModel):
    """Tokens that a request took."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    completion_tokens_details: CompletionDetails | None = None


class Timings(BaseModel):
    """How long an answer took, in the words of llama.cpp's server; `null` where there is nothing to divide.

    Attributes:
        prompt_n: Tokens of the prompt, cached ones among them.
        prompt_ms: From the time when the engine took the request to the first token.
        prompt_per_second: Tokens of the prompt in a second of it.
        predicted_n: Tokens generated.
        predicted_ms: From the first token to the last.
        predicted_per_second: Tokens after the first in a second of it.
    """

    prompt_n: int
    prompt_ms: float
    prompt_per_second: float | None
    predicted_n: int
    predicted_ms: float
    predicted_per_second: float | None


class AnswerMessage(BaseModel):
    """The assistant's message."""

    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: None = None
    reasoning_content: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    function_call: dict[str, Any] | None = None


class ChatChoice(BaseModel):
    """One answer of several."""

    index: int
    message: AnswerMessage
    logprobs: dict[str, Any] | None = None
    finish_reason: str


class AnswerObject(BaseModel):
    """What every answer begins with, whole or in pieces."""

    id: str
    object: str
    created: int
    model: str


class ChatCompletion(AnswerObject):
    """A whole answer."""

    object: Literal["chat.completion"] = "chat.completion"
    choices: list[ChatChoice]
    usage: Usage
    timings: Timings | None = None


class ChunkChoice(BaseModel):
    """A piece of one answer."""

    index: int
    delta: dict[str, Any]
    logprobs: None = None
    finish_reason: str | None = None


class ChatChunk(AnswerObject):
    """An event of a stream; `usage` is absent unless it was asked for, `timings` except in the last one."""

    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    choices: list[ChunkChoice]
    usage: Usage | None = None
    timings: Timings | None = None


class Choice(BaseModel):
    """One continuation of several."""

    index: int
    text: str
    logprobs: dict[str, Any] | None = None
    finish_reason: str | None = None


class Completion(AnswerObject):
    """A continuation, or an event of its stream."""

    object: Literal["text_completion"] = "text_completion"
    choices: list[Choice]
    usage: Usage | None = None
    timings: Timings | None = None


class Capabilities(BaseModel):
    """What a model can be asked for."""

    chat: bool
    completion: bool
    tools: bool
    json_schema: bool
    logprobs: bool
    reasoning: bool
    embeddings: bool
    rerank: bool


class ModelMeta(BaseModel):
    """The size of a model, under the names of llama.cpp's server; `size` in bytes."""

    n_vocab: int
    n_ctx_train: int
    n_embd: int
    n_params: int
    size: int


class Model(BaseModel):
    """A model on offer; `type`, `display_name` and `created_at` are Anthropic's."""

    id: str
    object: Literal["model"] = "model"
    type: Literal["model"] = "model"
    display_name: str
    created: int
    created_at: str
    owned_by: str = "ov_afm"
    parent: str | None = None
    max_model_len: int
    context_length: int
    device: str
    recipe: str
    task: str
    status: str
    capabilities: Capabilities
    supported_parameters: list[str]
    meta: ModelMeta


class ModelList(BaseModel):
    """All models on offer, on one page, as Anthropic's clients want to be told."""

    object: Literal["list"] = "list"
    data: list[Model]
    has_more: Literal[False] = False
    first_id: str
    last_id: str


class Tokens(BaseModel):
    """Answer of `POST /tokenize`."""

    tokens: list[int]
    count: int
    max_model_len: int


class Text(BaseModel):
    """Answer of `POST /detokenize`."""

    prompt: str


class Version(BaseModel):
    """Answer of `GET /version`."""

    version: str


class Health(BaseModel):
    """Answer of `GET /health`."""

    status: str
