"""A model in a child process that may die, and the line of those who wait for it."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import IO, Any, Literal

from ..errors import DeviceError, GenerationError
from ..pipeline import Message, Use
from ..runtime.metrics import RequestMetrics
from ..runtime.sampling import Params
from ..system import child_process
from ..system.resources import log_file
from .backend import Info, Step

__all__ = ["Choice", "Engine", "EngineLost"]

POLL_S = 0.1
END_S = 2.0
BEAT_S = 0.5
State = Literal["loading", "ready", "dead", "stopped"]


class EngineLost(GenerationError):
    """The engine's process ended, or was ended, while the answer was made."""


@dataclass(frozen=True, slots=True)
class Choice:
    """What to load.

    Attributes:
        model_dir: The model directory.
        device: The device.
        prompt_lookup: Draft tokens from the prompt.
        properties: Other arguments of `Pipeline`.
    """

    model_dir: str
    device: str = "CPU"
    prompt_lookup: bool = False
    properties: Mapping[str, Any] = field(default_factory=dict)

    def options(self) -> dict[str, Any]:
        """Arguments of `Pipeline`, as JSON values."""
        plain = {name: asdict(value) if isinstance(value, Use) else value for name, value in self.properties.items()}
        return {**plain, "model_dir": self.model_dir, "device": self.device, "prompt_lookup": self.prompt_lookup}


class Engine:
    """One model's process. Loading begins at once; see `state`.

    Args:
        choice: What to load.

    Attributes:
        choice: What was to be loaded.
        state: `loading`, `ready`, `dead` (see `problem`) or `stopped`.
        phase: The step of loading, and the seconds that it took last time.
        phase_began: When it began, by the monotonic clock.
        problem: Why it is dead.
        loaded_s: Seconds from its start until it was ready.
        pid: Process id.
    """

    def __init__(self, choice: Choice) -> None:
        self.choice = choice
        self.state: State = "loading"
        self.phase: tuple[str, float | None] = ("starting", None)
        self.began = self.phase_began = time.monotonic()
        self.problem = ""
        self.loaded_s = 0.0
        self._info: Info | None = None
        self._numbers = itertools.count(1)
        self._answers: dict[int, queue.SimpleQueue[dict[str, Any] | None]] = {}
        self._turn = threading.Condition()
        self._line: list[int] = []
        self._log = log_file("chat-engine")
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "ov_afm.chat.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env={**os.environ, **child_process.CHILD_ENV},
                # A Ctrl-C of the terminal is the page's process to handle.
                start_new_session=True,
            )
        self.pid = self._process.pid
        self._sending = threading.Lock()
        self._send(choice.options())
        assert self._process.stdout is not None
        threading.Thread(target=self._read, args=(self._process.stdout,), daemon=True).start()

    @property
    def info(self) -> Info:
        """What answers, once it is ready."""
        if self._info is None:
            return Info(os.path.basename(os.path.realpath(self.choice.model_dir)), self.choice.device, "", None)  # noqa: PTH119
        return self._info

    @property
    def progress(self) -> tuple[str, float, float | None]:
        """The step of loading, its seconds so far and those of last time."""
        return self.phase[0], time.monotonic() - self.phase_began, self.phase[1]

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
        """See `Backend`; while others are served first, steps tell the place in the line.

        There is a step every `BEAT_S` at least, an empty one if need be: only between steps can the caller close this.
        """
        number = next(self._numbers)
        with self._turn:
            self._line.append(number)
        try:
            while (ahead := self._line.index(number)) and not cancel.is_set():
                yield Step(place=ahead)
                with self._turn:
                    self._turn.wait_for(lambda: cancel.is_set() or self._line.index(number) < ahead, BEAT_S)
            while self.state == "loading" and not cancel.is_set():
                yield Step()
                with contextlib.suppress(DeviceError):
                    self.wait(BEAT_S)
            if cancel.is_set():
                yield _cancelled()
            else:
                yield from self._run(number, messages, params, cancel)
        finally:
            with self._turn:
                self._line.remove(number)
                self._turn.notify_all()

    def _run(self, number: int, messages: Sequence[Message], params: Params, cancel: threading.Event) -> Iterator[Step]:
        events: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._answers[number] = events
        open_, told = True, False
        heard = time.monotonic()
        try:
            if self.state != "ready":
                raise EngineLost(self.problem or "the engine was stopped; load a model")
            self._send({"id": number, "messages": list(messages), "params": _given(params)})
            while open_:
                if cancel.is_set() and not told:
                    told = True
                    self._send({"cancel": number})
                try:
                    event = events.get(timeout=POLL_S)
                except queue.Empty:
                    if time.monotonic() - heard >= BEAT_S:
                        heard = time.monotonic()
                        yield Step()
                    continue
                heard = time.monotonic()
                if event is None:
                    raise EngineLost(self.problem or "the engine was stopped")
                if "error" in event:
                    open_ = False
                    raise GenerationError(event["error"])
                step = _step(event)
                open_ = step.finish_reason is None
                yield step
        finally:
            self._answers.pop(number, None)
            if open_ and not told:
                self._send({"cancel": number})

    def close(self) -> None:
        """End the process and what it works on."""
        if self.state in ("loading", "ready"):
            self.state, self.problem = "stopped", "another model is being loaded; ask again"
        with contextlib.suppress(OSError):
            assert self._process.stdin is not None
            self._process.stdin.close()
        try:
            self._process.wait(END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _send(self, message: dict[str, Any]) -> None:
        with self._sending, contextlib.suppress(OSError, ValueError):
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()

    def _read(self, stream: IO[bytes]) -> None:
        for line in stream:
            if line.endswith(b"\n"):
                self._take(json.loads(line))
        status = self._process.wait()
        if self.state != "stopped":
            self.problem = self.problem or self._death(status)
            self.state = "dead"
        for events in list(self._answers.values()):
            events.put(None)

    def _take(self, message: dict[str, Any]) -> None:
        if "phase" in message:
            self.phase, self.phase_began = (message["phase"], message["last_s"]), time.monotonic()
        elif "ready" in message:
            self._info = Info(**message["ready"])
            self.loaded_s = time.monotonic() - self.began
            if self.state == "loading":
                self.state = "ready"
        elif "unusable" in message:
            self.problem = message["unusable"]
        elif events := self._answers.get(message["id"]):
            events.put(message)

    def _death(self, status: int) -> str:
        name = signal.Signals(-status).name if status < 0 else f"status {status}"
        hint = " (out of memory?)" if name == "SIGKILL" else ""
        return f"the engine ended with {name}{hint}; its messages are in {self._log}"


def _given(params: Params) -> dict[str, Any]:
    return {name: value for name, value in asdict(params).items() if value is not None}


def _cancelled() -> Step:
    return Step(finish_reason="cancelled", metrics=RequestMetrics(0, 0, 0.0, None, 0.0))


def _step(event: dict[str, Any]) -> Step:
    fields = {name: value for name, value in event.items() if name != "id"}
    if fields["metrics"] is not None:
        fields["metrics"] = RequestMetrics(**fields["metrics"])
    return Step(**fields)
