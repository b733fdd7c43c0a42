"""The Report tab: the last comparison of devices, and a new one with progress and cancel."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from ...bench import records, report
from ...bench.plan import Settings, combinations, obstacle, read_models
from ...errors import ConfigError
from ...system.resources import require
from ..models import ModelManager
from ..store import data_dir
from . import html
from .handlers import AT_ONCE, UNLIMITED, errors_shown

__all__ = ["report_tab"]

INTRODUCTION = (
    "Measures the model on every device that can run it. It takes minutes; the chat's engine is unloaded meanwhile."
)
POLL_S = 0.5
# Python loses an interrupt that comes in a destructor; a report is written in less time than this.
INTERRUPT_AGAIN_S = 10.0
PROMPT_TOKENS, NEW_TOKENS = 128, 32


def report_tab(models: ModelManager) -> None:
    """Make the tab."""
    first = models.models[0].path
    cancel = threading.Event()
    gr.Markdown(INTRODUCTION, elem_classes="note")
    with gr.Row(equal_height=True):
        model = gr.Dropdown(models.choices, value=first, label="Model", elem_id="report-model")
        runs = gr.Slider(1, 5, 3, step=1, label="Runs of each", elem_id="report-runs")
        start = gr.Button("Measure now", variant="primary", elem_id="report-start")
        stop = gr.Button("Cancel", elem_id="report-cancel")
    progress = gr.HTML(elem_id="report-progress")
    frame = gr.HTML(_frame(first), elem_id="report-frame")

    def measure(model_dir: str, runs: float) -> Iterator[list[Any]]:
        with errors_shown():
            require("bench", "matplotlib")
            models.choice(model_dir, "CPU")
            with models.reserve("a measurement"):
                cancel.clear()
                for line in _measure(model_dir, int(runs), cancel):
                    yield [line, gr.skip()]
                yield [gr.skip(), _frame(model_dir)]

    start.click(measure, [model, runs], [progress, frame], **UNLIMITED)
    stop.click(cancel.set, None, None, **AT_ONCE)
    model.input(_frame, [model], [frame], **UNLIMITED)


def _folder(model_dir: str) -> Path:
    return data_dir() / "reports" / Path(model_dir).name


def _frame(model_dir: str) -> str:
    path = _folder(model_dir) / report.HTML_NAME
    if not path.exists():
        return html.note("No report yet.")
    return html.report_frame(path.read_text(encoding="utf-8"))


def _measure(model_dir: str, runs: int, cancel: threading.Event) -> Iterator[str]:
    """Run `ov-afm bench` in a process of its own; yields its progress."""
    folder = _folder(model_dir)
    settings = Settings(prompt_tokens=(PROMPT_TOKENS,), new_tokens=NEW_TOKENS, runs=runs)
    (model,) = read_models([model_dir])
    total = runs * sum(not obstacle(each, model, settings) for each in combinations([model], settings))
    sizes = ["--prompt-tokens", str(PROMPT_TOKENS), "--new-tokens", str(NEW_TOKENS), "--runs", str(runs)]
    command = [sys.executable, "-m", "ov_afm", "bench", model_dir, *sizes, "--report", str(folder)]
    start = time.monotonic()

    def progress() -> str:
        done = sum(record["status"] == "ok" for record in _records(folder))
        line = f"{done} of {total} runs measured, {time.monotonic() - start:.0f} s"
        return html.progress(done, total, line)

    _clear_other(folder, runs)
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True)
    interrupted_at: float | None = None
    try:
        while process.poll() is None:
            now = time.monotonic()
            if cancel.is_set() and (interrupted_at is None or now - interrupted_at >= INTERRUPT_AGAIN_S):
                interrupted_at = now
                _interrupt(process)
            yield progress()
            time.sleep(POLL_S)
    finally:
        # The tab was closed. A second interrupt would keep a cancelled measurement from writing its report.
        if process.poll() is None and interrupted_at is None:
            _interrupt(process)
        assert process.stderr is not None
        messages = process.stderr.read().decode("utf-8", "replace").strip().splitlines()
    if process.returncode == 0:
        yield progress()
    elif cancel.is_set():
        yield html.note("Cancelled; the next measurement continues from here.", "status")
    else:
        yield html.note(messages[-1] if messages else str(process.returncode), "alert")


def _clear_other(folder: Path, runs: int) -> None:
    """Delete a report of other settings, or a complete one; an interrupted one of these settings is continued."""
    measured = _records(folder)
    complete = (folder / report.HTML_NAME).exists() and len(measured) >= runs
    if measured and (complete or measured[0].get("runs_asked") != runs):
        for name in (records.FILE_NAME, report.HTML_NAME, report.MARKDOWN_NAME):
            (folder / name).unlink(missing_ok=True)


def _records(folder: Path) -> list[records.Record]:
    with contextlib.suppress(ConfigError):
        return records.read(folder / records.FILE_NAME)
    return []


def _interrupt(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(OSError):
        process.send_signal(signal.SIGTERM if os.name == "nt" else signal.SIGINT)
