"""The chat's page: controls and what they do. It holds no model and keeps no state of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import gradio as gr

from ..errors import OVAFMError
from ..params import Params
from . import render
from .conversation import Conversation, from_json, title_of, to_json, to_markdown
from .host import recommended
from .talk import Talk, View
from .texts import TEXTS

__all__ = ["build"]

HIDDEN = {"show_progress": "hidden", "api_visibility": "private"}
# Stop, and what only looks, must not wait behind answers.
AT_ONCE = {**HIDDEN, "queue": False}
FREE = {**HIDDEN, "concurrency_limit": None}
REMEMBER = "number => sessionStorage.setItem('conversation', number)"
RECALL = "() => [sessionStorage.getItem('conversation') || '']"
TICK_S = 1.0


def build(talk: Talk, params: Params, system: str) -> Any:
    """The page.

    Args:
        talk: The conversations.
        params: Sampling of the command line, over the model's own values.
        system: System prompt of a new conversation.
    """
    from .page_compare import compare_tab
    from .page_report import report_tab

    page = Page(talk, params, system)
    with gr.Blocks(title=TEXTS.title, analytics_enabled=False, fill_width=True) as blocks:
        with gr.Row(elem_id="head"):
            gr.HTML(f"<h1>{TEXTS.title}</h1>", elem_id="title")
            status = gr.HTML(render.status(talk.host), elem_id="status")
            restart = gr.Button(TEXTS.restart, size="sm", visible=False, elem_id="restart")
        with gr.Tabs():
            with gr.Tab(TEXTS.tab_chat):
                page.chat_tab()
            if talk.host.remote is None:
                with gr.Tab(TEXTS.tab_compare):
                    compare_tab(talk.host, page.params, page.sliders)
                with gr.Tab(TEXTS.tab_report):
                    report_tab(talk.host)

        def look(before: str) -> Any:
            now = render.status(talk.host)
            if now == before:
                return gr.skip(), gr.skip()
            return now, gr.update(visible=bool(talk.host.problem()))

        def again() -> Any:
            talk.host.restart()
            return look("")

        gr.Timer(TICK_S).tick(look, [status], [status, restart], **AT_ONCE)
        restart.click(again, None, [status, restart], **AT_ONCE)
        blocks.load(page.open_, [page.number], page.everything, js=RECALL, **FREE)
        if talk.host.remote is None:
            # On its own: the first time drivers are asked, which takes seconds.
            blocks.load(page.offer_loaded, None, [page.device, page.refused], **FREE)

        def gone(request: gr.Request) -> None:
            talk.stop(str(request.session_hash))

        blocks.unload(gone)
    return blocks


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


class Page:
    """The chat tab.

    Args:
        talk: The conversations.
        params: Sampling of the command line.
        system: System prompt of a new conversation.
    """

    def __init__(self, talk: Talk, params: Params, system: str) -> None:
        self.talk, self.host, self._given, self._system = talk, talk.host, params, system

    def chat_tab(self) -> None:
        """Make the controls and connect them."""
        with gr.Row():
            with gr.Column(scale=3, min_width=300):
                self._conversation_column()
            with gr.Column(scale=1, min_width=260):
                self._side_column()
        self.sliders = [self.temperature, self.top_k, self.top_p, self.penalty, self.longest]
        self.everything = [self.number, self.list, self.name, self.system, self.chat, self.gauge]
        if self.host.remote is None:
            self.everything.append(self.model)
        self._connect()

    def _conversation_column(self) -> None:
        remote = self.host.remote
        hint = TEXTS.empty_remote.format(url=remote.url) if remote else TEXTS.empty
        self.chat = gr.Chatbot(
            label=TEXTS.tab_chat,
            show_label=False,
            elem_id="chat",
            height="62vh",
            editable="user",
            buttons=["copy"],
            placeholder=hint,
            layout="panel",
            feedback_options=None,
            allow_tags=False,
        )
        self.gauge = gr.HTML(elem_id="gauge")
        with gr.Row(equal_height=True):
            self.question = gr.Textbox(
                "",
                label=TEXTS.question,
                placeholder=TEXTS.question_hint,
                lines=1,
                max_lines=8,
                scale=5,
                elem_id="question",
            )
            with gr.Column(scale=1, min_width=90, elem_id="send"):
                self.send = gr.Button(TEXTS.send, variant="primary", elem_id="send-button")
                self.stop = gr.Button(TEXTS.stop, variant="stop", elem_id="stop-button")
        # The conversation of this tab; the browser's tab remembers it.
        self.number = gr.Textbox("", visible="hidden", label="Conversation number")

    def _side_column(self) -> None:
        self.list = gr.Dropdown([], label=TEXTS.conversations, elem_id="conversations")
        with gr.Row():
            self.new = gr.Button(TEXTS.new, size="sm", min_width=80, elem_id="new")
            self.delete = gr.Button(TEXTS.delete, size="sm", min_width=80, elem_id="delete")
        with gr.Accordion(TEXTS.system, open=False):
            self.system = gr.Textbox("", label=TEXTS.system, info=TEXTS.system_hint, lines=3, elem_id="system")
        if self.host.remote is None:
            self._setup()
        values = self._recommended()
        with gr.Accordion(TEXTS.sampling, open=False):
            self.temperature = gr.Slider(0, 2, values[0], step=0.05, label=TEXTS.temperature)
            self.top_k = gr.Slider(0, 200, values[1], step=1, label=TEXTS.top_k)
            self.top_p = gr.Slider(0.05, 1, values[2], step=0.05, label=TEXTS.top_p)
            self.penalty = gr.Slider(0.8, 2, values[3], step=0.05, label=TEXTS.repetition_penalty)
            self.longest = gr.Slider(16, 4096, values[4], step=16, label=TEXTS.max_new_tokens)
            self.reset = gr.Button(TEXTS.reset, size="sm", elem_id="reset")
        with gr.Accordion(TEXTS.files, open=False):
            self.name = gr.Textbox("", label=TEXTS.rename, elem_id="name")
            self.markdown = gr.Button(TEXTS.export_markdown, size="sm", elem_id="export-markdown")
            self.json = gr.Button(TEXTS.export_json, size="sm", elem_id="export-json")
            self.import_ = gr.Button(TEXTS.import_json, size="sm", elem_id="import")
            self.text = gr.Textbox(visible="hidden", label="Exported text")
            self.file = gr.Textbox(visible="hidden", label="Exported file")

    def _setup(self) -> None:
        models = [(each.label, str(each.path)) for each in self.host.models]
        with gr.Accordion(TEXTS.setup, open=False):
            self.model = gr.Dropdown(models, value=models[0][1], label=TEXTS.model_dir, elem_id="model")
            self.device = gr.Radio(
                [self.host.first_device], value=self.host.first_device, label=TEXTS.device, elem_id="device"
            )
            self.refused = gr.HTML()
            self.load = gr.Button(TEXTS.load, variant="primary", size="sm", elem_id="load")

    def _recommended(self) -> list[float]:
        """The sliders' values: the command line's where given, else the model's."""
        model = self.host.model
        values = recommended(model.path if model else None)
        longest = 1024 if self._given.max_new_tokens is None else self._given.max_new_tokens
        names = ("temperature", "top_k", "top_p", "repetition_penalty")
        chosen = [getattr(self._given, name) for name in names]
        if self._given.greedy:
            chosen[0] = 0
        values_given = [values[name] if each is None else each for name, each in zip(names, chosen, strict=True)]
        return [*values_given, longest]

    def params(self, temperature: float, top_k: float, top_p: float, penalty: float, longest: float) -> Params:
        """Sampling as the sliders say."""
        return Params(
            max_new_tokens=int(longest),
            temperature=float(temperature),
            top_k=int(top_k),
            top_p=float(top_p),
            repetition_penalty=float(penalty),
            seed=self._given.seed,
            stop=self._given.stop,
        )

    def _connect(self) -> None:
        asking = [self.number, self.system, *self.sliders]
        shown = [self.question, self.number, self.list, self.chat, self.gauge]
        gr.on([self.question.submit, self.send.click], self.ask, [self.question, *asking], shown, **FREE)
        self.chat.retry(self.retry, asking, shown, **FREE)
        self.chat.edit(self.edit, asking, shown, **FREE)
        self.chat.undo(self.undo, [self.number], shown, **FREE)
        self.chat.clear(self.clear, [self.number], shown, **FREE)
        self.stop.click(self.halt, None, None, **AT_ONCE)
        self.number.change(None, [self.number], None, js=REMEMBER, **AT_ONCE)
        self.list.input(self.open_, [self.list], self.everything, **FREE)
        self.new.click(self.begin, None, self.everything, **FREE)
        self.delete.click(self.remove, [self.number], self.everything, **FREE)
        self.name.submit(self.rename, [self.number, self.name], [self.list], **FREE)
        self.name.blur(self.rename, [self.number, self.name], [self.list], **FREE)
        self.reset.click(self._recommended, None, self.sliders, **AT_ONCE)
        for button, write, suffix in ((self.markdown, to_markdown, "md"), (self.json, to_json, "json")):
            done = button.click(self._exporter(write, suffix), [self.number], [self.text, self.file], **FREE)
            done.then(None, [self.text, self.file], None, js=render.DOWNLOAD, **AT_ONCE)
        picked = self.import_.click(None, None, [self.text], js=render.PICK, **AT_ONCE)
        picked.then(self.take_in, [self.text], self.everything, **FREE)
        if self.host.remote is None:
            self.model.input(self.offer, [self.model], [self.device, self.refused], **FREE)
            self.load.click(self.switch, [self.model, self.device], None, **FREE).then(
                self._recommended, None, self.sliders, **AT_ONCE
            )

    # What the controls do. Gradio fills `request` and `event` in, by their annotations.

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
            render.bubbles(view),
            self._gauge(view),
        ]
        if self.host.remote is None:
            assert self.host.engine is not None
            choice = self.host.engine.choice
            parts.append(choice.model_dir)
        return parts

    def _gauge(self, view: View) -> str:
        return render.gauge(view, self.host.info.context_length)

    def _entries(self, owner: str, number: str) -> Any:
        entries = [(entry.name, str(entry.id)) for entry in self.talk.store.entries(owner)]
        return gr.update(choices=entries, value=number or None)

    def offer(self, model_dir: str) -> list[Any]:
        """The devices for a model."""
        rows = self.host.device_rows(model_dir)
        usable = [(row.label, row.name) for row in rows if not row.refused]
        assert self.host.engine is not None
        current = self.host.engine.choice.device
        value = current if current in [name for _, name in usable] else usable[0][1]
        return [gr.update(choices=usable, value=value), render.refused_devices(rows)]

    def offer_loaded(self) -> list[Any]:
        """The devices for the model that is loaded."""
        assert self.host.engine is not None
        return self.offer(self.host.engine.choice.model_dir)

    def switch(self, model_dir: str, device: str) -> None:
        """Load another model, or on another device."""
        with _told():
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
            conversation.question(str(event.value).strip())

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
                yield [box if first else skip, number if first else skip, entries, render.bubbles(view), meter]

    def halt(self, request: gr.Request) -> None:
        """Stop this tab's answer."""
        self.talk.stop(str(request.session_hash))

    def undo(self, number: str, request: gr.Request) -> list[Any]:
        """Take the last question and its answer away; the question goes back to where it was typed."""
        conversation = self._get(number, request)
        conversation.retry()
        question = conversation.turns[-1].content if conversation.turns else ""
        conversation.drop_question()
        return self._keep(number, conversation, request, question)

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
        return [question, number, self._entries(owner, number), render.bubbles(view), self._gauge(view)]

    def begin(self, request: gr.Request) -> list[Any]:
        """A new conversation; it is kept from its first question on."""
        return self._all(owner_of(request), "", Conversation(system=self._system))

    def remove(self, number: str, request: gr.Request) -> list[Any]:
        """Delete the conversation."""
        self.talk.stop(str(request.session_hash))
        if number:
            self.talk.store.delete(owner_of(request), int(number))
        return self.begin(request)

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
        def export(number: str, request: gr.Request) -> list[str]:
            conversation = self._get_for_reading(number, request)
            name = "".join(each if each.isalnum() else "-" for each in conversation.name).strip("-")
            return [write(conversation), f"{name or 'conversation'}.{suffix}"]

        return export

    def _get_for_reading(self, number: str, request: gr.Request) -> Conversation:
        return (self.talk.store.get(owner_of(request), int(number)) if number else None) or Conversation()

    def take_in(self, text: str, request: gr.Request) -> list[Any]:
        """Keep an imported conversation and show it."""
        owner = owner_of(request)
        if not text:
            return [gr.skip()] * len(self.everything)
        with _told():
            conversation = from_json(text)
        return self._all(owner, str(self.talk.store.add(owner, conversation)), conversation)
