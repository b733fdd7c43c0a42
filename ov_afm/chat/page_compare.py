"""The Compare tab: one question, two choices, one after the other."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import gradio as gr

from ..errors import OVAFMError
from ..params import Params
from .backend import figures_of
from .engine import Choice, Engine
from .guard import escape, plain
from .host import Host
from .texts import TEXTS, figures_line

__all__ = ["compare_tab"]

# Label and the figure's form, for the table.
ROWS: tuple[tuple[str, Callable[[dict[str, Any]], str]], ...] = (
    ("model", lambda each: f"{each['model']}, {each['precision']}"),
    ("device", lambda each: f"{each['device']}{', prompt lookup' if each['prompt_lookup'] else ''}"),
    ("first token", lambda each: f"{each['ttft_ms'] / 1000:.2f} s"),
    ("tokens/s", lambda each: f"{each['tokens_per_s']:.1f}" if each["tokens_per_s"] else "–"),
    ("tokens", lambda each: str(each["new_tokens"])),
    ("whole answer", lambda each: f"{each['total_ms'] / 1000:.1f} s"),
    ("loading", lambda each: f"{each['load_s']:.1f} s"),
)


def compare_tab(host: Host, params: Callable[..., Params], sliders: list[Any]) -> None:
    """Make the tab.

    Args:
        host: What is on offer.
        params: Sampling of the chat's sliders.
        sliders: Those sliders.
    """
    models = [(each.label, str(each.path)) for each in host.models]
    gr.Markdown(TEXTS.compare_intro, elem_classes="note")
    question = gr.Textbox(label=TEXTS.question, lines=2, elem_id="compare-question")
    chosen, answers = [], []
    with gr.Row():
        for name in ("A", "B"):
            with gr.Column(min_width=280), gr.Group():
                title = TEXTS.choice.format(name=name)
                model = gr.Dropdown(models, value=models[0][1], label=f"{title}: {TEXTS.model_dir}")
                device = gr.Dropdown(["CPU"], value="CPU", label=f"{title}: {TEXTS.device}")
                lookup = gr.Checkbox(name == "B", label=f"{title}: {TEXTS.lookup}")
                gr.on([model.input], _devices_for(host), [model], [device], **QUIET)
                chosen += [model, device, lookup]
    with gr.Row():
        go = gr.Button(TEXTS.compare, variant="primary", elem_id="compare-start")
        stop = gr.Button(TEXTS.cancel, variant="stop", elem_id="compare-cancel")
    table = gr.HTML(elem_id="compare-figures")
    with gr.Row():
        for name in ("A", "B"):
            with gr.Column(min_width=280):
                answers.append(gr.Markdown(elem_id=f"compare-{name}", sanitize_html=True, container=True))
    cancel = threading.Event()

    def run(text: str, *fields: Any) -> Iterator[list[Any]]:
        try:
            choices = [host.choice(*fields[at : at + 2], prompt_lookup=fields[at + 2]) for at in (0, 3)]
            if not text.strip():
                return
            cancel.clear()
            host.reserve(TEXTS.comparison)
        except OVAFMError as error:
            raise gr.Error(str(error), title="", print_exception=False) from error
        try:
            yield from compare(text.strip(), choices, params(*fields[6:]), cancel)
        finally:
            host.release()

    go.click(run, [question, *chosen, *sliders], [table, *answers], **QUIET)
    stop.click(cancel.set, None, None, queue=False, **QUIET)


QUIET = {"show_progress": "hidden", "api_visibility": "private"}


def _devices_for(host: Host) -> Callable[[str], Any]:
    def offer(model_dir: str) -> Any:
        names = [row.name for row in host.device_rows(model_dir) if not row.refused]
        return gr.update(choices=names, value=names[0])

    return offer


def compare(question: str, choices: list[Choice], params: Params, cancel: threading.Event) -> Iterator[list[Any]]:
    """Ask both choices; yields the table and the two answers, as they come."""
    shown: list[Any] = ["", "", ""]
    found: list[dict[str, Any]] = []
    for index, choice in enumerate(choices, 1):
        if cancel.is_set():
            return
        engine = Engine(choice)
        try:
            shown[0] = _table(found, f"{engine.info.model}: {engine.phase[0]}")
            yield shown
            engine.wait()
            load_s = engine.loaded_s
            shown[0] = _table(found, f"{engine.info.model} on {engine.info.device}")
            steps = engine.answer([{"role": "user", "content": question}], params, cancel)
            text = ""
            with contextlib.closing(steps):  # type: ignore[type-var]
                for step in steps:
                    text += step.text
                    shown[index] = plain(text)
                    if step.finish_reason is not None:
                        figures = dict(figures_of(step, engine.info))
                        found.append({**figures, "prompt_lookup": choice.prompt_lookup, "load_s": load_s})
                        shown[index] += f"\n\n*{plain(figures_line(figures))}*"
                    yield shown
        except OVAFMError as error:
            shown[index] = f"**{plain(' '.join(str(error).split()))}**"
            found.append({})
        finally:
            engine.close()
    shown[0] = _table(found, "")
    yield shown


def _table(found: list[dict[str, Any]], under_way: str) -> str:
    state = f'<p class="note" role="status">{escape(under_way)}…</p>' if under_way else ""
    if not any(found):
        return state
    head = "".join(f'<th scope="col">{name}</th>' for name in "AB"[: len(found)])
    rows = "".join(
        f'<tr><th scope="row">{label}</th>'
        + "".join(f"<td>{escape(form(each)) if each else '–'}</td>" for each in found)
        + "</tr>"
        for label, form in ROWS
    )
    return f'{state}<table class="figures"><thead><tr><td></td>{head}</tr></thead><tbody>{rows}</tbody></table>'
