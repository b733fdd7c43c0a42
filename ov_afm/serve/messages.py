"""What crosses the pipe between the server and an engine's process, in both directions.

The server sends one `Request` or `Cancel` at a time. The engine sends lists, because one of its steps has something for
many requests at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import OVAFMError
from ..model_dir.text_encoder import TextEncoder
from ..runtime.sampling import Params
from ..runtime.stateful import PromptCache


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """What an engine's process is started with.

    Attributes:
        model_dir: The model directory.
        device: Name of the device, as the user gave it.
        cache_size_gb: Bound of the KV cache; None takes a share of the free memory.
        max_running: Most sequences that are generated at once.
        prefill_tokens: Most tokens of prompts in one step: a long prompt is computed in pieces of this size, and
            a cancelled one ends with its piece.
        kv_cache: Precision of the KV cache.
        threads: CPU threads.
        lock_memory: Keep the weights in memory.
        ov_config: OpenVINO properties.
        adapter: File and weight of a LoRA adapter; None serves the model as it is.
        deterministic: The same seed gives the same text, whatever was asked before: nothing of other prompts is used,
            and one sequence is generated at a time.
        prompt_cache: Where computed prompts are kept; None keeps none.
        text_encoder: What a model for embeddings or reranking does; None for one that writes text.
    """

    model_dir: Path
    device: str = "CPU"
    cache_size_gb: float | None = None
    max_running: int = 32
    prefill_tokens: int = 256
    kv_cache: str | None = None
    threads: int | None = None
    lock_memory: bool = False
    ov_config: Mapping[str, Any] = field(default_factory=dict)
    adapter: tuple[Path, float] | None = None
    deterministic: bool = False
    prompt_cache: PromptCache | None = None
    text_encoder: TextEncoder | None = None


# -- From the server


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation, to be rendered by the model's chat template.

    Attributes:
        messages: Role and content of each message, as the template names them.
        tools: Functions on offer, for a template that knows tools.
        template_options: Further variables of the template.
        open_turn: End with the beginning of the answer's turn.
        continues: The answer continues the last message, which is the assistant's.
    """

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] | None = None
    template_options: Mapping[str, Any] | None = None
    open_turn: bool = True
    continues: bool = False


@dataclass(frozen=True, slots=True)
class Text:
    """Plain text; with `special`, the tokens that the tokenizer puts around a text are added."""

    text: str
    special: bool = True


@dataclass(frozen=True, slots=True)
class Tokens:
    """A prompt that the client has tokenized."""

    ids: Sequence[int]


Prompt = Chat | Text | Tokens


@dataclass(frozen=True, slots=True)
class JSONSchema:
    """The answer must be JSON that the schema, itself JSON text, allows."""

    schema: str


@dataclass(frozen=True, slots=True)
class Grammar:
    """The answer must be a text of a grammar in XGrammar's EBNF, whose first rule is `root`."""

    text: str


@dataclass(frozen=True, slots=True)
class Function:
    """A function that the model may call, with the JSON schema of its arguments."""

    name: str
    parameters: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class FunctionCalls:
    """Calls in the answer must be calls of these functions.

    Attributes:
        functions: What may be called.
        required: There must be a call.
        once: There may be no second call.
        answer: What an answer without calls must look like; None for free text.
    """

    functions: Sequence[Function]
    required: bool = False
    once: bool = False
    answer: JSONSchema | None = None


@dataclass(frozen=True, slots=True)
class AfterThoughts:
    """The answer may think first; what it must look like counts for what follows.

    Attributes:
        format: What the answer must look like.
        begin: What thoughts begin with.
        end: What they end with.
        thinking: The prompt ends within thoughts, so the answer begins with some.
    """

    format: JSONSchema | FunctionCalls | Grammar
    begin: str
    end: str
    thinking: bool


OutputFormat = JSONSchema | Grammar | FunctionCalls | AfterThoughts


@dataclass(frozen=True, slots=True)
class Generate:
    """Continue a prompt; `logprobs` reports each token's log probability."""

    prompt: Prompt
    params: Params = field(default_factory=Params)
    output_format: OutputFormat | None = None
    logprobs: bool = False


