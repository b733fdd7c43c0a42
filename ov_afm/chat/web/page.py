"""The chat's page: controls and what they do. It holds no model and keeps no state of its own.

When a tab is closed, Gradio closes the generator of its answer, which ends the generation. `Blocks.unload` and `State`
would report that too, but they keep a connection open for each tab, and a browser opens six to one server.
"""

from __future__ import annotations

from typing import Any

import gradio as gr

from ...runtime.sampling import Params
from ..conversation import to_json, to_markdown
from ..session import Session
from ..strings import STRINGS
from . import html
from .compare import compare_tab
from .handlers import Handlers
from .report import report_tab

__all__ = ["build"]

HIDDEN = {"show_progress": "hidden", "api_visibility": "private"}
# Stop, and what only looks, must not wait for answers.
AT_ONCE = {**HIDDEN, "queue": False}
UNLIMITED = {**HIDDEN, "concurrency_limit": None}
# What shows another conversation runs one after the other, so that the last press of a button decides what is shown.
IN_ORDER = {**HIDDEN, "concurrency_id": "conversation", "concurrency_limit": 1}
# A page that is being built sets its fields too; what is remembered must last until the page has read it.
REMEMBER = "number => { if (window.recalled) sessionStorage.setItem('conversation', number); }"
RECALL = "() => { window.recalled = true; return [sessionStorage.getItem('conversation') || '']; }"
TICK_S = 1.0


def build(session: Session, params: Params, system: str) -> Any:
    """The page.

    Args:
        session: The conversations.
        params: Sampling of the command line, over the model's own values.
        system: System prompt of a new conversation.
    """
    models = session.models
    handlers = Handlers(session, params, system)
    with gr.Blocks(title=STRINGS.title, analytics_enabled=False, fill_width=True) as blocks:
        with gr.Row(elem_id="head"):
            gr.HTML(f"<h1>{STRINGS.title}</h1>", elem_id="title")
            status = gr.HTML(html.status(models), elem_id="status")
            restart = gr.Button(STRINGS.restart, size="sm", visible=False, elem_id="restart")
        with gr.Tabs():
            with gr.Tab(STRINGS.tab_chat):
                page = Page(handlers)
            if models.remote is None:
                with gr.Tab(STRINGS.tab_compare):
                    compared = compare_tab(models, handlers.offer_devices, handlers.params, page.sliders)
                with gr.Tab(STRINGS.tab_report):
                    report_tab(models)

        def update_status(shown: str) -> Any:
            now = html.status(models)
            return gr.skip() if now == shown else (now, gr.update(visible=bool(models.problem)))

        def restart_engine() -> Any:
            models.restart()
            return update_status("")

        gr.Timer(TICK_S).tick(update_status, [status], [status, restart], **AT_ONCE)
        restart.click(restart_engine, None, [status, restart], **AT_ONCE)
        blocks.load(handlers.open_, [page.number], page.conversation, js=RECALL, **IN_ORDER)
        if models.remote is None:
            # On its own, because asking the drivers takes seconds the first time.
            blocks.load(handlers.offer_devices_of_loaded, None, [page.device, page.refused], **UNLIMITED)
            for model, device, refused in compared:
                blocks.load(handlers.offer_devices, [model, device], [device, refused], **UNLIMITED)
    return blocks


