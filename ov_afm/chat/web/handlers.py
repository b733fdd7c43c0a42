"""What the page's controls do. Gradio passes `request` and `event`, which it knows by their annotations."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import gradio as gr

from ...errors import OVAFMError
from ...runtime.sampling import Params
from ..conversation import Conversation, from_json, title_of
from ..models import recommended_sampling
from ..session import Session, View
from . import html
from .conversation_view import messages

__all__ = ["AT_ONCE", "IN_ORDER", "SLIDERS", "UNLIMITED", "Handlers", "errors_shown"]

# How Gradio calls handlers.
HIDDEN: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
# Stop, and what only looks, must not wait for answers.
AT_ONCE = {**HIDDEN, "queue": False}
UNLIMITED = {**HIDDEN, "concurrency_limit": None}
# What shows another conversation runs one after the other, so that the last press of a button decides what is shown.
IN_ORDER = {**HIDDEN, "concurrency_id": "conversation", "concurrency_limit": 1}
# Of each slider its label, the least and the greatest value, and the step, which is whole where the values are.
SLIDERS: dict[str, tuple[str, float, float, float]] = {
    "temperature": ("Temperature", 0, 2, 0.05),
    "top_k": ("Top k", 0, 200, 1),
    "top_p": ("Top p", 0.05, 1, 0.05),
    "repetition_penalty": ("Repetition penalty", 0.8, 2, 0.05),
    "max_new_tokens": ("Longest answer, tokens", 16, 4096, 16),
}
LONGEST_ANSWER = 1024
Change = Callable[[Conversation], Any]


@contextmanager
def errors_shown() -> Iterator[None]:
    """Show an error of ov_afm to the user; any other is a bug."""
    try:
        yield
    except OVAFMError as error:
        raise gr.Error(str(error), title="", print_exception=False) from error


def _owner(request: gr.Request) -> str:
    """Whose conversations a request sees: those of the name that signed in, if any."""
    return str(request.username or "")


def _tab(request: gr.Request) -> str:
    return str(request.session_hash)


class Handlers:
    """The handlers of the chat tab.

    Args:
        session: The conversations.
        params: Sampling of the command line.
        system: System prompt of a new conversation.
    """

    def __init__(self, session: Session, params: Params, system: str) -> None:
        self.session, self.models, self.store = session, session.models, session.store
        self._given, self._system = params, system

    # -- Sampling

    def slider_values(self) -> list[float]:
        """The sliders' values, in the order of `SLIDERS`: the command line's where given, else the model's."""
        model = self.models.loaded
        recommended = recommended_sampling(model.directory.path if model else None)
        values = {**recommended, "max_new_tokens": LONGEST_ANSWER}
        given = {name: getattr(self._given, name) for name in SLIDERS}
        if self._given.greedy:
            given["temperature"] = 0
        return [values[name] if given[name] is None else given[name] for name in SLIDERS]

    def params(self, *sliders: float) -> Params:
        """Sampling as the sliders say, in the order of `SLIDERS`.

        What nobody moved is left to a server, which knows its model's values.
        """
        moved: dict[str, Any] = {
            name: type(step)(value)
            for (name, (*_, step)), value, start in zip(SLIDERS.items(), sliders, self.slider_values(), strict=True)
            if value != start or self.models.remote is None
        }
        return replace(self._given, greedy=self._given.greedy and "temperature" not in moved, **moved)

    # -- Model and device

    @errors_shown()
    def offer_devices(self, model_dir: str, device: str) -> list[Any]:
        """The devices for a model.

        Args:
            model_dir: The model.
            device: What is chosen now. It is not set again if the model can run there, because the user may have
                chosen another in the meantime.
        """
        rows = self.models.device_rows(model_dir)
        usable = [(row.label, row.name) for row in rows if not row.refused]
        value = {} if any(name == device for _, name in usable) else {"value": usable[0][1]}
        return [gr.update(choices=usable, **value), html.refused_devices(rows)]

    def offer_devices_of_loaded(self) -> list[Any]:
        """The devices for the model that is loaded, and the one that it is on."""
        assert self.models.engine is not None
        choice = self.models.engine.choice
        devices, refused = self.offer_devices(choice.model_dir, choice.device)
        return [{**devices, "value": devices.get("value", choice.device)}, refused]

    @errors_shown()
    def load(self, model_dir: str, device: str) -> None:
        """Load another model, or on another device."""
        self.models.start(self.models.choice(model_dir, device))

    # -- Choosing and keeping conversations; these return values for `Page.conversation`

    def open_(self, number: str, request: gr.Request) -> Any:
        """Show a conversation, or an empty one where there is none of that number."""
        owner = _owner(request)
        with errors_shown():
            conversation = self.store.get(owner, int(number)) if str(number).isdigit() else None
        if conversation is None:
            return self.new(request)
        return self._show(owner, str(number), conversation)

    def choose(self, chosen: str, number: str, request: gr.Request) -> Any:
        """Show the conversation that was chosen in the list.

        Gradio's list reports a choice also when it only loses the focus. Showing the same conversation once more could
        then undo what the user did next.
        """
        if chosen == number:
            return gr.skip()
        self.session.leave(_tab(request))
        return self.open_(chosen, request)

    @errors_shown()
    def new(self, request: gr.Request) -> Any:
        """Show a new conversation; it is kept from its first question on."""
        self.session.leave(_tab(request))
        return self._show(_owner(request), "", Conversation(system=self._system))

    def delete(self, number: str, request: gr.Request) -> Any:
        """Delete the conversation and show a new one."""
        self.session.leave(_tab(request))
        if number:
            with errors_shown():
                self.store.delete(_owner(request), int(number))
        return self.new(request)

    @errors_shown()
    def import_(self, text: str, request: gr.Request) -> Any:
        """Keep an imported conversation and show it."""
        if not text:
            return gr.skip()
        conversation = from_json(text)
        self.session.leave(_tab(request))
        owner = _owner(request)
        return self._show(owner, str(self.store.add(owner, conversation)), conversation)

    def _show(self, owner: str, number: str, conversation: Conversation) -> list[Any]:
        view = View(conversation, working=bool(number) and self.session.busy(int(number)))
        entries = self._entries(owner, number)
        shown = [number, entries, conversation.title, conversation.system, messages(view), self._gauge(view)]
        if self.models.engine is not None:
            shown.append(self.models.engine.choice.model_dir)
        return shown

    @errors_shown()
    def rename(self, number: str, name: str, request: gr.Request) -> Any:
        """Give the conversation a name; returns the list."""
        owner = _owner(request)
        conversation = self.store.get(owner, int(number)) if number else None
        if conversation is None or self.session.busy(int(number)):
            return gr.skip()
        conversation.title = name.strip()
        self.store.save(owner, int(number), conversation)
        return self._entries(owner, number)

    def exporter(self, write: Callable[[Conversation], str], suffix: str) -> Callable[..., list[str]]:
        """A handler that returns the conversation as text, and a name for its file."""

        @errors_shown()
        def export(number: str, request: gr.Request) -> list[str]:
            conversation = self._get(number, request)
            name = "".join(each if each.isalnum() else "-" for each in conversation.name).strip("-")
            return [write(conversation), f"{name or 'conversation'}.{suffix}"]

        return export

    # -- Questions and answers; these return values for `Page.exchange`

    def ask(self, request: gr.Request, question: str, number: str, system: str, *sampling: float) -> Iterator[Any]:
        """Answer a question."""
        question = question.strip()
        if not question:
            yield gr.skip()
            return
        if not number:
            with errors_shown():
                number = str(self.store.add(_owner(request), Conversation(title_of(question), system)))
        yield from self._answer(request, number, system, sampling, lambda each: each.question(question), box="")

    def rejoin(self, request: gr.Request, number: str) -> Iterator[list[Any]]:
        """Go on showing an answer that is under way, after a reload or in a second tab."""
        skip = gr.skip()
        if not number or not self.session.busy(int(number)):
            yield [skip] * 5
            return
        with errors_shown():
            for view in self.session.follow(_owner(request), _tab(request), int(number)):
                yield [*[skip] * 3, messages(view), skip if view.working else self._gauge(view)]

    def retry(self, request: gr.Request, number: str, system: str, *sampling: float) -> Iterator[list[Any]]:
        """Answer the last question again."""
        yield from self._answer(request, number, system, sampling, lambda each: each.retry())

    def edit(
        self, request: gr.Request, event: gr.EventData, number: str, system: str, *sampling: float
    ) -> Iterator[list[Any]]:
        """Change a question; what came after it is answered anew."""
        index, question = int(event.index), str(event.value).strip()
        if not question:
            yield gr.skip()
            return

        def change(conversation: Conversation) -> None:
            conversation.turns = conversation.turns[:index]
            conversation.question(question)

        yield from self._answer(request, number, system, sampling, change)

    def _answer(
        self, request: gr.Request, number: str, system: str, sampling: Sequence[float], change: Change, box: Any = None
    ) -> Iterator[list[Any]]:
        """Change and answer a conversation; `box` is what the question's box shall hold, None to leave it alone."""
        owner, skip = _owner(request), gr.skip()

        def prepare(conversation: Conversation) -> None:
            conversation.system = system.strip()
            change(conversation)

        with errors_shown():
            views = self.session.answer(owner, _tab(request), int(number), self.params(*sampling), prepare)
            for index, view in enumerate(views):
                question = skip if box is None else box
                once = [skip] * 3 if index else [question, number, self._entries(owner, number)]
                yield [*once, messages(view), skip if view.working else self._gauge(view)]

    def stop(self, request: gr.Request) -> None:
        """Stop this tab's answer."""
        self.session.stop(_tab(request))

    @errors_shown()
    def undo(self, number: str, request: gr.Request) -> list[Any]:
        """Remove the last question and its answer; the question goes back to where it was typed."""
        self.session.leave(_tab(request))
        conversation = self._get(number, request)
        conversation.retry()
        question = conversation.turns[-1].content if conversation.turns else ""
        conversation.drop_question()
        return self._save(number, conversation, request, question)

    @errors_shown()
    def clear(self, number: str, request: gr.Request) -> list[Any]:
        """Remove all questions and answers."""
        self.session.leave(_tab(request))
        conversation = self._get(number, request)
        conversation.turns = []
        return self._save(number, conversation, request, "")

    def _get(self, number: str, request: gr.Request) -> Conversation:
        return (self.store.get(_owner(request), int(number)) if number else None) or Conversation()

    def _save(self, number: str, conversation: Conversation, request: gr.Request, question: str) -> list[Any]:
        owner = _owner(request)
        if number:
            self.store.save(owner, int(number), conversation)
        view = View(conversation)
        return [question, number, self._entries(owner, number), messages(view), self._gauge(view)]

    def _gauge(self, view: View) -> str:
        return html.gauge(view, self.models.info.context_length)

    def _entries(self, owner: str, number: str) -> Any:
        entries = [(entry.name, str(entry.id)) for entry in self.store.entries(owner)]
        return gr.update(choices=entries, value=number or None)
