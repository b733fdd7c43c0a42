"""The Compare tab: one question, two choices, one after the other."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import gradio as gr

from ...errors import DeviceError, OVAFMError
from ...runtime.sampling import Params
from ..backend import figures_of
from ..engine import Choice, Engine
from ..models import Host
from ..strings import TEXTS, figures_line
from . import html
from .security import escape, plain

__all__ = ["compare_tab"]

QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private", "concurrency_limit": None}
LOADING_S = 0.5
# The figures of the table's rows, in the order of `TEXTS.compare_rows`.
FORMS: tuple[Callable[[dict[str, Any]], str], ...] = (
    lambda each: f"{each['model']}, {each['precision']}",
    lambda each: f"{each['device']}{TEXTS.compare_lookup if each['prompt_lookup'] else ''}",
    lambda each: TEXTS.no_figure if each["ttft_ms"] is None else f"{each['ttft_ms'] / 1000:.2f} s",
    lambda each: f"{each['tokens_per_s']:.1f}" if each["tokens_per_s"] else TEXTS.no_figure,
    lambda each: str(each["new_tokens"]),
    lambda each: f"{each['total_ms'] / 1000:.1f} s",
    lambda each: f"{each['load_s']:.1f} s",
)


def compare_tab(
    host: Host, offer: Callable[[str, str], Any], params: Callable[..., Params], sliders: list[Any]
) -> list[tuple[Any, Any, Any]]:
    """Make the tab.

    Args:
        host: What is on offer.
        offer: The devices for a model, given the one chosen now, and those that are refused.
        params: Sampling of the chat's sliders.
        sliders: Those sliders.

    Returns:
        Of each choice the components for model, device and refused devices, to be filled when a page is opened.
    """
    models = [(each.label, str(each.path)) for each in host.models]
    gr.Markdown(TEXTS.compare_intro, elem_classes="note")
    question = gr.Textbox(label=TEXTS.question, lines=2, elem_id="compare-question")
    chosen, answers, offers = [], [], []
    first = host.first_device
    with gr.Row():
        for name in ("A", "B"):
            with gr.Column(min_width=280), gr.Group():
                title = TEXTS.choice.format(name=name)
                model = gr.Dropdown(models, value=models[0][1], label=f"{title}: {TEXTS.model_dir}")
                device = gr.Dropdown([first], value=first, label=f"{title}: {TEXTS.device}")
                refused = gr.HTML()
                lookup = gr.Checkbox(name == "B", label=f"{title}: {TEXTS.lookup}")
                model.input(offer, [model, device], [device, refused], **QUIET)
                chosen += [model, device, lookup]
                offers.append((model, device, refused))
    with gr.Row():
        go = gr.Button(TEXTS.compare, variant="primary", elem_id="compare-start")
        stop = gr.Button(TEXTS.cancel, elem_id="compare-cancel")
    table = gr.HTML(elem_id="compare-figures")
    with gr.Row():
        for name in ("A", "B"):
            with gr.Column(min_width=280):
                answers.append(gr.Markdown(elem_id=f"compare-{name}", sanitize_html=True))
    cancel = threading.Event()

    def run(text: str, *fields: Any) -> Iterator[list[Any]]:
        try:
            choices = [host.choice(*fields[at : at + 2], prompt_lookup=fields[at + 2]) for at in (0, 3)]
            if not text.strip():
                return
            host.reserve(TEXTS.comparison)
        except OVAFMError as error:
            raise gr.Error(str(error), title="", print_exception=False) from error
        cancel.clear()
        try:
            yield from compare(text.strip(), choices, params(*fields[6:]), cancel)
        finally:
            host.release()

    go.click(run, [question, *chosen, *sliders], [table, *answers], **QUIET)
    stop.click(cancel.set, None, None, queue=False, **QUIET)
    return offers


def compare(question: str, choices: list[Choice], params: Params, cancel: threading.Event) -> Iterator[list[Any]]:
    """Ask both choices; yields the table and the two answers, as they come."""
    shown: list[Any] = ["", "", ""]
    found: list[dict[str, Any]] = []
    for index, choice in enumerate(choices, 1):
        if cancel.is_set():
            break
        engine = Engine(choice)
        try:
            while engine.state == "loading" and not cancel.is_set():
                shown[0] = _table(found, f"{engine.info.model}: {html.loading(*engine.progress)}")
                yield shown
                with contextlib.suppress(DeviceError):
                    engine.wait(LOADING_S)
            if cancel.is_set():
                break
            engine.wait()
            load_s = engine.loaded_s
            shown[0] = _table(found, TEXTS.compare_on.format(model=engine.info.model, device=engine.info.device))
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
        f'<tr><th scope="row">{escape(label)}</th>'
        + "".join(f"<td>{escape(form(each)) if each else TEXTS.no_figure}</td>" for each in found)
        + "</tr>"
        for label, form in zip(TEXTS.compare_rows, FORMS, strict=True)
    )
    return f'{state}<table class="figures"><thead><tr><td></td>{head}</tr></thead><tbody>{rows}</tbody></table>'
