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
from ..engine import Choice, Engine
from ..models import ModelManager
from ..strings import STRINGS, figures_line
from . import html
from .security import neutralize

__all__ = ["compare_tab"]

EVENT: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private", "concurrency_limit": None}
NAMES = ("A", "B")
LOADING_S = 0.5
# The cells of the table's rows, in the order of `STRINGS.compare_rows`.
CELLS: tuple[Callable[[Mapping[str, Any]], str], ...] = (
    lambda figures: f"{figures['model']}, {figures['precision']}",
    lambda figures: f"{figures['device']}{STRINGS.compare_lookup if figures['prompt_lookup'] else ''}",
    lambda figures: STRINGS.no_figure if figures["ttft_ms"] is None else f"{figures['ttft_ms'] / 1000:.2f} s",
    lambda figures: f"{figures['tokens_per_s']:.1f}" if figures["tokens_per_s"] else STRINGS.no_figure,
    lambda figures: str(figures["new_tokens"]),
    lambda figures: f"{figures['total_ms'] / 1000:.1f} s",
    lambda figures: f"{figures['load_s']:.1f} s",
)


def compare_tab(
    models: ModelManager,
    offer_devices: Callable[[str, str], Any],
    params: Callable[..., Params],
    sliders: list[Any],
) -> list[tuple[Any, Any, Any]]:
    """Make the tab.

    Args:
        models: What is on offer.
        offer_devices: The devices for a model, given the one chosen now, and those that are refused.
        params: Sampling of the chat's sliders.
        sliders: Those sliders.

    Returns:
        Of each choice the components for model, device and refused devices, to be filled when a page is opened.
    """
    first = models.first_device
    gr.Markdown(STRINGS.compare_intro, elem_classes="note")
    question = gr.Textbox(label=STRINGS.question, lines=2, elem_id="compare-question")
    chosen, answers, offers = [], [], []
    with gr.Row():
        for name in NAMES:
            with gr.Column(min_width=280), gr.Group():
                title = STRINGS.choice.format(name=name)
                model = gr.Dropdown(models.choices, value=models.models[0].path, label=f"{title}: {STRINGS.model_dir}")
                device = gr.Dropdown([first], value=first, label=f"{title}: {STRINGS.device}")
                refused = gr.HTML()
                lookup = gr.Checkbox(name == "B", label=f"{title}: {STRINGS.lookup}")
                model.input(offer_devices, [model, device], [device, refused], **EVENT)
                chosen += [model, device, lookup]
                offers.append((model, device, refused))
    with gr.Row():
        start = gr.Button(STRINGS.compare, variant="primary", elem_id="compare-start")
        stop = gr.Button(STRINGS.cancel, elem_id="compare-cancel")
    table = gr.HTML(elem_id="compare-figures")
    with gr.Row():
        for name in NAMES:
            with gr.Column(min_width=280):
                answers.append(gr.Markdown(elem_id=f"compare-{name}", sanitize_html=True))
    cancel = threading.Event()

    def run(text: str, *fields: Any) -> Iterator[list[Any]]:
        try:
            choices = [models.choice(*fields[at : at + 2], prompt_lookup=fields[at + 2]) for at in (0, 3)]
            if not text.strip():
                return
            models.reserve(STRINGS.comparison)
        except OVAFMError as error:
            raise gr.Error(str(error), title="", print_exception=False) from error
        cancel.clear()
        try:
            yield from compare(text.strip(), choices, params(*fields[6:]), cancel)
        finally:
            models.release()

    start.click(run, [question, *chosen, *sliders], [table, *answers], **EVENT)
    stop.click(cancel.set, None, None, queue=False, **EVENT)
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
            answers[index] = f"**{neutralize(' '.join(str(error).split()))}**"
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
    load_s = engine.loaded_s
    status = STRINGS.compare_on.format(model=engine.info.model, device=engine.info.device)
    text = ""
    with contextlib.closing(engine.answer([{"role": "user", "content": question}], params, cancel)) as steps:  # type: ignore[type-var]
        for step in steps:
            text += step.text
            if step.finish_reason is None:
                yield status, neutralize(text), None
            else:
                figures = figures_of(step, engine.info)
                shown = f"{neutralize(text)}\n\n*{neutralize(figures_line(figures))}*"
                yield status, shown, {**figures, "prompt_lookup": engine.choice.prompt_lookup, "load_s": load_s}


def _table(columns: list[Mapping[str, Any] | None], status: str) -> str:
    note = html.note(f"{status}…", "status") if status else ""
    if not any(columns):
        return note
    rows = [
        (label, [cell(figures) if figures else STRINGS.no_figure for figures in columns])
        for label, cell in zip(STRINGS.compare_rows, CELLS, strict=True)
    ]
    return note + html.figures_table(NAMES[: len(columns)], rows)
