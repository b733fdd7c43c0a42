"""Answering the conversations of the page: one answer at a time for each, what is kept, and who may stop it.

An answer belongs to the server, not to the tab that asked: a tab that is loaded again, or a second one, goes on where
the answer is. It ends when it is complete, when it is stopped, or soon after the last tab has gone.
"""

from __future__ import annotations

import collections
import contextlib
import threading
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass

from ..errors import ConfigError, EngineLost, OVAFMError
from ..runtime.sampling import Params
from .backend import figures_of
from .conversation import Conversation, Turn
from .models import ModelManager
from .store import Store

__all__ = ["Session", "View"]

# Pieces of text are shown this far apart: a browser redraws the answer each time.
REDRAW_S = 0.08
# A tab that has gone is noticed this soon, and an answer waits this long for one to come back.
ALIVE_S = 0.5
REJOIN_S = 8.0
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


class _Running:
    """An answer under way, in a thread of its own: tabs come and go, and see what there is of it."""

    def __init__(self, view: View) -> None:
        self.view, self.cancel = view, threading.Event()
        # The number of views so far, and what tells of a further one or of the end.
        self.count, self.done = 1, False
        self.changed = threading.Condition()
        # How often each tab follows.
        self.followers: collections.Counter[str] = collections.Counter()
        self.problem: BaseException | None = None

    def show(self, view: View) -> None:
        """Show a further view to all tabs."""
        with self.changed:
            self.view = view
            self.count += 1
            self.changed.notify_all()

    def end(self) -> None:
        """Say that no view follows."""
        with self.changed:
            self.done = True
            self.changed.notify_all()


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
        """End the answer that a tab shows."""
        for running in self._of(tab):
            running.cancel.set()

    def leave(self, tab: str) -> None:
        """A tab shows something else: it gets no more views, and an answer that no other tab shows ends and is kept."""
        left = self._of(tab)
        for running in left:
            with running.changed:
                del running.followers[tab]
                if not running.followers:
                    running.cancel.set()
                running.changed.notify_all()
        alone = [running for running in left if running.cancel.is_set()]
        with self._ended:
            self._ended.wait_for(lambda: all(running.done for running in alone), STOP_S)

    def _of(self, tab: str) -> list[_Running]:
        return [running for running in list(self._running.values()) if tab in running.followers]

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
        with self._ended:
            if number in self._running:
                raise ConfigError(
                    "this conversation is being answered, perhaps in another tab; wait for it or begin a new one",
                    code="conversation-busy",
                )
            conversation = self.store.get(owner, number)
            if conversation is None:
                raise ConfigError("this conversation was deleted; begin a new one", code="conversation-deleted")
            change(conversation)
            self.store.save(owner, number, conversation)
            running = self._running[number] = _Running(View(conversation, working=True))
            running.followers[tab] += 1
        threading.Thread(target=self._work, args=(owner, number, params, running), daemon=True).start()
        yield from self._views(running, tab)

    def follow(self, owner: str, tab: str, number: int) -> Iterator[View]:
        """The views of an answer that is under way, from now on; none where there is no such answer.

        Args:
            owner: Whose conversation it is.
            tab: The browser tab that shows it.
            number: The conversation.
        """
        running = self._running.get(number)
        if running is None or self.store.get(owner, number) is None:
            return
        with running.changed:
            running.followers[tab] += 1
        yield from self._views(running, tab)
        if (conversation := self.store.get(owner, number)) and not running.view.problem:
            # The end may have come before this tab did.
            yield View(conversation)

    def _views(self, running: _Running, tab: str) -> Iterator[View]:
        seen = 0
        try:
            while tab in running.followers:
                with running.changed:
                    if not (running.count > seen or running.done):
                        running.changed.wait(ALIVE_S)
                    view, fresh, done = running.view, running.count > seen, running.done
                    seen = running.count
                    if tab not in running.followers:
                        return
                if running.problem is not None:
                    raise running.problem
                # Now and then the same once more: only so is it noticed that a tab has gone.
                if fresh or not done:
                    yield view
                if done:
                    return
        finally:
            self._gone(running, tab)

    def _gone(self, running: _Running, tab: str) -> None:
        """A tab follows no more. An answer that nobody follows ends, unless a tab comes back soon, as by a reload."""
        with running.changed:
            if tab in running.followers:
                running.followers[tab] -= 1
                if not running.followers[tab]:
                    del running.followers[tab]
            if running.followers or running.done:
                return

        def give_up() -> None:
            if not running.followers:
                running.cancel.set()

        timer = threading.Timer(REJOIN_S, give_up)
        timer.daemon = True
        timer.start()

    def _work(self, owner: str, number: int, params: Params, running: _Running) -> None:
        try:
            for view in self._run(owner, number, running.view.conversation, params, running.cancel):
                running.show(view)
        except BaseException as error:  # noqa: BLE001 - the tabs raise it
            running.problem = error
        finally:
            with self._ended:
                del self._running[number]
                running.end()
                self._ended.notify_all()

    def _run(
        self, owner: str, number: int, conversation: Conversation, params: Params, cancel: threading.Event
    ) -> Generator[View]:
        messages = conversation.messages()
        answer = Turn("assistant", "")
        shown = 0.0
        try:
            for attempt in range(2):
                backend = self.models.backend
                try:
                    with contextlib.closing(backend.answer(messages, params, cancel)) as steps:  # type: ignore[type-var]
                        for step in steps:
                            if (step.text or step.finish_reason) and conversation.turns[-1] is not answer:
                                conversation.turns.append(answer)
                            answer.content += step.text
                            if step.finish_reason is not None:
                                answer.figures = figures_of(step, backend.info)
                            elif step.ahead is not None or time.monotonic() - shown >= REDRAW_S:
                                shown = time.monotonic()
                                yield View(conversation, ahead=step.ahead, working=True)
                    break
                except EngineLost:
                    # It is asked once more, from the beginning, by an engine that is started again.
                    if attempt or cancel.is_set() or not self.models.revive(backend):
                        raise
                    answer.content = ""
            yield View(conversation)
        except OVAFMError as error:
            yield View(conversation, problem=str(error))
        finally:
            if answer.content or answer.figures:
                # Without figures it was broken off: the engine died.
                answer.figures = answer.figures or {"finish_reason": "cancelled"}
                self.store.save(owner, number, conversation)
