"""What a model for embeddings or reranking does in an engine's process; to `worker.run` it looks like a `Worker`.

One thread counts tokens and refuses what is too long, one computes. A step computes one batch: of the request whose
turn it is, and of others as far as they fit beside it. So many short requests are one batch, and a long one lets the
others through.
"""

from __future__ import annotations

import collections
import logging
import queue
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import EngineLost, GenerationError, OVAFMError, last_line
from ..runtime import text_encoding
from ..runtime.text_encoding import BATCH_TEXTS, BATCH_TOKENS, Counted, LoadedEncoder
from . import messages
from .errors import APIError
from .liveness import BEAT_S

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["EncoderWorker"]

logger = logging.getLogger(__name__)
Send = Callable[[Sequence[messages.FromEngine]], None]


class Work:
    """A request and what has been computed of it.

    Args:
        id: The request.
        task: What it asks for.
        texts: Its texts, with their lengths.
        columns: Numbers of each text.
    """

    def __init__(self, id: int, task: messages.Embed | messages.Rerank, texts: Counted, columns: int) -> None:
        import numpy as np

        self.id, self.task, self.texts = id, task, texts
        self.batches = collections.deque(texts.batches())
        self.rows: NDArray[np.float32] = np.zeros((len(texts.texts), columns), np.float32)

    def next_texts(self) -> list[str]:
        """The texts of the next batch."""
        return [self.texts.texts[each] for each in self.batches[0]]

    def longest(self) -> int:
        """Tokens of the longest text of the next batch."""
        return max(self.texts.tokens[each] for each in self.batches[0])

    def take(self, rows: Any) -> None:
        """What the next batch gave."""
        self.rows[self.batches.popleft()] = rows


class EncoderWorker:
    """A model for embeddings or reranking, and the requests that it has.

    Args:
        spec: What to load.
        send: Takes messages for the server.

    Raises:
        OVAFMError: The model or the device cannot be used.
    """

    def __init__(self, spec: messages.EngineSpec, send: Send) -> None:
        assert spec.text_encoder is not None
        self._send, self.facts = send, spec.text_encoder
        properties = dict(spec.ov_config)
        if spec.threads is not None:
            properties.setdefault("INFERENCE_NUM_THREADS", spec.threads)
        self._model: LoadedEncoder = text_encoding.load(spec.model_dir, self.facts, spec.device, properties)
        self._to_prepare: queue.SimpleQueue[messages.Request] = queue.SimpleQueue()
        self._to_run: queue.SimpleQueue[Work] = queue.SimpleQueue()
        self._active: collections.deque[Work] = collections.deque()
        self._cancelled: set[int] = set()
        self._begun: dict[str, float] = {}

    @property
    def info(self) -> messages.ModelInfo:
        """The loaded model."""
        return messages.ModelInfo(self._model.device, self.facts.max_tokens, template_knows_tools=False)

    def receive(self, message: messages.ToEngine) -> None:
        """Take one message of the server; returns at once."""
        if isinstance(message, messages.Cancel):
            self._cancelled.add(message.id)
        else:
            self._to_prepare.put(message)

    def beat_forever(self) -> None:
        """Tell the server that this process is alive, and how long its threads have been at what they do."""
        while True:
            time.sleep(BEAT_S)
            now = time.monotonic()
            self._send([messages.Alive(max((now - begun for begun in list(self._begun.values())), default=0.0))])

    def prepare_forever(self) -> None:
        """Count and check requests as they come."""
        while True:
            request = self._to_prepare.get()
            if request.id in self._cancelled:
                self._cancelled.discard(request.id)
                continue
            self._begun["prompt"] = time.monotonic()
            try:
                self._begin(request)
            except OVAFMError as error:
                self._send([messages.Failure(request.id, error)])
            except Exception:
                # A bug that one request meets must not end the thread that all others need.
                logger.exception("request %s could not be prepared", request.id)
                self._send([messages.Failure(request.id, EngineLost("the request could not be prepared"))])
            self._begun.pop("prompt")

    def run_forever(self) -> None:
        """Compute while there is something to compute."""
        while True:
            while not self._to_run.empty() or not self._active:
                self._active.append(self._to_run.get())
            for work in [work for work in self._active if work.id in self._cancelled]:
                self._active.remove(work)
                self._cancelled.discard(work.id)
            if self._active:
                self._begun["step"] = time.monotonic()
                self._send(self._step())
                self._begun.pop("step")

    def _begin(self, request: messages.Request) -> None:
        task = request.task
        if isinstance(task, (messages.Tokenize, messages.Detokenize)):
            self._send([messages.Result(request.id, self._tokens_or_text(task))])
            return
        if not isinstance(task, (messages.Embed, messages.Rerank)):
            raise APIError(f"this model is for {self.facts.purpose} and writes no text", "model")
        try:
            if isinstance(task, messages.Embed):
                texts = [each if isinstance(each, str) else self._model.text_of(each) for each in task.texts]
                counted = self._model.count_checked([task.prompt + each for each in texts], cut=task.cut)
                work = Work(request.id, task, counted, self.facts.dimensions)
            else:
                counted = self._model.count_checked(task.documents, query=task.query, cut=task.cut)
                work = Work(request.id, task, counted, 1)
        except GenerationError as error:
            param = "input" if isinstance(task, messages.Embed) else "documents"
            raise APIError(str(error), param) from error
        self._to_run.put(work)

    def _tokens_or_text(self, task: messages.Tokenize | messages.Detokenize) -> list[int] | str:
        if isinstance(task, messages.Detokenize):
            return self._model.decode(task.tokens)
        if isinstance(task.prompt, messages.Text):
            return self._model.encode(task.prompt.text, special=task.prompt.special)
        raise APIError(f"this model is for {self.facts.purpose} and knows no conversations; send a prompt", "messages")

    def _step(self) -> list[messages.FromEngine]:
        """Compute a batch; what became complete."""
        first = self._active.popleft()
        together = [first, *self._beside(first)]
        texts = [text for work in together for text in work.next_texts()]
        try:
            if isinstance(first.task, messages.Rerank):
                rows = self._model.score_batch(first.task.query, texts)
            else:
                rows = self._model.embed_batch(texts)
        except (RuntimeError, OVAFMError) as error:
            self._active = collections.deque(work for work in self._active if work not in together)
            logger.warning("a batch could not be computed: %s", last_line(error))
            failure = error if isinstance(error, OVAFMError) else EngineLost("the batch could not be computed")
            return [messages.Failure(work.id, failure) for work in together]
        complete: list[messages.FromEngine] = []
        begin = 0
        for work in together:
            count = len(work.batches[0])
            work.take(rows[begin : begin + count])
            begin += count
            if not work.batches:
                complete.append(messages.Result(work.id, self._result(work)))
            elif work is first:
                self._active.append(work)
        self._active = collections.deque(work for work in self._active if work.batches)
        return complete

    def _beside(self, first: Work) -> list[Work]:
        """Other requests whose next batch fits beside that of the first."""
        if isinstance(first.task, messages.Rerank):
            return []
        chosen, count, longest = [], len(first.batches[0]), first.longest()
        for work in self._active:
            total, most = count + len(work.batches[0]), max(longest, work.longest())
            if total <= BATCH_TEXTS and total * most <= BATCH_TOKENS:
                chosen.append(work)
                count, longest = total, most
        return chosen

    def _result(self, work: Work) -> messages.Encoded:
        return messages.Encoded(work.rows.tobytes(), work.rows.shape[1], sum(work.texts.tokens))
