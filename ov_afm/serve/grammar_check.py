"""New grammars are tried in a process of their own, so that one that takes for ever stops nobody.

A grammar comes from a client, and a short one can take minutes to compile. `GrammarChecks` hands each new one to a
child that has the tokenizer and a model without weights, and ends the child when it has used more processor time than
a grammar may. Only then is the grammar compiled where the engine needs it, in a thread that no other request waits
for, in about the time that it took in the child. What was found about a grammar is remembered, for a bounded number
of them.
"""

from __future__ import annotations

import collections
import contextlib
import hashlib
import itertools
import json
import logging
import os
import queue
import threading
import time
from pathlib import Path
from typing import Any

from ..errors import ConfigError, EngineLost, OVAFMError
from ..system.child_process import Channel, WorkerProcess
from .errors import APIError
from .grammar import structured_output
from .grammar_compiler import Compiler
from .messages import AfterThoughts, FunctionCalls, OutputFormat

__all__ = ["GrammarChecks"]

logger = logging.getLogger(__name__)

# Processor time of a new grammar. The compiler has several threads: two processors take half of it.
LIMIT_CPU_S = 8.0
# Whatever the processors are busy with.
LIMIT_S = 60.0
START_S = 120.0
LOOK_S = 0.05
# Grammars about which it is remembered whether they are usable.
MAX_REMEMBERED = 1024
# Compiled grammars that are kept; with 128,000 tokens one takes one to four megabytes.
MAX_COMPILED = 64
READY = "ready"


class GrammarChecks:
    """Decides which grammars the engine gets, and prepares them.

    Args:
        model_dir: The model directory.
        tokenizer: The engine's tokenizer.
        vocab: Logits that the engine's model gives for a token.
    """

    def __init__(self, model_dir: Path, tokenizer: Any, vocab: int) -> None:
        self._model_dir, self._vocab = model_dir, vocab
        self._child = _Child(model_dir, vocab)
        self._compiler = Compiler(tokenizer, vocab)
        # What is wrong with a grammar; None if nothing.
        self._known: collections.OrderedDict[bytes, OVAFMError | None] = collections.OrderedDict()
        self._compiled: set[bytes] = set()
        # The engine's thread must not empty the cache while a grammar is compiled.
        self._lock = threading.Lock()

    def is_ready(self, output_format: OutputFormat) -> bool:
        """Whether the engine can use a grammar at once."""
        return _key(output_format) in self._compiled

    def prepare(self, output_format: OutputFormat) -> Any:
        """Check a grammar and compile it for the engine; takes as long as that takes.

        Returns:
            GenAI's configuration.

        Raises:
            ConfigError: The grammar cannot be enforced, or takes too long.
        """
        key, config = _key(output_format), structured_output(output_format)
        if key not in self._known:
            self._remember(key, self._child.ask(output_format))
        self._known.move_to_end(key)
        if (error := self._known[key]) is not None:
            raise error
        with self._lock:
            if key not in self._compiled:
                self._compiler.compile(config)
                self._compiled.add(key)
        return config

    def tidy(self) -> None:
        """Give compiled grammars back when there are many; for the thread that runs the engine, between two steps."""
        if len(self._compiled) < MAX_COMPILED or not self._lock.acquire(blocking=False):
            return
        try:
            self._compiler.forget()
            self._compiled.clear()
        finally:
            self._lock.release()

    def _remember(self, key: bytes, error: OVAFMError | None) -> None:
        if isinstance(error, EngineLost):
            raise error
        self._known[key] = error
        while len(self._known) > MAX_REMEMBERED:
            self._known.popitem(last=False)


def _key(output_format: OutputFormat) -> bytes:
    return hashlib.blake2b(repr(output_format).encode()).digest()


class _Child:
    """The process that tries grammars, started again when it has died."""

    def __init__(self, model_dir: Path, vocab: int) -> None:
        self._arguments = (str(model_dir), vocab)
        self._asked = 0
        self._start()

    def _start(self) -> None:
        answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._answers = answers
        self._process = WorkerProcess(
            _work, *self._arguments, on_message=answers.put, on_exit=lambda end: answers.put(RuntimeError(str(end)))
        )
        self._ready = False

    def ask(self, output_format: OutputFormat) -> OVAFMError | None:
        """What is wrong with a grammar; None if nothing."""
        if not self._ready and self._wait(START_S, None) != READY:
            self._process.kill()
            self._start()
            return EngineLost("the process that checks schemas did not start; try again shortly")
        self._ready = True
        self._process.send(output_format)
        answer = self._wait(LIMIT_S, LIMIT_CPU_S)
        inner = output_format.format if isinstance(output_format, AfterThoughts) else output_format
        param = "tools" if isinstance(inner, FunctionCalls) else "response_format"
        if isinstance(answer, list):
            error: ConfigError | None = answer[0]
            return None if error is None else APIError(str(error), param, error.code.replace("-", "_"))
        self._process.kill()
        self._start()
        if answer is None:
            found = f"the grammar took more than {LIMIT_CPU_S:g} s of processor time to prepare"
            advice = f"leave repetitions ({_costly(inner)}) out or make them shorter"
            return APIError(f"{found}; {advice}", param, "grammar_too_slow")
        return APIError(
            f"the grammar cannot be prepared: the process that tried it {answer}", param, "grammar_unusable"
        )

    def _wait(self, limit_s: float, limit_cpu_s: float | None) -> Any:
        """The child's next message, how it ended, or None if it used more time than it may."""
        import psutil

        deadline, used_s = time.monotonic() + limit_s, 0.0
        process, begun = None, 0.0
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(self._process.pid)
            begun = sum(process.cpu_times()[:2])
        while time.monotonic() < deadline and (limit_cpu_s is None or used_s < limit_cpu_s):
            with contextlib.suppress(queue.Empty):
                return self._answers.get(timeout=LOOK_S)
            if process is not None:
                with contextlib.suppress(psutil.Error):
                    used_s = sum(process.cpu_times()[:2]) - begun
        return None


def _costly(output_format: OutputFormat) -> str:
    """The keywords of a request's schemas that make grammars large, as far as it has them."""
    text = repr(output_format)
    if isinstance(output_format, FunctionCalls):
        text = json.dumps([function.parameters for function in output_format.functions])
    names = ("pattern", "maxLength", "minLength", "maxItems", "minItems", "maxProperties", "properties")
    return ", ".join(name for name in names if f'"{name}"' in text) or "such as {1,100}"


def _work(channel: Channel, model_dir: str, vocab: int) -> None:
    """Try grammars until the pipe closes; see `child_process.WorkerProcess`."""
    import openvino_genai

    compiler = Compiler(openvino_genai.Tokenizer(model_dir), vocab)
    compiler.compile(openvino_genai.StructuredOutputConfig(grammar='root ::= "a"'))
    channel.send(READY)
    # The main thread computes; this one notices that the engine has gone.
    waiting: queue.SimpleQueue[Any] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(channel, waiting), daemon=True).start()
    for count in itertools.count(1):
        output_format = waiting.get()
        error: OVAFMError | None = None
        try:
            compiler.try_out(structured_output(output_format))
        except ConfigError as refusal:
            error = refusal
        channel.send([error])
        if count % MAX_COMPILED == 0:
            compiler.forget()


def _read(channel: Channel, waiting: queue.SimpleQueue[Any]) -> None:
    for message in channel:
        waiting.put(message)
    os._exit(0)
