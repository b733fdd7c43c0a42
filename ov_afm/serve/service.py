"""What the routes do: from a request to a running answer, and what a client may ask about models and tokens."""

from __future__ import annotations

import json
import logging
import secrets
from collections.abc import AsyncIterator, Mapping
from dataclasses import asdict, dataclass, field, replace

from fastapi import Request

from ..model_dir.text_encoder import TEXT_GENERATION
from ..runtime.sampling import Params
from . import conversation, output_format, protocol, tools
from .answer_check import AnswerCheck
from .answers import Answer, EventStream, Running, open_stream, until_gone
from .errors import APIError
from .hosts import HostRules
from .messages import Detokenize, Generate, Prompt, Text, Tokenize, Tokens
from .model_facts import ModelFacts
from .prometheus import Metrics
from .registry import Models

__all__ = ["Service", "Settings", "sampling"]

logger = logging.getLogger(__name__)

SEED_RANGE = 2**63
# Below this temperature logits overflow the engine's float32; the answer is the greedy one anyway.
COLDEST = 1e-3
# What a request and `Params` call by the same name and mean in the same way.
SAME_FIELDS = {"top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"}
# What our engines cannot do, by the field that asks for it.
UNAVAILABLE = {
    "top_logprobs": "the engine reports only the chosen token's probability",
    "logit_bias": "the engine has no logit bias",
    "audio": "this model writes text",
    "echo": "the prompt is not repeated",
    "suffix": "the model continues text, it does not fill in",
    "chat_template": "the model's own is used",
    "documents": "put them into a message",
}


@dataclass(frozen=True, slots=True)
class Settings:
    """How the server behaves towards its clients.

    Attributes:
        api_keys: A request must send one of these keys; empty to let everyone in.
        max_body_bytes: Longest body.
        cors_origins: Web origins that may call; none by default.
        keep_alive_s: Seconds between comments in a stream, which show that the server is still there.
        log_prompts: Write prompts to the log.
        truncate: Texts for embedding and reranking that are too long lose their ends, instead of being refused.
        hosts: Hosts and origins that may ask; None for all.
        aliases: More names of models (see `registry.Models`).
        replica: What the ids of kept responses begin with, where a router has to find the replica that keeps them.
    """

    api_keys: tuple[str, ...] = ()
    max_body_bytes: int = 8 * 2**20
    cors_origins: tuple[str, ...] = ()
    keep_alive_s: float = 10.0
    log_prompts: bool = False
    truncate: bool = False
    hosts: HostRules | None = None
    aliases: Mapping[str, str] = field(default_factory=dict)
    replica: str = ""


