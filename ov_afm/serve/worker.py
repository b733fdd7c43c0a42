"""The engine's process: takes requests from the server and answers with what each step of the engine produced.

It is a process of its own because native code may crash: everything that openvino-genai does for the server happens
here. Five threads share the work. One reads the pipe, so that a cancellation is known at once; one renders and
tokenizes prompts; one has new grammars checked; one tells the server that the process is alive; the main one runs the
engine.
"""

from __future__ import annotations

import logging
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import NamedTuple

from ..errors import EngineLost, GenerationError, OVAFMError, last_line
from ..system.child_process import Channel
from . import messages
from .batching import Job
from .encoder_worker import EncoderWorker
from .errors import APIError
from .grammar import CALL_END
from .grammar_check import GrammarChecks
from .liveness import BEAT_S
from .prompts import Prompter
from .sequential import open_engine

__all__ = ["run"]

logger = logging.getLogger(__name__)

TOO_LONG = "context_length_exceeded"
# Stop strings cut no call in two.
WHOLE_CALL = ("<tool_call>", CALL_END)

Send = Callable[[Sequence[messages.FromEngine]], None]


class Drop(NamedTuple):
    """The engine must give a request up; `last` when no part of the request can follow."""

    id: int
    last: bool


class Worker:
    """An engine and the requests that it has.

    Args:
        spec: What to load.
        send: Takes messages for the server.
    """

    def __init__(self, spec: messages.EngineSpec, send: Send) -> None:
        self._send = send
        self._engine = open_engine(spec)
        self._session = session = self._engine.session
        self._prompter = Prompter(session.tokenizer, session.template, session.model.path)
        self._grammars = GrammarChecks(session.model.path, session.tokenizer, session.model.geometry.vocab)
        self._to_prepare: queue.SimpleQueue[messages.ToEngine] = queue.SimpleQueue()
        # Requests whose grammar is new, and all cancellations on their way from the first queue to the last.
        self._to_compile: queue.SimpleQueue[tuple[Job, messages.Generate] | Drop] = queue.SimpleQueue()
        self._to_run: queue.SimpleQueue[Job | Drop] = queue.SimpleQueue()
        self._cancelled: set[int] = set()
        # When each thread began what it is doing.
        self._begun: dict[str, float] = {}

    @property
    def info(self) -> messages.ModelInfo:
        """The loaded model."""
        session, template = self._session, self._session.template
        info = messages.ModelInfo(session.device_label, session.context_length, template_knows_tools=False)
        if template is not None:
            info = replace(
                info,
                template_knows_tools=template.knows_tools,
                template_knows_calls=template.knows_calls,
                template_variables=template.variables,
            )
        return replace(info, reasoning=self._prompter.reasoning)

    def receive(self, message: messages.ToEngine) -> None:
        """Take one message of the server; returns at once."""
        if isinstance(message, messages.Cancel):
            self._cancelled.add(message.id)
            self._to_run.put(Drop(message.id, last=False))
        # A cancellation follows its request through the queues too, because that may still be in the first.
        self._to_prepare.put(message)

    def prepare_forever(self) -> None:
        """Render, tokenize and check requests as they come."""
        while True:
            self._begun.pop("preparation", None)
            message = self._to_prepare.get()
            self._begun["preparation"] = time.monotonic()
            try:
                if isinstance(message, messages.Cancel):
                    self._to_compile.put(Drop(message.id, last=True))
                elif message.id not in self._cancelled:
                    self._begin(message)
            except OVAFMError as error:
                self._send([messages.Failure(message.id, error)])
            except Exception:
                # A bug that one request meets must not end the thread that all others need.
                logger.exception("request %s could not be prepared", message.id)
                self._send([messages.Failure(message.id, EngineLost("the request could not be prepared"))])

    def compile_forever(self) -> None:
        """Prepare new grammars, which may take long, while other requests pass."""
        while True:
            item = self._to_compile.get()
            if isinstance(item, Drop):
                self._to_run.put(item)
                continue
            job, task = item
            try:
                if job.id not in self._cancelled:
                    self._hand_over(job, task)
            except OVAFMError as error:
                self._send([messages.Failure(job.id, error)])
            except Exception:
                logger.exception("the grammar of request %s could not be prepared", job.id)
                self._send([messages.Failure(job.id, EngineLost("the grammar could not be prepared"))])

    def run_forever(self) -> None:
        """Step the engine while there is something to generate."""
        while True:
            self._grammars.tidy()
            self._take(wait=not self._engine.busy)
            if self._engine.busy:
                self._begun["step"] = time.monotonic()
                pieces = self._engine.step()
                self._begun.pop("step")
                self._send([*pieces, messages.CacheUsage(self._engine.cache_usage())])

    def beat_forever(self) -> None:
        """Tell the server that this process is alive, and how long its threads have been at what they do."""
        while True:
            time.sleep(BEAT_S)
            now = time.monotonic()
            self._send([messages.Alive(max((now - begun for begun in list(self._begun.values())), default=0.0))])

    def _take(self, *, wait: bool) -> None:
        """Start and cancel what the other threads handed over; with `wait`, wait for the first of it."""
        while True:
            try:
                item = self._to_run.get(block=wait)
            except queue.Empty:
                return
            wait = False
            if isinstance(item, Drop):
                self._engine.cancel(item.id)
                if item.last:
                    self._cancelled.discard(item.id)
            elif item.id not in self._cancelled:
                self._start(item)

    def _start(self, job: Job) -> None:
        try:
            self._engine.add(job)
        except (RuntimeError, TypeError) as error:
            logger.warning("the engine refused a request: %r", str(error))
            self._send([messages.Failure(job.id, EngineLost("the engine refused the request"))])

    def _begin(self, request: messages.Request) -> None:
        """Answer a request, or hand it to the engine's thread."""
        task = request.task
        if isinstance(task, messages.Generate):
            job = self._prepare(request.id, task)
            task = self._after_thoughts(job, task)
            if task.output_format is None or self._grammars.is_ready(task.output_format):
                self._hand_over(job, task)
            else:
                self._to_compile.put((job, task))
        elif isinstance(task, messages.Tokenize):
            self._send([messages.Result(request.id, self._tokens(task.prompt))])
        elif isinstance(task, messages.Detokenize):
            text = self._session.tokenizer.decode(list(task.tokens), skip_special_tokens=False)
            self._send([messages.Result(request.id, text)])
        else:
            raise APIError("this model writes text; it makes no embeddings and scores no documents", "model")

    def _after_thoughts(self, job: Job, task: messages.Generate) -> messages.Generate:
        """The task with a format that lets the model think first."""
        tags, output_format = self._prompter.reasoning, task.output_format
        if tags is None or output_format is None or isinstance(output_format, messages.AfterThoughts):
            return task
        if not isinstance(task.prompt, messages.Chat):
            return task
        thinking = self._prompter.thinks(task.prompt, job.tokens)
        return replace(task, output_format=messages.AfterThoughts(output_format, *tags, thinking))

    def _hand_over(self, job: Job, task: messages.Generate) -> None:
        if task.output_format is not None:
            job.config.structured_output_config = self._grammars.prepare(task.output_format)
        try:
            job.config.validate()
        except RuntimeError as error:
            raise APIError(last_line(error)) from error
        thinking = self._prompter.thinks(task.prompt, job.tokens)
        self._send([messages.PromptTokens(job.id, len(job.tokens), thinking)])
        self._to_run.put(job)

    def _tokens(self, prompt: messages.Prompt) -> list[int]:
        if isinstance(prompt, messages.Chat):
            return self._prompter.chat(
                prompt.messages,
                prompt.tools,
                prompt.template_options,
                open_turn=prompt.open_turn,
                continues=prompt.continues,
            )
        if isinstance(prompt, messages.Text):
            return self._prompter.text(prompt.text, special=prompt.special)
        largest, vocab = max(prompt.ids, default=0), self._session.model.geometry.vocab
        if largest >= vocab:
            raise APIError(f"token {largest} is not in the vocabulary of {vocab}", "prompt")
        return list(prompt.ids)

    def _prepare(self, request_id: int, task: messages.Generate) -> Job:
        tokens = self._tokens(task.prompt)
        self._check(task, tokens)
        config = self._session.generation_config(task.params, prompt_tokens=len(tokens))
        config.logprobs = int(task.logprobs)
        whole = WHOLE_CALL if isinstance(task.output_format, messages.FunctionCalls) else None
        return Job(request_id, tokens, config, self._session.assembler(task.params.stop, whole), task.logprobs)

    def _check(self, task: messages.Generate, tokens: Sequence[int]) -> None:
        """Refuse what the engine cannot do."""
        session = self._session
        try:
            session.check_prompt_length(len(tokens))
        except GenerationError as error:
            param = "messages" if isinstance(task.prompt, messages.Chat) else "prompt"
            message, held = str(error), session.cache_tokens or session.model.context_length
            if tokens and held < session.model.context_length:
                message += f"; the KV cache holds {held}, more with a larger --cache-size-gb"
            raise APIError(message, param, TOO_LONG if tokens else None) from error
        if task.logprobs and not self._engine.logprobs:
            message = f"logprobs are not available on {session.device_label}; leave them out"
            raise APIError(message, "logprobs", "unsupported_parameter")


def run(channel: Channel, spec: messages.EngineSpec) -> None:
    """Load a model and serve the pipe until it closes; see `child_process.WorkerProcess`."""
    logging.basicConfig(level=logging.WARNING, format="engine: %(levelname)s: %(message)s", stream=sys.stderr)

    def send(batch: Sequence[object]) -> None:
        try:
            channel.send(batch)
        except OSError:
            os._exit(0)

    ready: Future[Worker | EncoderWorker] = Future()
    threading.Thread(target=_read, args=(channel, ready), daemon=True).start()
    try:
        worker = EncoderWorker(spec, send) if spec.text_encoder else Worker(spec, send)
    except OVAFMError as error:
        send([messages.Unusable(str(error))])
        return
    send([worker.info])
    ready.set_result(worker)
    compiling = (worker.compile_forever,) if isinstance(worker, Worker) else ()
    for work in (worker.prepare_forever, *compiling, worker.beat_forever):
        threading.Thread(target=work, daemon=True).start()
    worker.run_forever()


def _read(channel: Channel, ready: Future[Worker | EncoderWorker]) -> None:
    for message in channel:
        ready.result().receive(message)
    # The server closed the pipe or died. Native libraries may hang while they are unloaded.
    os._exit(0)
