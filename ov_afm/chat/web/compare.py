"""The Compare tab: one question, two choices, one after the other."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import gradio as gr

from ...errors import DeviceError, OVAFMError
from ...runtime.sampling import Params
from ..backend import figures_of
from ..conversation import figures_line
from ..engine import Choice, Engine
from . import html
from .handlers import AT_ONCE, UNLIMITED, Handlers, errors_shown
from .rendering import as_html, as_text

__all__ = ["compare_tab"]

INTRODUCTION = (
    "Asks two choices the same question, one after the other. Each is loaded alone in a new process, warmed up and "
    "asked once with these sampling values, so that neither profits from the other. The chat waits meanwhile."
)
NAMES = ("A", "B")
LOADING_S = 0.5
NO_FIGURE = "–"
ROWS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "model": lambda figures: f"{figures['model']}, {figures['precision']}",
    "device": lambda figures: f"{figures['device']}{', prompt lookup' if figures['prompt_lookup'] else ''}",
    "first token": lambda figures: NO_FIGURE if figures["ttft_ms"] is None else f"{figures['ttft_ms'] / 1000:.2f} s",
    "tokens/s": lambda figures: f"{figures['tokens_per_s']:.1f}" if figures["tokens_per_s"] else NO_FIGURE,
    "tokens": lambda figures: str(figures["new_tokens"]),
    "whole answer": lambda figures: f"{figures['total_ms'] / 1000:.1f} s",
    "loading": lambda figures: f"{figures['load_s']:.1f} s",
}


def compare_tab(handlers: Handlers, sliders: list[Any]) -> list[tuple[Any, Any, Any]]:
    """Make the tab.

    Args:
        handlers: The handlers of the chat tab.
        sliders: The sampling sliders of the chat tab.

    Returns:
        Of each choice the components for model, device and refused devices, to be filled when a page is opened.
    """
    models = handlers.models
    first = models.first_device
    gr.Markdown(INTRODUCTION, elem_classes="note")
    question = gr.Textbox(label="Your question", lines=2, elem_id="compare-question")
    chosen, answers, offers = [], [], []
    with gr.Row():
        for name in NAMES:
            with gr.Column(min_width=280), gr.Group():
                title = f"Choice {name}"
                model = gr.Dropdown(models.choices, value=models.models[0].path, label=f"{title}: Model")
                device = gr.Dropdown([first], value=first, label=f"{title}: Device")
                refused = gr.HTML()
                lookup = gr.Checkbox(name == "B", label=f"{title}: Prompt lookup")
                model.input(handlers.offer_devices, [model, device], [device, refused], **UNLIMITED)
                chosen += [model, device, lookup]
                offers.append((model, device, refused))
    with gr.Row():
        start = gr.Button("Compare", variant="primary", elem_id="compare-start")
        stop = gr.Button("Cancel", elem_id="compare-cancel")
    table = gr.HTML(elem_id="compare-figures")
    with gr.Row():
        for name in NAMES:
            with gr.Column(min_width=280):
                answers.append(gr.HTML(elem_id=f"compare-{name}", elem_classes="message"))
    cancel = threading.Event()

    def run(text: str, *fields: Any) -> Iterator[list[Any]]:
        with errors_shown():
            choices = [models.choice(*fields[at : at + 2], prompt_lookup=fields[at + 2]) for at in (0, 3)]
            if not text.strip():
                return
            with models.reserve("a comparison"):
                cancel.clear()
                yield from compare(text.strip(), choices, handlers.params(*fields[6:]), cancel)

    start.click(run, [question, *chosen, *sliders], [table, *answers], **UNLIMITED)
    stop.click(cancel.set, None, None, **AT_ONCE)
    return offers


def compare(question: str, choices: list[Choice], params: Params, cancel: threading.Event) -> Iterator[list[Any]]:
    """Ask both choices; yields the table and the two answers, as they come."""
    answers = ["", ""]
    columns: list[Mapping[str, Any] | None] = []
    for index, choice in enumerate(choices):
        if cancel.is_set():
            break
        engine = Engine(choice)
        try:
            for status, answers[index], figures in _ask(engine, question, params, cancel):
                if figures:
                    columns.append(figures)
                yield [_table(columns, status), *answers]
        except OVAFMError as error:
            answers[index] = as_text(" ".join(str(error).split()))
            columns.append(None)
        finally:
            engine.close()
    yield [_table(columns, ""), *answers]


def _ask(
    engine: Engine, question: str, params: Params, cancel: threading.Event
) -> Iterator[tuple[str, str, Mapping[str, Any] | None]]:
    """Load a model and ask it; yields what it is doing, its answer so far, and at the end its figures."""
    while engine.state == "loading" and not cancel.is_set():
        yield f"{engine.info.model}: {html.loading(*engine.progress)}", "", None
        with contextlib.suppress(DeviceError):
            engine.wait(LOADING_S)
    if cancel.is_set():
        return
    engine.wait()
    status = f"{engine.info.model} on {engine.info.device}"
    text = ""
    with contextlib.closing(engine.answer([{"role": "user", "content": question}], params, cancel)) as steps:  # type: ignore[type-var]
        for step in steps:
            text += step.text
            if step.finish_reason is None:
                yield status, as_html(text), None
            else:
                figures = figures_of(step, engine.info)
                shown = as_html(text) + as_text(figures_line(figures))
                more = {"prompt_lookup": engine.choice.prompt_lookup, "load_s": engine.loaded_s}
                yield status, shown, {**figures, **more}


def _table(columns: list[Mapping[str, Any] | None], status: str) -> str:
    note = html.note(f"{status}…", "status") if status else ""
    if not any(columns):
        return note
    rows = [(label, [cell(each) if each else NO_FIGURE for each in columns]) for label, cell in ROWS.items()]
    return note + html.figures_table(NAMES[: len(columns)], rows)
