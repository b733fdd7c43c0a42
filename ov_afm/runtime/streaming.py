"""The state of one request, shared by the engine's thread and the consumer of the answer."""

from __future__ import annotations

import queue
import threading
import time
from dataclasses import dataclass
from typing import Any, Literal

from .detokenize import TextAssembler
from .drafting import Drafting
from .metrics import RequestMetrics

__all__ = ["Completion", "Delta", "FinishReason", "Request", "streamer"]

FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True, slots=True)
class Delta:
    """A piece of an answer.

    Attributes:
        text: New text, whole characters; may be empty in the last delta.
        tokens: Tokens generated so far.
        finish_reason: Why the answer is over; None in all deltas but the last.
        metrics: What the request measured; only in the last delta.
    """

    text: str
    tokens: int
    finish_reason: FinishReason | None = None
    metrics: RequestMetrics | None = None


@dataclass(frozen=True, slots=True)
class Completion:
    """A whole answer.

    Attributes:
        text: The answer, without the stop string or end-of-text token that ended it.
        finish_reason: `stop` (the model or a stop string ended it), `length`, or `cancelled`.
        metrics: What the request measured.
    """

    text: str
    finish_reason: FinishReason
    metrics: RequestMetrics


class Request:
    """What the worker thread and the consumer of one request share.

    With `drafting`, the engine may end the request several times, to continue it with drafts of another length.
    """

    def __init__(
        self,
        inputs: Any,
        prompt_tokens: int,
        config: Any,
        text: TextAssembler,
        cancel: threading.Event,
        drafting: Drafting | None = None,
    ):
        self.inputs, self.prompt_tokens, self.config, self.text = inputs, prompt_tokens, config, text
        self.cancel, self._drafting, self._length_changes = cancel, drafting, False
        self.dropped = threading.Event()
        self.start = 0.0
        self.first: float | None = None
        self.last: float | None = None
        self.new_tokens = 0
        # Deltas; at the end None, or the exception that ended the worker.
        self.events: queue.SimpleQueue[Delta | BaseException | None] = queue.SimpleQueue()
        self.reason: FinishReason = "length"

    @property
    def unwanted(self) -> bool:
        """Whether nobody waits for more tokens."""
        # After the main thread has ended nobody can consume; the interpreter waits for this thread.
        return self.cancel.is_set() or self.dropped.is_set() or not threading.main_thread().is_alive()

    def take(self, token: int) -> bool:
        """Note one generated token; False when generation should stop."""
        self.last = time.perf_counter()
        self.first = self.last if self.first is None else self.first
        self.new_tokens += 1
        text = self.text.push(token)
        if text:
            self.events.put(Delta(text, self.new_tokens))
        if self._drafting is not None:
            ended = token in self.config.stop_token_ids and not self.config.ignore_eos
            self._length_changes = (self._drafting.push(token) or self._length_changes) and not ended
        return not self.text.stopped

    @property
    def redrafts(self) -> bool:
        """Whether the request is to be continued with drafts of another length."""
        return self._length_changes and not self.text.stopped and not self.unwanted

    def redraft(self) -> None:
        """Make inputs and configuration those of the rest of the request."""
        import numpy as np
        import openvino
        import openvino_genai

        drafting, config = self._drafting, self.config
        assert drafting is not None
        ids = np.array([drafting.ids], np.int64)
        self.inputs = openvino_genai.TokenizedInputs(openvino.Tensor(ids), openvino.Tensor(np.ones_like(ids)))
        config.num_assistant_tokens = drafting.length
        config.min_new_tokens = max(0, config.min_new_tokens - (config.max_new_tokens - drafting.left))
        config.max_new_tokens = drafting.left
        config.rng_seed += 1
        self._length_changes = False

    def metrics(self) -> RequestMetrics:
        """What was measured so far."""
        return RequestMetrics.from_times(
            self.prompt_tokens,
            self.new_tokens,
            start=self.start,
            first=self.first,
            last=self.last,
            end=time.perf_counter(),
        )


def streamer(request: Request, closed: threading.Event) -> Any:
    """GenAI's streamer for a request; a local class, because its base class comes with the heavy import."""
    import openvino_genai

    status = openvino_genai.StreamingStatus

    class Streamer(openvino_genai.StreamerBase):  # type: ignore[misc]
        failure: Exception | None = None

        def write(self, token: int | list[int]) -> Any:
            try:
                for each in [token] if isinstance(token, int) else token:
                    if request.unwanted or closed.is_set():
                        return status.CANCEL
                    if not request.take(each):
                        return status.STOP
                if request.redrafts:
                    return status.STOP
            except Exception as error:  # noqa: BLE001 - an exception must not cross the engine's frames
                self.failure = error
                return status.CANCEL
            return status.RUNNING

        def end(self) -> None:
            pass

    return Streamer()
