"""A model in a child process that may die, and the queue of those who wait for it."""

from __future__ import annotations

import contextlib
import itertools
import queue
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from ..errors import DeviceError, EngineLost, OVAFMError
from ..pipeline import Message
from ..runtime.metrics import RequestMetrics
from ..runtime.sampling import Params
from ..system.child_process import Exit, WorkerProcess
from ..system.resources import log_file
from . import worker
from .backend import Info, Step
from .worker import Answered, Ask, Cancel, Choice, Phase

__all__ = ["Choice", "Engine"]

POLL_S = 0.1
# A step at least this often, an empty one if need be: only between steps can the caller end an answer.
STEP_S = 0.5
State = Literal["loading", "ready", "dead", "stopped"]


class Engine:
    """One model's process. Loading begins at once; see `state`.

    Args:
        choice: What to load.

    Attributes:
        choice: What was to be loaded.
        state: `loading`, `ready`, `dead` (see `problem`) or `stopped`.
        problem: Why it is dead.
        info: What answers; recipe and context length only once it is ready.
        loaded_s: Seconds from its start until it was ready.
        pid: Process id.
    """

    def __init__(self, choice: Choice) -> None:
        self.choice = choice
        self.state: State = "loading"
        self.problem = ""
        self.loaded_s = 0.0
        self._phase = Phase("starting", None)
        self._started = self._phase_started = time.monotonic()
        self.info = Info(Path(choice.model_dir).resolve().name, choice.device, "", None)
        self._numbers = itertools.count(1)
        self._answers: dict[int, queue.SimpleQueue[Step | OVAFMError]] = {}
        # Numbers of the requests, the running one first.
        self._queue: list[int] = []
        self._queue_changed = threading.Condition()
        self._log = log_file("chat-engine")
        self._worker = WorkerProcess(
            worker.run, choice, on_message=self._on_message, on_exit=self._on_exit, log=self._log
        )
        self.pid = self._worker.pid

    @property
    def progress(self) -> tuple[str, float, float | None]:
        """The step of loading, its seconds so far and those of last time."""
        return self._phase.name, time.monotonic() - self._phase_started, self._phase.last_s

    def wait(self, timeout_s: float | None = None) -> None:
        """Wait until the model is loaded.

        Raises:
            DeviceError: It cannot be loaded, or not in that time.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while self.state == "loading" and (deadline is None or time.monotonic() < deadline):
            time.sleep(POLL_S)
        if self.state != "ready":
            raise DeviceError(self.problem or f"the engine is {self.state}")

    def answer(self, messages: Sequence[Message], params: Params, cancel: threading.Event) -> Iterator[Step]:
        """See `Backend`; while others are served first, steps tell how many."""
        number = next(self._numbers)
        with self._queue_changed:
            self._queue.append(number)
        try:
            while (ahead := self._queue.index(number)) and not cancel.is_set():
                yield Step(ahead=ahead)
                with self._queue_changed:
                    self._queue_changed.wait_for(lambda: cancel.is_set() or self._queue.index(number) < ahead, STEP_S)
            while self.state == "loading" and not cancel.is_set():
                yield Step()
                with contextlib.suppress(DeviceError):
                    self.wait(STEP_S)
            if cancel.is_set():
                yield Step(finish_reason="cancelled", metrics=RequestMetrics(0, 0, 0.0, None, 0.0))
            else:
                yield from self._run(number, messages, params, cancel)
        finally:
            with self._queue_changed:
                self._queue.remove(number)
                self._queue_changed.notify_all()

    def _run(self, number: int, messages: Sequence[Message], params: Params, cancel: threading.Event) -> Iterator[Step]:
        events = self._answers[number] = queue.SimpleQueue()
        finished = cancel_sent = False
        last_step = time.monotonic()
        try:
            if self.state != "ready":
                raise EngineLost(self.problem or "the engine was stopped; load a model")
            self._worker.send(Ask(number, list(messages), params))
            while not finished:
                if cancel.is_set() and not cancel_sent:
                    cancel_sent = True
                    self._worker.send(Cancel(number))
                try:
                    event = events.get(timeout=POLL_S)
                except queue.Empty:
                    if time.monotonic() - last_step < STEP_S:
                        continue
                    event = Step()
                last_step = time.monotonic()
                if isinstance(event, OVAFMError):
                    finished = True
                    raise event
                finished = event.finish_reason is not None
                yield event
        finally:
            del self._answers[number]
            if not finished and not cancel_sent:
                self._worker.send(Cancel(number))

    def close(self) -> None:
        """End the process and what it works on."""
        if self.state in ("loading", "ready"):
            self.state, self.problem = "stopped", "another model is being loaded; ask again"
        self._worker.close()

    def _on_message(self, message: object) -> None:
        if isinstance(message, Phase):
            self._phase, self._phase_started = message, time.monotonic()
        elif isinstance(message, Info):
            self.info = message
            self.loaded_s = time.monotonic() - self._started
            if self.state == "loading":
                self.state = "ready"
        elif isinstance(message, Answered):
            if events := self._answers.get(message.number):
                events.put(message.step)
        elif isinstance(message, OVAFMError):
            self.problem = str(message)

    def _on_exit(self, end: Exit) -> None:
        if self.state != "stopped":
            self.problem = self.problem or f"the engine {end}; its messages are in {self._log}"
            self.state = "dead"
        for events in list(self._answers.values()):
            events.put(EngineLost(self.problem))
