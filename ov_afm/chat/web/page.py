"""The chat's page: controls and what they do. It holds no model and keeps no state of its own.

When a tab is closed, Gradio closes the generator of its answer, which ends the generation. `Blocks.unload` and `State`
would tell of it too, but for them each tab keeps a connection open, and a browser opens six to one server.
"""

from __future__ import annotations

from typing import Any

import gradio as gr

from ...runtime.sampling import Params
from ..conversation import to_json, to_markdown
from ..session import Talk
from ..strings import TEXTS
from . import html
from .handlers import Actions

__all__ = ["build"]

HIDDEN = {"show_progress": "hidden", "api_visibility": "private"}
# Stop, and what only looks, must not wait behind answers.
AT_ONCE = {**HIDDEN, "queue": False}
FREE = {**HIDDEN, "concurrency_limit": None}
# A page that is being built sets its fields too; until it has asked, what is remembered must not be lost.
REMEMBER = "number => { if (window.recalled) sessionStorage.setItem('conversation', number); }"
# A page that is being left aborts its own connections, which Gradio then reports as errors.
RECALL = """() => {
  const tell = console.error;
  let left = false;
  console.error = (...parts) => { left ||= parts[0]?.name === 'AbortError'; if (!left) tell(...parts); };
  window.recalled = true;
  return [sessionStorage.getItem('conversation') || ''];
}"""
TICK_S = 1.0


def build(talk: Talk, params: Params, system: str) -> Any:
    """The page.

    Args:
        talk: The conversations.
        params: Sampling of the command line, over the model's own values.
        system: System prompt of a new conversation.
    """
    from .compare import compare_tab
    from .report import report_tab

    page = Page(talk, params, system)
    with gr.Blocks(title=TEXTS.title, analytics_enabled=False, fill_width=True) as blocks:
        with gr.Row(elem_id="head"):
            gr.HTML(f"<h1>{TEXTS.title}</h1>", elem_id="title")
            status = gr.HTML(html.status(talk.host), elem_id="status")
            restart = gr.Button(TEXTS.restart, size="sm", visible=False, elem_id="restart")
        with gr.Tabs():
            with gr.Tab(TEXTS.tab_chat):
                page.chat_tab()
            if talk.host.remote is None:
                with gr.Tab(TEXTS.tab_compare):
                    compared = compare_tab(talk.host, page.offer, page.params, page.sliders)
                with gr.Tab(TEXTS.tab_report):
                    report_tab(talk.host)

        def look(before: str) -> Any:
            now = html.status(talk.host)
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
            for model, device, refused in compared:
                blocks.load(page.offer, [model, device], [device, refused], **FREE)
    return blocks


class Page(Actions):
    """The chat tab.

    Args:
        talk: The conversations.
        params: Sampling of the command line.
        system: System prompt of a new conversation.
    """

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
        with gr.Row(equal_height=True, elem_id="ask"):
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
        self.number = gr.Textbox("", visible="hidden", label=TEXTS.conversation_number)

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
            self.text = gr.Textbox(visible="hidden", label=TEXTS.exported_text)
            self.file = gr.Textbox(visible="hidden", label=TEXTS.exported_file)

    def _setup(self) -> None:
        models = [(each.label, str(each.path)) for each in self.host.models]
        with gr.Accordion(TEXTS.setup, open=False):
            self.model = gr.Dropdown(models, value=models[0][1], label=TEXTS.model_dir, elem_id="model")
            self.device = gr.Radio(
                [self.host.first_device], value=self.host.first_device, label=TEXTS.device, elem_id="device"
            )
            self.refused = gr.HTML()
            self.load = gr.Button(TEXTS.load, variant="primary", size="sm", elem_id="load")

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
            done.then(None, [self.text, self.file], None, js=html.DOWNLOAD, **AT_ONCE)
        picked = self.import_.click(None, None, [self.text], js=html.PICK, **AT_ONCE)
        picked.then(self.take_in, [self.text], self.everything, **FREE)
        if self.host.remote is None:
            self.model.input(self.offer, [self.model, self.device], [self.device, self.refused], **FREE)
            self.load.click(self.switch, [self.model, self.device], None, **FREE).then(
                self._recommended, None, self.sliders, **AT_ONCE
            )
