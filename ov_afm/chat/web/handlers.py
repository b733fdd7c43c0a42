"""What the page's controls do. Gradio fills `request` and `event` in, by their annotations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import gradio as gr

from ...errors import OVAFMError
from ...runtime.sampling import Params
from ..conversation import Conversation, from_json, title_of
from ..models import recommended
from ..session import Talk, View
from . import html
from .security import written

__all__ = ["Actions"]

SLIDERS = ("temperature", "top_k", "top_p", "repetition_penalty", "max_new_tokens")
WHOLE = ("top_k", "max_new_tokens")


def owner_of(request: gr.Request) -> str:
    """Whose conversations a request sees: those of the name that signed in, if any."""
    return str(request.username or "")


@contextmanager
def _told() -> Iterator[None]:
    """Show an error of ours to the user; any other is a bug."""
    try:
        yield
    except OVAFMError as error:
        raise gr.Error(str(error), title="", print_exception=False) from error


def _text(value: Any) -> str:
    """The text of an edited message, which Gradio gives as text or as a list of parts."""
    if isinstance(value, list):
        return "".join(_text(part) for part in value)
    return str(value.get("text", "")) if isinstance(value, dict) else str(value)


class Actions:
    """The handlers of the chat tab.

    Args:
        talk: The conversations.
        params: Sampling of the command line.
        system: System prompt of a new conversation.

    Attributes:
        everything: The components that show a conversation.
    """

    everything: list[Any]

    def __init__(self, talk: Talk, params: Params, system: str) -> None:
        self.talk, self.host, self._given, self._system = talk, talk.host, params, system

    def _recommended(self) -> list[float]:
        """The sliders' values: the command line's where given, else the model's."""
        model = self.host.model
        values = recommended(model.path if model else None)
        longest = 1024 if self._given.max_new_tokens is None else self._given.max_new_tokens
        names = SLIDERS[:-1]
        chosen = [getattr(self._given, name) for name in names]
        if self._given.greedy:
            chosen[0] = 0
        values_given = [values[name] if each is None else each for name, each in zip(names, chosen, strict=True)]
        return [*values_given, longest]

    def params(self, *sliders: float) -> Params:
        """Sampling as the sliders say, in the order of `SLIDERS`.

        What nobody moved is left to a server, which knows its model's values.
        """
        remote = self.host.remote is not None
        moved: dict[str, Any] = {
            name: int(value) if name in WHOLE else float(value)
            for name, value, start in zip(SLIDERS, sliders, self._recommended(), strict=True)
            if value != start or not remote
        }
        return replace(self._given, greedy=self._given.greedy and "temperature" not in moved, **moved)

    @_told()
    def open_(self, number: str, request: gr.Request) -> list[Any]:
        """Show a conversation, or an empty one where there is none of that number."""
        owner = owner_of(request)
        found = self.talk.store.get(owner, int(number)) if str(number).isdigit() else None
        return self._all(owner, str(number) if found else "", found or Conversation(system=self._system))

    def _all(self, owner: str, number: str, conversation: Conversation) -> list[Any]:
        view = View(conversation, working=bool(number) and self.talk.busy(int(number)))
        parts = [
            number,
            self._entries(owner, number),
            conversation.title,
            conversation.system,
            html.bubbles(view),
            self._gauge(view),
        ]
        if self.host.remote is None:
            assert self.host.engine is not None
            choice = self.host.engine.choice
            parts.append(choice.model_dir)
        return parts

    def _gauge(self, view: View) -> str:
        return html.gauge(view, self.host.info.context_length)

    def _entries(self, owner: str, number: str) -> Any:
        entries = [(entry.name, str(entry.id)) for entry in self.talk.store.entries(owner)]
        return gr.update(choices=entries, value=number or None)

    @_told()
    def offer(self, model_dir: str, device: str) -> list[Any]:
        """The devices for a model.

        Args:
            model_dir: The model.
            device: What is chosen now. It is left alone if the model can run there: meanwhile the user may have
                chosen another.
        """
        rows = self.host.device_rows(model_dir)
        usable = [(row.label, row.name) for row in rows if not row.refused]
        keep = device in [name for _, name in usable]
        devices = gr.update(choices=usable) if keep else gr.update(choices=usable, value=usable[0][1])
        return [devices, html.refused_devices(rows)]

    def offer_loaded(self) -> list[Any]:
        """The devices for the model that is loaded, and the one that it is on."""
        assert self.host.engine is not None
        choice = self.host.engine.choice
        devices, refused = self.offer(choice.model_dir, choice.device)
        return [{**devices, "value": devices.get("value", choice.device)}, refused]

    @_told()
    def switch(self, model_dir: str, device: str) -> None:
        """Load another model, or on another device."""
        self.host.start(self.host.choice(model_dir, device))

    def ask(
        self, request: gr.Request, question: str, number: str, system: str, *sampling: float
    ) -> Iterator[list[Any]]:
        """Answer a question."""
        if not question.strip():
            yield [gr.skip()] * 5
            return
        owner = owner_of(request)
        if not number:
            with _told():
                number = str(self.talk.store.add(owner, Conversation(title_of(question), system)))

        def change(conversation: Conversation) -> None:
            conversation.question(question.strip())

        yield from self._answer(request, number, system, sampling, change, question="")

    def retry(self, request: gr.Request, number: str, system: str, *sampling: float) -> Iterator[list[Any]]:
        """Answer the last question again."""
        yield from self._answer(request, number, system, sampling, lambda conversation: conversation.retry())

    def edit(
        self, request: gr.Request, event: gr.EditData, number: str, system: str, *sampling: float
    ) -> Iterator[list[Any]]:
        """Change a question; what came after it is answered anew."""
        index = event.index[0] if isinstance(event.index, (list, tuple)) else event.index

        def change(conversation: Conversation) -> None:
            conversation.turns = conversation.turns[: int(index)]
            conversation.question(written(_text(event.value)).strip())

        yield from self._answer(request, number, system, sampling, change)

    def _answer(
        self,
        request: gr.Request,
        number: str,
        system: str,
        sampling: tuple[float, ...],
        change: Callable[[Conversation], Any],
        question: str | None = None,
    ) -> Iterator[list[Any]]:
        skip = gr.skip()
        owner, tab = owner_of(request), str(request.session_hash)
        box: Any = skip if question is None else question
        entries: Any = None

        def prepared(conversation: Conversation) -> None:
            conversation.system = system.strip()
            change(conversation)

        with _told():
            for view in self.talk.answer(owner, tab, int(number), self.params(*sampling), prepared):
                first = entries is None
                entries = self._entries(owner, number) if first else skip
                meter = skip if view.working else self._gauge(view)
                yield [box if first else skip, number if first else skip, entries, html.bubbles(view), meter]

    def halt(self, request: gr.Request) -> None:
        """Stop this tab's answer."""
        self.talk.stop(str(request.session_hash))

    @_told()
    def undo(self, number: str, request: gr.Request) -> list[Any]:
        """Take the last question and its answer away; the question goes back to where it was typed."""
        conversation = self._get(number, request)
        conversation.retry()
        question = conversation.turns[-1].content if conversation.turns else ""
        conversation.drop_question()
        return self._keep(number, conversation, request, question)

    @_told()
    def clear(self, number: str, request: gr.Request) -> list[Any]:
        """Take all turns away."""
        conversation = self._get(number, request)
        conversation.turns = []
        return self._keep(number, conversation, request, "")

    def _get(self, number: str, request: gr.Request) -> Conversation:
        self.talk.stop(str(request.session_hash))
        return (self.talk.store.get(owner_of(request), int(number)) if number else None) or Conversation()

    def _keep(self, number: str, conversation: Conversation, request: gr.Request, question: str) -> list[Any]:
        owner = owner_of(request)
        if number:
            self.talk.store.save(owner, int(number), conversation)
        view = View(conversation)
        return [question, number, self._entries(owner, number), html.bubbles(view), self._gauge(view)]

    @_told()
    def begin(self, request: gr.Request) -> list[Any]:
        """A new conversation; it is kept from its first question on."""
        return self._all(owner_of(request), "", Conversation(system=self._system))

    @_told()
    def remove(self, number: str, request: gr.Request) -> list[Any]:
        """Delete the conversation."""
        self.talk.stop(str(request.session_hash))
        if number:
            self.talk.store.delete(owner_of(request), int(number))
        return self.begin(request)

    @_told()
    def rename(self, number: str, name: str, request: gr.Request) -> Any:
        """Give the conversation a name."""
        owner = owner_of(request)
        conversation = self.talk.store.get(owner, int(number)) if number else None
        if conversation is None or self.talk.busy(int(number)):
            return gr.skip()
        conversation.title = name.strip()
        self.talk.store.save(owner, int(number), conversation)
        return self._entries(owner, number)

    def _exporter(self, write: Callable[[Conversation], str], suffix: str) -> Callable[..., list[str]]:
        @_told()
        def export(number: str, request: gr.Request) -> list[str]:
            conversation = self._get_for_reading(number, request)
            name = "".join(each if each.isalnum() else "-" for each in conversation.name).strip("-")
            return [write(conversation), f"{name or 'conversation'}.{suffix}"]

        return export

    def _get_for_reading(self, number: str, request: gr.Request) -> Conversation:
        return (self.talk.store.get(owner_of(request), int(number)) if number else None) or Conversation()

    @_told()
    def take_in(self, text: str, request: gr.Request) -> list[Any]:
        """Keep an imported conversation and show it."""
        owner = owner_of(request)
        if not text:
            return [gr.skip()] * len(self.everything)
        conversation = from_json(text)
        return self._all(owner, str(self.talk.store.add(owner, conversation)), conversation)
