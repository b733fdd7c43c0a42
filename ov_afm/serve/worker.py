"""The engine's process: reads requests as JSON lines, answers with what each step produced.

It is a process of its own so that native code may die here without the server: everything that
openvino-genai does is done in this one. Three threads share the work: one reads the pipe and so
hears of cancelled requests at once, one renders and tokenizes prompts and checks grammars, and the
main one runs the engine. The process ends when the server's end of the pipe closes.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import IO, Any, NamedTuple

from ..errors import ConfigError, GenerationError, OVAFMError, last_line
from ..runtime.sampling import Params
from .batching import EngineSpec, Job
from .grammar import GrammarCheck, structured_output
from .prompts import Prompter
from .sequential import open_engine

__all__ = ["Worker", "main"]

logger = logging.getLogger(__name__)

Message = dict[str, Any]
IDLE_POLL_S = 0.5


class Refused(GenerationError):
    """A request that the engine will not run: the client's to mend."""

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param, self.code = param, code


class Cancel(NamedTuple):
    """A request that nobody waits for any more; `last` when no part of it can follow."""

    id: int
    last: bool


class Worker:
    """An engine and the requests that it is asked for.

    Args:
        spec: What to load.
        send: Takes a list of messages for the server.
    """

    def __init__(self, spec: EngineSpec, send: Callable[[list[Message]], None]) -> None:
        self._send = send
        self._model_dir = Path(spec.model_dir)
        self._batch = open_engine(spec)
        self._prompter = Prompter(self._batch.tokenizer, self._model_dir)
        self._grammar = GrammarCheck(self._batch.tokenizer, self._batch.vocab)
        # The first use creates the compiler that the engine's own thread shares.
        self._grammar.check(structured_output({"json_schema": '{"type": "object"}'}))
        self._to_prepare: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._to_run: queue.SimpleQueue[Job | Cancel] = queue.SimpleQueue()
        self._cancelled: set[int] = set()
        self._default_config()

    def info(self) -> Message:
        """What the server must know of the loaded model."""
        return {
            "device": self._batch.device,
            "context_length": self._batch.context_length,
            "cache_tokens": self._batch.cache_tokens,
            "template_knows_tools": self._prompter.template_knows_tools,
        }

    def receive(self, message: Message) -> None:
        """Take one message of the server; returns at once."""
        if message["op"] == "cancel":
            self._cancelled.add(message["id"])
            self._to_run.put(Cancel(message["id"], last=False))
        # A cancellation follows its request through both queues too, in case that was still being prepared.
        self._to_prepare.put(message)

    def prepare_forever(self) -> None:
        """Render, tokenize and check requests as they come."""
        while True:
            message = self._to_prepare.get()
            try:
                if message["op"] == "cancel":
                    self._to_run.put(Cancel(message["id"], last=True))
                elif message["id"] in self._cancelled:
                    continue
                elif message["op"] == "generate":
                    self._to_run.put(self._prepare(message))
                else:
                    self._send([{"id": message["id"], "result": self._convert(message)}])
            except (Refused, ConfigError, GenerationError) as error:
                refused = {"message": str(error), "param": getattr(error, "param", None)}
                self._send([{"id": message["id"], "refused": refused | {"code": getattr(error, "code", None)}}])
            except Exception:
                # A fault of one request must not end the thread that all others need.
                logger.exception("request %s could not be prepared", message["id"])
                self._send([{"id": message["id"], "failed": "the request could not be prepared"}])

    def run_forever(self) -> None:
        """Step the engine while there is something to generate."""
        while True:
            self._take(wait=not self._batch.busy)
            if self._batch.busy:
                events: list[Message] = list(self._batch.step())
                events.append({"cache": self._batch.cache_usage()})
                self._send(events)

    def _take(self, *, wait: bool) -> None:
        """Start and cancel what the other threads handed over."""
        while True:
            try:
                item = self._to_run.get(timeout=IDLE_POLL_S if wait else None, block=wait)
            except queue.Empty:
                return
            wait = False
            if isinstance(item, Cancel):
                self._batch.cancel(item.id)
                if item.last:
                    self._cancelled.discard(item.id)
            elif item.id not in self._cancelled:
                self._start(item)

    def _start(self, job: Job) -> None:
        try:
            self._batch.add(job)
        except (RuntimeError, TypeError) as error:
            logger.warning("the engine refused a request: %r", str(error))
            self._send([{"id": job.id, "failed": "the engine refused the request"}])

    def _convert(self, message: Message) -> Message:
        if message["op"] == "detokenize":
            return {"prompt": self._batch.tokenizer.decode(message["tokens"], skip_special_tokens=False)}
        tokens = self._tokens(message)
        return {"tokens": tokens, "count": len(tokens), "max_model_len": self._batch.context_length}

    def _tokens(self, message: Message) -> list[int]:
        if "tokens" in message:
            tokens = list(message["tokens"])
            if tokens and max(tokens) >= self._batch.vocab:
                raise Refused(f"token {max(tokens)} is not in the vocabulary of {self._batch.vocab}", param="prompt")
            return tokens
        if "messages" in message:
            return self._prompter.chat(message["messages"], message.get("tools"), message.get("template_options"))
        return self._prompter.text(message["prompt"], special=message.get("special", True))

    def _prepare(self, message: Message) -> Job:
        tokens = self._tokens(message)
        param = "messages" if "messages" in message else "prompt"
        limit = self._batch.context_length
        if not tokens:
            raise Refused("the prompt has 0 tokens; give it some text", param=param)
        if len(tokens) >= limit:
            raise Refused(
                f"the prompt has {len(tokens)} tokens and the context is {limit} tokens; shorten it",
                param=param,
                code="context_length_exceeded",
            )
        if len(tokens) > self._batch.max_prompt_tokens:
            longest = self._batch.max_prompt_tokens
            raise Refused(
                f"the prompt has {len(tokens)} tokens and {self._batch.device} takes up to {longest}; shorten it",
                param=param,
                code="context_length_exceeded",
            )
        if message.get("logprobs") and not self._batch.logprobs:
            raise Refused(
                f"logprobs are not available on {self._batch.device}; leave them out",
                param="logprobs",
                code="unsupported_parameter",
            )
        fields = dict(message["params"])
        wanted = fields.get("max_new_tokens")
        if wanted is not None and wanted > limit:
            raise Refused(
                f"max_tokens is {wanted} and the context is {limit} tokens; ask for fewer",
                param="max_tokens",
                code="context_length_exceeded",
            )
        params = Params(**{**fields, "stop": tuple(fields.get("stop", ()))})
        config = params.apply(self._default_config(), room=limit - len(tokens))
        config.logprobs = 1 if message.get("logprobs") else 0
        stop = tuple(sorted({*params.stop, *config.stop_strings}))
        # Matched by the assembler, which never shows a beginning of one.
        config.stop_strings = set()
        if form := message.get("form"):
            wanted_form = structured_output(form)
            self._grammar.check(wanted_form)
            config.structured_output_config = wanted_form
        try:
            config.validate()
        except RuntimeError as error:
            raise Refused(last_line(error)) from error
        self._send([{"id": message["id"], "prompt_tokens": len(tokens)}])
        return Job(message["id"], tokens, config, self._batch.assembler(stop), bool(message.get("logprobs")))

    def _default_config(self) -> Any:
        import openvino_genai

        path = self._model_dir / "generation_config.json"
        config = openvino_genai.GenerationConfig(path) if path.exists() else openvino_genai.GenerationConfig()
        if not config.stop_token_ids:
            config.set_eos_token_id(self._batch.tokenizer.get_eos_token_id())
        return config


