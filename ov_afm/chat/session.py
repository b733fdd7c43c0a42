"""Answering the conversations of the page: one answer at a time for each, what is kept, and who may stop it."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass

from ..errors import ConfigError, OVAFMError
from ..runtime.sampling import Params
from .backend import figures_of
from .conversation import Conversation, Turn
from .models import ModelManager
from .store import Store

__all__ = ["Session", "View"]

# Pieces of text are shown this far apart: a browser redraws the answer each time.
REDRAW_S = 0.08
# A model here stops within a token; a server may not hear of it before its next one.
STOP_S = 2.0


@dataclass(frozen=True, slots=True)
class View:
    """What the page shows.

    Attributes:
        conversation: The conversation, the growing answer included.
        ahead: Questions that are answered before this one; None once it is answered.
        problem: Why there is no answer.
        working: The answer is not complete yet.
    """

    conversation: Conversation
    ahead: int | None = None
    problem: str = ""
    working: bool = False


@dataclass
class _Running:
    """An answer under way: the tab that asked, what stops it, and whether the tab still shows its conversation."""

    tab: str
    cancel: threading.Event
    shown: bool = True


class Session:
    """The conversations of all users of the page.

    Args:
        models: What answers.
        store: Where conversations are kept.
    """

    def __init__(self, models: ModelManager, store: Store) -> None:
        self.models, self.store = models, store
        # By conversation.
        self._running: dict[int, _Running] = {}
        self._ended = threading.Condition()

    def stop(self, tab: str) -> None:
        """End the answer of a tab."""
        for running in self._of(tab):
            running.cancel.set()

    def leave(self, tab: str) -> None:
        """End the answer of a tab before the tab shows something else: it is kept, but no more views of it come."""
        with self._ended:
            for running in self._of(tab):
                running.shown = False
                running.cancel.set()
            self._ended.wait_for(lambda: not self._of(tab), STOP_S)

    def _of(self, tab: str) -> list[_Running]:
        return [running for running in list(self._running.values()) if running.tab == tab]

    def busy(self, number: int) -> bool:
        """Whether a conversation is being answered."""
        return number in self._running

    def answer(
        self, owner: str, tab: str, number: int, params: Params, change: Callable[[Conversation], None]
    ) -> Iterator[View]:
        """Change a conversation and answer its last question. What came is kept, however it ends.

        Args:
            owner: Whose conversation it is.
            tab: The browser tab that asks.
            number: The conversation.
            params: Sampling.
            change: Adds the question, or removes an answer.

        Raises:
            ConfigError: The conversation is gone, or is being answered.
        """
        running = _Running(tab, threading.Event())
        with self._ended:
            if number in self._running:
                raise ConfigError(
                    "this conversation is being answered, perhaps in another tab; wait for it or begin a new one",
                    code="conversation-busy",
                )
            self._running[number] = running
        try:
            conversation = self.store.get(owner, number)
            if conversation is None:
                raise ConfigError("this conversation was deleted; begin a new one", code="conversation-deleted")
            change(conversation)
            self.store.save(owner, number, conversation)
            yield View(conversation, working=True)
            with contextlib.closing(self._run(owner, number, conversation, params, running.cancel)) as views:
                for view in views:
                    if running.shown:
                        yield view
        finally:
            with self._ended:
                del self._running[number]
                self._ended.notify_all()

    def _run(
        self, owner: str, number: int, conversation: Conversation, params: Params, cancel: threading.Event
    ) -> Generator[View]:
        messages = conversation.messages()
        answer = Turn("assistant", "")
        shown = 0.0
        try:
            backend = self.models.backend
            steps = backend.answer(messages, params, cancel)
            with contextlib.closing(steps):  # type: ignore[type-var]
                for step in steps:
                    if (step.text or step.finish_reason) and conversation.turns[-1] is not answer:
                        conversation.turns.append(answer)
                    answer.content += step.text
                    if step.finish_reason is not None:
                        answer.figures = figures_of(step, backend.info)
                    elif step.ahead is not None or time.monotonic() - shown >= REDRAW_S:
                        shown = time.monotonic()
                        yield View(conversation, ahead=step.ahead, working=True)
            yield View(conversation)
        except OVAFMError as error:
            yield View(conversation, problem=str(error))
        finally:
            if answer.content or answer.figures:
                # Without figures it was broken off: the tab was closed, or the engine died.
                answer.figures = answer.figures or {"finish_reason": "cancelled"}
                self.store.save(owner, number, conversation)
