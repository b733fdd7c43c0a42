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
from .backend import Local, Step

__all__ = ["Answered", "Ask", "Cancel", "Choice", "Phase", "run"]


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


# What the worker sends, beside the `Info` of a loaded model and the error of one that cannot be loaded.


@dataclass(frozen=True, slots=True)
class Phase:
    """A phase of loading begins, which took so many seconds last time; None where that is not known."""

    name: str
    last_s: float | None


@dataclass(frozen=True, slots=True)
class Answered:
    """A step of an answer, or why there is none."""

    number: int
    step: Step | OVAFMError


def run(channel: Channel, choice: Choice) -> None:
    """Load a model, then answer in turn what comes through the channel until the page's process closes it."""
    requests: queue.SimpleQueue[Ask] = queue.SimpleQueue()
    cancels: dict[int, threading.Event] = {}
    threading.Thread(target=_read, args=(channel, requests, cancels), daemon=True).start()
    try:
        pipeline = Pipeline(
            choice.model_dir,
            choice.device,
            prompt_lookup=choice.prompt_lookup,
            on_phase=lambda name, last_s: channel.send(Phase(name, last_s)),
            fallback=False,
            **choice.options,
        )
    except OVAFMError as error:
        channel.send(error)
        return
    backend = Local(pipeline)
    channel.send(backend.info)
    while True:
        request = requests.get()
        try:
            for step in backend.answer(request.messages, request.params, cancels[request.number]):
                channel.send(Answered(request.number, step))
        except OVAFMError as error:
            channel.send(Answered(request.number, error))
        del cancels[request.number]


def _read(channel: Channel, requests: queue.SimpleQueue[Ask], cancels: dict[int, threading.Event]) -> None:
    """Take requests and cancellations until the channel closes, then end the process."""
    for message in channel:
        if isinstance(message, Ask):
            cancels[message.number] = threading.Event()
            requests.put(message)
        elif cancel := cancels.get(message.number):
            cancel.set()
    # Loading or answering may go on in native code, which nothing else can end.
    os._exit(0)
