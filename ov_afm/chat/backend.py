"""What a chat talks to: a model in this process, in a child process, or behind a URL; all have one interface."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from ..pipeline import Message, Pipeline
from ..runtime.metrics import RequestMetrics
from ..runtime.sampling import DEFAULT_MAX_NEW_TOKENS, Params

__all__ = ["EMULATED", "Backend", "Info", "Local", "Step", "figures_of", "fit", "prompt_limit"]

# The emulated NPU in a list of devices.
EMULATED = "NPU-EMULATED – the NPU's software path on the CPU, to try its limits"
# Room for the answer: its longest length, but at most this part of the context.
ANSWER_SHARE = 4


@dataclass(frozen=True, slots=True)
class Info:
    """What answers.

    Attributes:
        model: The model's name.
        device: The device's name for people, which says when it is emulated.
        precision: Name of the recipe; `unknown` where nobody recorded it.
        context_length: Tokens that prompt and answer may have together; None where that is not known.
        note: How the device was chosen.
    """

    model: str
    device: str
    precision: str
    context_length: int | None
    note: str = ""


@dataclass(frozen=True, slots=True)
class Step:
    """A piece of an answer, or a report on its progress.

    Attributes:
        text: New text.
        tokens: Tokens so far.
        ahead: Requests that are answered before this one; None once it runs.
        dropped: Oldest messages that were left out because the context is full.
        finish_reason: Why the answer is over; None in all steps but the last.
        metrics: What the request measured; only in the last step.
    """

    text: str = ""
    tokens: int = 0
    ahead: int | None = None
    dropped: int = 0
    finish_reason: str | None = None
    metrics: RequestMetrics | None = None


class Backend(Protocol):
    """Answers conversations."""

    @property
    def info(self) -> Info:
        """What answers."""

    def answer(self, messages: Sequence[Message], params: Params, cancel: threading.Event) -> Iterator[Step]:
        """Answer a conversation; the oldest turns are left out where the context cannot hold them.

        Closing the iterator or setting `cancel` ends the answer within one token.

        Raises:
            OVAFMError: The conversation cannot be answered.
        """

    def close(self) -> None:
        """Free the model, or close the connection."""


def fit(
    messages: Sequence[Message], count: Callable[[Sequence[Message]], int], limit: int
) -> tuple[list[Message], int]:
    """Leave out the oldest turns until a conversation fits; the system prompt and the last question always stay.

    Args:
        messages: The conversation.
        count: Tokens of a conversation.
        limit: Most tokens.

    Returns:
        What is left, and how many messages were left out.
    """
    head = list(messages[:1]) if messages and messages[0]["role"] == "system" else []
    turns = list(messages[len(head) :])
    dropped = 0
    while count([*head, *turns]) > limit:
        # A question goes together with its answer.
        following = next((index for index in range(1, len(turns)) if turns[index]["role"] == "user"), None)
        if following is None:
            break
        turns, dropped = turns[following:], dropped + following
    return [*head, *turns], dropped


def prompt_limit(context_length: int, params: Params) -> int:
    """Most tokens of a prompt that leave room for its answer."""
    longest = DEFAULT_MAX_NEW_TOKENS if params.max_new_tokens is None else params.max_new_tokens
    return context_length - min(longest, context_length // ANSWER_SHARE)


class Local:
    """A model loaded in this process.

    Args:
        pipeline: The model; closed with this.
    """

    def __init__(self, pipeline: Pipeline) -> None:
        self.pipeline = pipeline
        recipe = pipeline.manifest.recipe.get("name") if pipeline.manifest else None
        self.info = Info(
            model=pipeline.model_dir.resolve().name,
            device="emulated NPU" if pipeline.emulated else pipeline.device,
            precision=str(recipe or "unknown"),
            context_length=pipeline.context_length,
            note=pipeline.device_note,
        )

    def answer(self, messages: Sequence[Message], params: Params, cancel: threading.Event) -> Iterator[Step]:
        """See `Backend`."""
        pipeline = self.pipeline
        limit = min(pipeline.max_prompt_tokens, prompt_limit(pipeline.context_length, params))
        kept, dropped = fit(messages, pipeline.count_tokens, limit)
        for delta in pipeline.stream(kept, params, cancel=cancel):
            yield Step(
                delta.text, delta.tokens, dropped=dropped, finish_reason=delta.finish_reason, metrics=delta.metrics
            )

    def close(self) -> None:
        """Free the model."""
        self.pipeline.close()


def figures_of(step: Step, info: Info) -> Mapping[str, Any]:
    """What is kept of the last step of an answer, as JSON values."""
    assert step.metrics is not None
    return {
        **asdict(step.metrics),
        "tokens_per_s": step.metrics.tokens_per_s,
        "finish_reason": step.finish_reason,
        "dropped": step.dropped,
        "model": info.model,
        "device": info.device,
        "precision": info.precision,
        "context_length": info.context_length,
    }