class Service:
    """What the routes do.

    Args:
        models: The models on offer.
        settings: How to behave.
    """

    def __init__(self, models: Models, settings: Settings) -> None:
        self.models, self.settings, self.metrics = models, settings, Metrics()
        self.facts = ModelFacts(models)
        for name, engine in models.engines.items():
            self.metrics.watch(name, engine)

    async def begin_chat(self, body: protocol.ChatRequest, request: Request) -> Running:
        """Begin to answer a conversation; the caller closes the lease.

        Raises:
            APIError: The request cannot be answered, or the client has left.
        """
        self._inspect(body, wants_logprobs=bool(body.logprobs))
        if body.modalities and body.modalities != ["text"]:
            raise APIError(f"modalities: this model writes text, found {body.modalities}", "modalities")
        answer_format, offered = output_format.output_format(body), tools.offer(body)
        name = self.models.resolve(body.model)
        engine = await until_gone(request, self.models.engine(name))
        prompt = conversation.prompt_of(body, engine.info)
        limit = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
        answer = Answer(
            name,
            True,
            self.metrics,
            functions=[tool.function.name for tool in offered.callable],
            legacy_calls=offered.legacy,
            reasoning=None if engine.info is None else engine.info.reasoning,
            wants_logprobs=bool(body.logprobs),
            check=AnswerCheck(answer_format),
        )
        return await self._begin(body, request, answer, Generate(prompt, sampling(body, limit), answer_format))

    async def begin_completion(self, body: protocol.CompletionRequest, request: Request) -> Running:
        """Begin to continue a text; the caller closes the lease.

        Raises:
            APIError: The request cannot be answered, or the client has left.
        """
        self._inspect(body, wants_logprobs=body.logprobs is not None)
        if body.logprobs:
            message = "logprobs above 0 asks for alternatives; the engine reports only the chosen token's"
            raise APIError(message, "logprobs")
        if body.best_of is not None and body.best_of != (body.n or 1):
            raise APIError(f"best_of must equal n, found {body.best_of}", "best_of")
        name = self.models.resolve(body.model)
        answer = Answer(name, False, self.metrics, wants_logprobs=body.logprobs is not None)
        task = Generate(_one_prompt(body.prompt), sampling(body, body.max_tokens))
        return await self._begin(body, request, answer, task)

    def _inspect(self, body: protocol.SamplingRequest, *, wants_logprobs: bool) -> None:
        """Refuse what cannot be done."""
        _refuse_unavailable(body)
        if body.stream_options is not None and not body.stream:
            raise APIError("stream_options needs stream: true", "stream_options")
        if wants_logprobs and body.stream:
            raise APIError("logprobs cannot be streamed; leave one of the two out", "logprobs")

    async def _begin(self, body: protocol.SamplingRequest, request: Request, answer: Answer, task: Generate) -> Running:
        answer.count = body.n or 1
        answer.wants_usage = bool(body.stream_options and body.stream_options.include_usage)
        if self.settings.log_prompts:
            logger.warning("prompt: %s", json.dumps(asdict(task.prompt)))
        seed = task.params.seed or 0
        tasks = [
            replace(task, params=replace(task.params, seed=(seed + index) % SEED_RANGE), logprobs=answer.wants_logprobs)
            for index in range(answer.count)
        ]
        engine = await until_gone(request, self.models.engine(answer.model))
        stream, lease = await until_gone(request, open_stream(engine, tasks))
        return Running(answer, stream, lease)

    def event_stream(self, running: Running, events: AsyncIterator[bytes]) -> EventStream:
        """The response that sends a running answer's events."""
        return EventStream(events, running.lease, keep_alive_s=self.settings.keep_alive_s)

    async def tokenize(self, body: protocol.TokenizeRequest) -> protocol.Tokens:
        """Tokens of text or messages."""
        _refuse_unavailable(body)
        if (body.prompt is None) == (body.messages is None):
            raise APIError("give either prompt or messages", "prompt")
        task = None if body.messages is None else TEXT_GENERATION
        engine = await self.models.engine(self.models.resolve(body.model, task))
        prompt: Prompt
        if body.prompt is not None:
            prompt = Text(body.prompt, special=body.add_special_tokens is not False)
        else:
            prompt = conversation.prompt_of(body, engine.info)
        tokens = await engine.ask(Tokenize(prompt))
        assert engine.info is not None
        return protocol.Tokens(tokens=tokens, count=len(tokens), max_model_len=engine.info.context_length)

    async def count_tokens(self, body: protocol.ChatRequest) -> int:
        """Tokens of the prompt that a conversation has."""
        engine = await self.models.engine(self.models.resolve(body.model))
        return len(await engine.ask(Tokenize(conversation.prompt_of(body, engine.info))))

    async def context_length(self, model: str | None) -> int:
        """Most tokens of prompt and answer together."""
        engine = await self.models.engine(self.models.resolve(model))
        assert engine.info is not None
        return engine.info.context_length

    async def detokenize(self, body: protocol.DetokenizeRequest) -> protocol.Text:
        """Text of tokens."""
        engine = await self.models.engine(self.models.resolve(body.model, None))
        return protocol.Text(prompt=await engine.ask(Detokenize(body.tokens)))

    def list_models(self) -> protocol.ModelList:
        """The models on offer."""
        names = list(self.models.engines)
        return protocol.ModelList(data=[self.model(name) for name in names], first_id=names[0], last_id=names[-1])

    def model(self, model_id: str) -> protocol.Model:
        """One of the models on offer."""
        return self.facts.describe(self.models.resolve(model_id, None))


def _refuse_unavailable(body: protocol.RequestObject) -> None:
    for name, reason in UNAVAILABLE.items():
        if getattr(body, name, None):
            raise APIError(f"{name} is not available: {reason}", name, "unsupported_parameter")


def _one_prompt(prompt: str | list[int] | list[str] | list[list[int]]) -> Text | Tokens:
    """The prompt of a completion, text or tokens, alone or as a list's only entry."""
    only = prompt[0] if isinstance(prompt, list) and len(prompt) == 1 else prompt
    if isinstance(only, str):
        return Text(only)
    ids = [only] if isinstance(only, int) else [each for each in only if isinstance(each, int)]
    if not isinstance(only, int) and len(ids) != len(only):
        raise APIError(f"one prompt a request, found {len(only)}", "prompt")
    return Tokens(ids)


def sampling(body: protocol.SamplingRequest, limit: int | None) -> Params:
    """The sampling parameters that a request sets; one without a seed gets a random one."""
    return Params(
        **body.model_dump(include=SAME_FIELDS),
        max_new_tokens=limit,
        temperature=0.0 if body.temperature is not None and body.temperature < COLDEST else body.temperature,
        top_k=None if body.top_k is None else max(body.top_k, 0),
        seed=secrets.randbits(32) if body.seed is None else body.seed % SEED_RANGE,
        stop=(body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ()),
        ignore_eos=bool(body.ignore_eos),
        min_new_tokens=body.min_tokens or 0,
        stop_tokens=tuple(body.stop_token_ids or ()),
    )
