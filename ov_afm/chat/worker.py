"""The engine's process: loads one model, answers one conversation after the other, and says what happens.

Native code may end this process without ending the page's, which holds no model.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import OVAFMError
from ..pipeline import Message, Pipeline
from ..runtime.sampling import Params
from ..system.child_process import Channel
from .backend import Info, Local, Step

__all__ = ["Answered", "Ask", "Cancel", "Choice", "Failed", "Phase", "Ready", "Unusable", "run"]


@dataclass(frozen=True, slots=True)
class Choice:
    """What to load.

    Attributes:
        model_dir: The model directory.
        device: The device.
        prompt_lookup: Draft tokens from the prompt.
        options: Other arguments of `Pipeline`.
    """

    model_dir: str
    device: str = "CPU"
    prompt_lookup: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)


# What the worker gets. The number of an answer names it in every message.


@dataclass(frozen=True, slots=True)
class Ask:
    """Answer a conversation with these sampling values."""

    number: int
    messages: Sequence[Message]
    params: Params


@dataclass(frozen=True, slots=True)
class Cancel:
    """End an answer."""

    number: int


# What the worker sends.


@dataclass(frozen=True, slots=True)
class Phase:
    """A phase of loading begins, which took so many seconds last time; None where that is not known."""

    name: str
    last_s: float | None


@dataclass(frozen=True, slots=True)
class Ready:
    """The model is loaded."""

    info: Info


@dataclass(frozen=True, slots=True)
class Unusable:
    """The model cannot be loaded, for this reason; the process ends."""

    reason: str


@dataclass(frozen=True, slots=True)
class Answered:
    """A step of an answer."""

    number: int
    step: Step


@dataclass(frozen=True, slots=True)
class Failed:
    """A conversation cannot be answered."""

    number: int
    error: OVAFMError


def run(channel: Channel, choice: Choice) -> None:
    """Load a model, then answer what comes through the channel until the page's process closes it."""
    worker = Worker(channel)
    threading.Thread(target=worker.read, daemon=True).start()
    worker.run(choice)


class Worker:
    """Answers requests in the order in which they come.

    Args:
        channel: Where requests come from and what happens is sent to.
    """

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._requests: queue.SimpleQueue[Ask] = queue.SimpleQueue()
        self._cancels: dict[int, threading.Event] = {}

    def read(self) -> None:
        """Take requests and cancellations until the channel closes, then end the process."""
        for message in self._channel:
            if isinstance(message, Ask):
                self._cancels[message.number] = threading.Event()
                self._requests.put(message)
            elif cancel := self._cancels.get(message.number):
                cancel.set()
        # Loading or answering may go on in native code, which nothing else can end.
        os._exit(0)

    def run(self, choice: Choice) -> None:
        """Load the model and answer until the process ends."""
        try:
            pipeline = Pipeline(
                choice.model_dir,
                choice.device,
                prompt_lookup=choice.prompt_lookup,
                on_phase=lambda name, last_s: self._channel.send(Phase(name, last_s)),
                fallback=False,
                **choice.options,
            )
        except OVAFMError as error:
            self._channel.send(Unusable(str(error)))
            return
        backend = Local(pipeline)
        self._channel.send(Ready(backend.info))
        while True:
            self._answer(backend, self._requests.get())

    def _answer(self, backend: Local, request: Ask) -> None:
        try:
            for step in backend.answer(request.messages, request.params, self._cancels[request.number]):
                self._channel.send(Answered(request.number, step))
        except OVAFMError as error:
            self._channel.send(Failed(request.number, error))
        del self._cancels[request.number]