def main() -> None:
    """Serve the pipe until it closes."""
    logging.basicConfig(level=logging.WARNING, format="engine: %(levelname)s: %(message)s", stream=sys.stderr)
    # The pipes stay ours: native code that writes to descriptor 1 writes to the log, and a process forked from
    # here (telemetry does) closes a `sys.stdin` that no thread is reading.
    requests, channel = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    with Path(os.devnull).open("rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    spec = EngineSpec(**json.loads(requests.readline()))
    lock = threading.Lock()

    def send(messages: list[Message]) -> None:
        with lock:
            _write(channel, messages)

    ready: Future[Worker] = Future()
    threading.Thread(target=_read, args=(requests, ready), daemon=True).start()
    try:
        worker = Worker(spec, send)
    except OVAFMError as error:
        send([{"unusable": str(error)}])
        os._exit(1)
    send([{"ready": worker.info()}])
    ready.set_result(worker)
    threading.Thread(target=worker.prepare_forever, daemon=True).start()
    worker.run_forever()


def _read(requests: IO[bytes], ready: Future[Worker]) -> None:
    for line in requests:
        ready.result().receive(json.loads(line))
    # The server has gone or wants us gone; native libraries may hang while they are unloaded.
    os._exit(0)


def _write(channel: IO[str], messages: list[Message]) -> None:
    try:
        channel.write(json.dumps(messages) + "\n")
        channel.flush()
    except BrokenPipeError:
        os._exit(0)


if __name__ == "__main__":
    main()
