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
from . import conversation_view, html
from .compare import compare_tab
from .handlers import AT_ONCE, IN_ORDER, SLIDERS, UNLIMITED, Handlers
from .report import report_tab

__all__ = ["THEME", "build"]

TITLE = "ov_afm chat"
# A page that is being built sets its fields too; what is remembered must last until the page has read it.
REMEMBER = "number => { if (window.recalled) sessionStorage.setItem('conversation', number); }"
RECALL = "() => { window.recalled = true; return [sessionStorage.getItem('conversation') || '']; }"
TICK_S = 1.0
# Sans-serif of the system: Gradio's themes fetch their fonts from other sites. Gradio's own light colours have less
# contrast than people need (WCAG: 4.5).
THEME = gr.themes.Default(
    primary_hue="blue",
    neutral_hue="slate",
    font=("system-ui", "Segoe UI", "DejaVu Sans", "sans-serif"),
    font_mono=("ui-monospace", "Consolas", "DejaVu Sans Mono", "monospace"),
).set(
    body_text_color_subdued="*neutral_600",
    button_primary_background_fill="*primary_700",
    button_primary_background_fill_hover="*primary_800",
    button_cancel_background_fill="#b91c1c",
    button_cancel_background_fill_hover="#991b1b",
)


def build(session: Session, params: Params, system: str) -> Any:
    """The page.

    Args:
        session: The conversations.
        params: Sampling of the command line, over the model's own values.
        system: System prompt of a new conversation.
    """
    models = session.models
    handlers = Handlers(session, params, system)
    with gr.Blocks(title=TITLE, analytics_enabled=False, fill_width=True) as blocks:
        with gr.Row(elem_id="head"):
            gr.HTML(f"<h1>{TITLE}</h1>", elem_id="title")
            status = gr.HTML(html.status(models), elem_id="status")
            restart = gr.Button("Start the engine again", size="sm", visible=False, elem_id="restart")
        with gr.Tabs():
            with gr.Tab("Chat"):
                page = Page(handlers)
            if models.remote is None:
                with gr.Tab("Compare"):
                    compared = compare_tab(handlers, page.sliders)
                with gr.Tab("Report"):
                    report_tab(models)

        def update_status(shown: str) -> Any:
            now = html.status(models)
            return gr.skip() if now == shown else (now, gr.update(visible=bool(models.problem)))

        def restart_engine() -> Any:
            models.restart()
            return update_status("")

        gr.Timer(TICK_S).tick(update_status, [status], [status, restart], **AT_ONCE)
        restart.click(restart_engine, None, [status, restart], **AT_ONCE)
        opened = blocks.load(handlers.open_, [page.number], page.conversation, js=RECALL, **IN_ORDER)
        opened.then(handlers.rejoin, [page.number], page.exchange, **UNLIMITED)
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
        self.conversation = [self.number, self.list, self.name, self.system, self.chat, self.gauge]
        if self._models.remote is None:
            self.conversation.append(self.model)
        self.exchange = [self.question, self.number, self.list, self.chat, self.gauge]
        self._connect()

    def _conversation_column(self) -> None:
        remote = self._models.remote
        hint = f"Questions go to {remote.url}." if remote else "Nothing leaves this machine."
        self.chat = conversation_view.component(f"Ask something. {hint}")
        self.gauge = gr.HTML(elem_id="gauge")
        with gr.Row(equal_height=True, elem_id="ask"):
            self.question = gr.Textbox(
                "",
                label="Your question",
                placeholder="Enter sends, Shift-Enter begins a new line",
                lines=1,
                max_lines=8,
                scale=5,
                elem_id="question",
            )
            with gr.Column(scale=1, min_width=90, elem_id="send"):
                self.send = gr.Button("Send", variant="primary", elem_id="send-button")
                self.stop = gr.Button("Stop", variant="stop", elem_id="stop-button")
        # The browser's tab remembers it.
        self.number = gr.Textbox("", visible="hidden", label="Conversation number")

    def _side_column(self) -> None:
        self.list = gr.Dropdown([], label="Conversations", elem_id="conversations")
        with gr.Row():
            self.new = gr.Button("New", size="sm", min_width=80, elem_id="new")
            self.delete = gr.Button("Delete", size="sm", min_width=80, elem_id="delete")
        with gr.Accordion("System prompt", open=False):
            hint = "What the model reads before the conversation"
            self.system = gr.Textbox("", label="System prompt", info=hint, lines=3, elem_id="system")
        if self._models.remote is None:
            self._setup()
        values = self._handlers.slider_values()
        with gr.Accordion("Sampling", open=False):
            self.sliders = [
                gr.Slider(least, greatest, value, step=step, label=label)
                for (label, least, greatest, step), value in zip(SLIDERS.values(), values, strict=True)
            ]
            self.reset = gr.Button("Reset to the model's values", size="sm", elem_id="reset")
        with gr.Accordion("Export and import", open=False):
            self.name = gr.Textbox("", label="Name of this conversation", elem_id="name")
            self.markdown = gr.Button("Export as Markdown", size="sm", elem_id="export-markdown")
            self.json = gr.Button("Export as JSON", size="sm", elem_id="export-json")
            self.import_ = gr.Button("Import JSON", size="sm", elem_id="import")
            self.text = gr.Textbox(visible="hidden", label="Exported text")
            self.file = gr.Textbox(visible="hidden", label="Exported file")

    def _setup(self) -> None:
        models, device = self._models, self._models.first_device
        with gr.Accordion("Model and device", open=False):
            self.model = gr.Dropdown(models.choices, value=models.models[0].path, label="Model", elem_id="model")
            self.device = gr.Radio([device], value=device, label="Device", elem_id="device")
            self.refused = gr.HTML()
            self.load = gr.Button("Load", variant="primary", size="sm", elem_id="load")

    def _connect(self) -> None:
        do = self._handlers
        self._connect_answers()
        self.number.change(None, [self.number], None, js=REMEMBER, **AT_ONCE)
        chosen = self.list.input(do.choose, [self.list, self.number], self.conversation, **IN_ORDER)
        chosen.then(do.rejoin, [self.number], self.exchange, **UNLIMITED)
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