class Page:
    """The chat tab: makes the controls and connects them.

    Args:
        handlers: What the controls do.

    Attributes:
        number: The conversation of this tab, hidden.
        sliders: The sampling sliders, in the order of `handlers.SLIDERS`.
        conversation: The components that show a conversation.
        exchange: The components that change with questions and answers.
    """

    def __init__(self, handlers: Handlers) -> None:
        self._handlers, self._models = handlers, handlers.models
        with gr.Row():
            with gr.Column(scale=3, min_width=300):
                self._conversation_column()
            with gr.Column(scale=1, min_width=260):
                self._side_column()
        self.sliders = [self.temperature, self.top_k, self.top_p, self.penalty, self.longest]
        self.conversation = [self.number, self.list, self.name, self.system, self.chat, self.gauge]
        if self._models.remote is None:
            self.conversation.append(self.model)
        self.exchange = [self.question, self.number, self.list, self.chat, self.gauge]
        self._connect()

    def _conversation_column(self) -> None:
        remote = self._models.remote
        hint = STRINGS.empty_remote.format(url=remote.url) if remote else STRINGS.empty
        self.chat = gr.Chatbot(
            label=STRINGS.tab_chat,
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
        with gr.Row(equal_height=True, elem_id="ask"):
            self.question = gr.Textbox(
                "",
                label=STRINGS.question,
                placeholder=STRINGS.question_hint,
                lines=1,
                max_lines=8,
                scale=5,
                elem_id="question",
            )
            with gr.Column(scale=1, min_width=90, elem_id="send"):
                self.send = gr.Button(STRINGS.send, variant="primary", elem_id="send-button")
                self.stop = gr.Button(STRINGS.stop, variant="stop", elem_id="stop-button")
        # The browser's tab remembers it.
        self.number = gr.Textbox("", visible="hidden", label=STRINGS.conversation_number)

    def _side_column(self) -> None:
        self.list = gr.Dropdown([], label=STRINGS.conversations, elem_id="conversations")
        with gr.Row():
            self.new = gr.Button(STRINGS.new, size="sm", min_width=80, elem_id="new")
            self.delete = gr.Button(STRINGS.delete, size="sm", min_width=80, elem_id="delete")
        with gr.Accordion(STRINGS.system, open=False):
            self.system = gr.Textbox("", label=STRINGS.system, info=STRINGS.system_hint, lines=3, elem_id="system")
        if self._models.remote is None:
            self._setup()
        values = self._handlers.slider_values()
        with gr.Accordion(STRINGS.sampling, open=False):
            self.temperature = gr.Slider(0, 2, values[0], step=0.05, label=STRINGS.temperature)
            self.top_k = gr.Slider(0, 200, values[1], step=1, label=STRINGS.top_k)
            self.top_p = gr.Slider(0.05, 1, values[2], step=0.05, label=STRINGS.top_p)
            self.penalty = gr.Slider(0.8, 2, values[3], step=0.05, label=STRINGS.repetition_penalty)
            self.longest = gr.Slider(16, 4096, values[4], step=16, label=STRINGS.max_new_tokens)
            self.reset = gr.Button(STRINGS.reset, size="sm", elem_id="reset")
        with gr.Accordion(STRINGS.files, open=False):
            self.name = gr.Textbox("", label=STRINGS.rename, elem_id="name")
            self.markdown = gr.Button(STRINGS.export_markdown, size="sm", elem_id="export-markdown")
            self.json = gr.Button(STRINGS.export_json, size="sm", elem_id="export-json")
            self.import_ = gr.Button(STRINGS.import_json, size="sm", elem_id="import")
            self.text = gr.Textbox(visible="hidden", label=STRINGS.exported_text)
            self.file = gr.Textbox(visible="hidden", label=STRINGS.exported_file)

    def _setup(self) -> None:
        models, device = self._models, self._models.first_device
        with gr.Accordion(STRINGS.setup, open=False):
            self.model = gr.Dropdown(
                models.choices, value=models.models[0].path, label=STRINGS.model_dir, elem_id="model"
            )
            self.device = gr.Radio([device], value=device, label=STRINGS.device, elem_id="device")
            self.refused = gr.HTML()
            self.load = gr.Button(STRINGS.load, variant="primary", size="sm", elem_id="load")

    def _connect(self) -> None:
        do = self._handlers
        self._connect_answers()
        self.number.change(None, [self.number], None, js=REMEMBER, **AT_ONCE)
        self.list.input(do.choose, [self.list, self.number], self.conversation, **IN_ORDER)
        self.new.click(do.new, None, self.conversation, **IN_ORDER)
        self.delete.click(do.delete, [self.number], self.conversation, **IN_ORDER)
        for renamed in (self.name.submit, self.name.blur):
            renamed(do.rename, [self.number, self.name], [self.list], **UNLIMITED)
        self.reset.click(do.slider_values, None, self.sliders, **AT_ONCE)
        for button, write, suffix in ((self.markdown, to_markdown, "md"), (self.json, to_json, "json")):
            exported = button.click(do.exporter(write, suffix), [self.number], [self.text, self.file], **UNLIMITED)
            exported.then(None, [self.text, self.file], None, js=html.DOWNLOAD, **AT_ONCE)
        picked = self.import_.click(None, None, [self.text], js=html.PICK, **AT_ONCE)
        picked.then(do.import_, [self.text], self.conversation, **IN_ORDER)
        if self._models.remote is None:
            self.model.input(do.offer_devices, [self.model, self.device], [self.device, self.refused], **UNLIMITED)
            loading = self.load.click(do.load, [self.model, self.device], None, **UNLIMITED)
            loading.then(do.slider_values, None, self.sliders, **AT_ONCE)

    def _connect_answers(self) -> None:
        do, inputs = self._handlers, [self.number, self.system, *self.sliders]
        gr.on([self.question.submit, self.send.click], do.ask, [self.question, *inputs], self.exchange, **UNLIMITED)
        self.chat.retry(do.retry, inputs, self.exchange, **UNLIMITED)
        self.chat.edit(do.edit, inputs, self.exchange, **UNLIMITED)
        self.chat.undo(do.undo, [self.number], self.exchange, **UNLIMITED)
        self.chat.clear(do.clear, [self.number], self.exchange, **UNLIMITED)
        self.stop.click(do.stop, None, None, **AT_ONCE)
