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
from ...errors import ConfigError, OVAFMError
from ...system.resources import require
from ..models import ModelManager
from ..store import data_dir
from ..strings import STRINGS
from . import html

__all__ = ["report_tab"]

EVENT: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private", "concurrency_limit": None}
POLL_S = 0.5
# Python loses an interrupt that comes in a destructor; a report is written in less time than this.
INTERRUPT_AGAIN_S = 10.0
PROMPT_TOKENS, NEW_TOKENS = 128, 32


def report_tab(models: ModelManager) -> None:
    """Make the tab."""
    first = models.models[0].path
    cancel = threading.Event()
    gr.Markdown(STRINGS.report_intro, elem_classes="note")
    with gr.Row(equal_height=True):
        model = gr.Dropdown(models.choices, value=first, label=STRINGS.model_dir, elem_id="report-model")
        runs = gr.Slider(1, 5, 3, step=1, label=STRINGS.report_runs, elem_id="report-runs")
        start = gr.Button(STRINGS.report_start, variant="primary", elem_id="report-start")
        stop = gr.Button(STRINGS.cancel, elem_id="report-cancel")
    progress = gr.HTML(elem_id="report-progress")
    frame = gr.HTML(_frame(first), elem_id="report-frame")

    def measure(model_dir: str, runs: float) -> Iterator[list[Any]]:
        try:
            require("bench", "matplotlib")
            models.choice(model_dir, "CPU")
            models.reserve(STRINGS.measurement)
        except OVAFMError as error:
            raise gr.Error(str(error), title="", print_exception=False) from error
        cancel.clear()
        try:
            for line in _measure(model_dir, int(runs), cancel):
                yield [line, gr.skip()]
            yield [gr.skip(), _frame(model_dir)]
        finally:
            models.release()

    start.click(measure, [model, runs], [progress, frame], **EVENT)
    stop.click(cancel.set, None, None, queue=False, **EVENT)
    model.input(_frame, [model], [frame], **EVENT)


def _folder(model_dir: str) -> Path:
    return data_dir() / "reports" / Path(model_dir).name


def _frame(model_dir: str) -> str:
    path = _folder(model_dir) / report.HTML_NAME
    if not path.exists():
        return html.note(STRINGS.report_none)
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
        line = STRINGS.report_progress.format(done=done, total=total, elapsed=time.monotonic() - start)
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
        yield html.note(STRINGS.report_cancelled, "status")
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
        if os.name == "nt":
            process.terminate()
        else:
            process.send_signal(signal.SIGINT)