@dataclass(frozen=True, slots=True)
class Tokenize:
    """Ask for the tokens of a prompt."""

    prompt: Prompt


@dataclass(frozen=True, slots=True)
class Detokenize:
    """Ask for the text of tokens."""

    tokens: Sequence[int]


@dataclass(frozen=True, slots=True)
class Embed:
    """Ask for embeddings.

    Attributes:
        texts: The texts, each as it is or as its tokens.
        prompt: What is put in front of each.
        cut: Leave out the end of a text that is too long.
    """

    texts: Sequence[str | Sequence[int]]
    prompt: str = ""
    cut: bool = False


@dataclass(frozen=True, slots=True)
class Rerank:
    """Ask how well each document answers a query; with `cut`, the ends of long ones are left out."""

    query: str
    documents: Sequence[str]
    cut: bool = False


Task = Generate | Tokenize | Detokenize | Embed | Rerank


@dataclass(frozen=True, slots=True)
class Request:
    """A task and the number that its answers carry."""

    id: int
    task: Task


@dataclass(frozen=True, slots=True)
class Cancel:
    """Nobody waits for a request any more."""

    id: int


ToEngine = Request | Cancel


# -- From the engine: answers to a request


@dataclass(frozen=True, slots=True)
class PromptTokens:
    """The engine has taken a request whose prompt has so many tokens; with `thinking`, it ends within thoughts."""

    id: int
    count: int
    thinking: bool = False


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A generated token, its natural log probability, and its bytes, which alone may be no text."""

    token: str
    logprob: float
    bytes: Sequence[int]


@dataclass(frozen=True, slots=True)
class Piece:
    """What one step of the engine added to an answer.

    Attributes:
        id: The request.
        text: Text that is certain now; often empty.
        tokens: Tokens generated.
        logprobs: One entry a token, where they were asked for.
        end: Why the answer ends here: `stop`, `length`, or `cache` when the KV cache has no room; None if it does not.
        stop: The stop string that ended it, if one did.
    """

    id: int
    text: str
    tokens: int
    logprobs: Sequence[TokenLogprob] = ()
    end: str | None = None
    stop: str | None = None

    def __reduce__(self) -> tuple[type[Piece], tuple[Any, ...]]:
        """Every token crosses the pipe as one of these; the way of a frozen dataclass takes four times as long."""
        return Piece, (self.id, self.text, self.tokens, self.logprobs, self.end, self.stop)


@dataclass(frozen=True, slots=True)
class Encoded:
    """Embeddings, or scores.

    Attributes:
        rows: One row of numbers for each text, as float32 of this machine, one after the other.
        columns: Numbers in a row.
        tokens: Tokens of all texts.
    """

    rows: bytes
    columns: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Result:
    """The tokens of a `Tokenize`, the text of a `Detokenize`, what an `Embed` or a `Rerank` gave."""

    id: int
    value: list[int] | str | Encoded


@dataclass(frozen=True, slots=True)
class Failure:
    """A request ended with an error."""

    id: int
    error: OVAFMError


Answer = PromptTokens | Piece | Result | Failure


# -- From the engine: what is not about one request


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """The model is loaded.

    Attributes:
        device: The device that runs it.
        context_length: Tokens that prompt and answer may have together.
        template_knows_tools: Its chat template renders tools.
        template_knows_calls: It renders calls and their results.
        template_variables: Variables that it reads.
        reasoning: What the model's thoughts begin and end with; None where it does not think.
    """

    device: str
    context_length: int
    template_knows_tools: bool
    template_knows_calls: bool = False
    template_variables: frozenset[str] = frozenset()
    reasoning: tuple[str, str] | None = None


@dataclass(frozen=True, slots=True)
class Unusable:
    """The model can never be loaded."""

    reason: str


@dataclass(frozen=True, slots=True)
class CacheUsage:
    """The share of the KV cache in use, from 0 to 1."""

    share: float


@dataclass(frozen=True, slots=True)
class Alive:
    """A sign of life.

    Attributes:
        busy_s: Time that the present step has taken so far, or the preparation of the present prompt.
    """

    busy_s: float


FromEngine = Answer | Alive | CacheUsage | ModelInfo | Unusable
