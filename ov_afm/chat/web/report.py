"""The Report tab: the last comparison of devices, and a new one with progress and cancel."""

from __future__ import annotations

import contextlib
import json
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

from ...bench import plan as bench_plan
from ...bench import report
from ...bench.records import FILE_NAME
from ...errors import OVAFMError
from ...system.resources import require
from ..models import Host
from ..store import data_dir
from ..strings import TEXTS
from .security import escape

__all__ = ["report_tab"]

QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private", "concurrency_limit": None}
POLL_S = 0.5
PROMPT_TOKENS, NEW_TOKENS = 128, 32


def report_tab(host: Host) -> None:
    """Make the tab."""
    models = [(each.label, str(each.path)) for each in host.models]
    running: list[subprocess.Popen[bytes]] = []
    cancelled = threading.Event()
    gr.Markdown(TEXTS.report_intro, elem_classes="note")
    with gr.Row(equal_height=True):
        model = gr.Dropdown(models, value=models[0][1], label=TEXTS.model_dir, elem_id="report-model")
        runs = gr.Slider(1, 5, 3, step=1, label=TEXTS.report_runs, elem_id="report-runs")
        start = gr.Button(TEXTS.report_start, variant="primary", elem_id="report-start")
        stop = gr.Button(TEXTS.cancel, elem_id="report-cancel")
    bar = gr.HTML(elem_id="report-progress")
    frame = gr.HTML(_frame(Path(models[0][1])), elem_id="report-frame")

    def measure(model_dir: str, runs: float) -> Iterator[list[Any]]:
        try:
            require("bench", "matplotlib")
            host.choice(model_dir, "CPU")
            host.reserve(TEXTS.measurement)
        except OVAFMError as error:
            raise gr.Error(str(error), title="", print_exception=False) from error
        cancelled.clear()
        try:
            for line in _measure(Path(model_dir), int(runs), running, cancelled):
                yield [line, gr.skip()]
            yield [gr.skip(), _frame(Path(model_dir))]
        finally:
            host.release()

    def end() -> None:
        cancelled.set()
        for process in running:
            _interrupt(process)

    start.click(measure, [model, runs], [bar, frame], **QUIET)
    stop.click(end, None, None, queue=False, **QUIET)
    model.input(lambda path: _frame(Path(path)), [model], [frame], **QUIET)


def folder_of(model_dir: Path) -> Path:
    """Where the report of a model is kept."""
    return data_dir() / "reports" / model_dir.name


def _frame(model_dir: Path) -> str:
    path = folder_of(model_dir) / report.HTML_NAME
    if not path.exists():
        return f'<p class="note">{TEXTS.report_none}</p>'
    page = escape(path.read_text(encoding="utf-8"))
    # The report is a page of its own, without scripts; the sandbox makes sure of it.
    return f'<iframe class="report" sandbox title="{TEXTS.report_frame}" srcdoc="{page}"></iframe>'


def _measure(
    model_dir: Path, runs: int, running: list[subprocess.Popen[bytes]], cancelled: threading.Event
) -> Iterator[str]:
    """Run `ov-afm bench` in a process of its own; yields its progress."""
    folder = folder_of(model_dir)
    settings = bench_plan.Settings(prompt_tokens=(PROMPT_TOKENS,), new_tokens=NEW_TOKENS, runs=runs)
    plans = bench_plan.read_models((model_dir,), None)
    total = sum(
        runs for row in bench_plan.combinations(plans, settings) if not bench_plan.obstacle(row, plans[0], settings)
    )
    sizes = ["--prompt-tokens", str(PROMPT_TOKENS), "--new-tokens", str(NEW_TOKENS), "--runs", str(runs)]
    command = [sys.executable, "-m", "ov_afm", "bench", str(model_dir), *sizes, "--report", str(folder)]
    begun = time.monotonic()
    _clear_other(folder, runs)
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True)
    running.append(process)
    try:
        while process.poll() is None:
            yield _progress(_done(folder), total, time.monotonic() - begun)
            time.sleep(POLL_S)
    finally:
        running.remove(process)
        if process.poll() is None:
            _interrupt(process)
        assert process.stderr is not None
        said = process.stderr.read().decode("utf-8", "replace").strip().splitlines()
    if process.returncode == 0:
        yield _progress(_done(folder), total, time.monotonic() - begun)
    elif cancelled.is_set():
        yield f'<p class="note" role="status">{TEXTS.report_cancelled}</p>'
    else:
        yield f'<p class="note" role="alert">{escape(said[-1] if said else process.returncode)}</p>'


def _clear_other(folder: Path, runs: int) -> None:
    """A report of other settings makes room; one of these is gone on with, or measured anew if it is complete."""
    records = _records(folder)
    complete = (folder / report.HTML_NAME).exists() and len(records) >= runs
    if records and (complete or records[0].get("runs_asked") != runs):
        for name in (FILE_NAME, report.HTML_NAME, report.MARKDOWN_NAME):
            (folder / name).unlink(missing_ok=True)


def _records(folder: Path) -> list[dict[str, Any]]:
    with contextlib.suppress(OSError, ValueError):
        return [json.loads(line) for line in (folder / FILE_NAME).read_text(encoding="utf-8").splitlines()]
    return []


def _done(folder: Path) -> int:
    return sum(record.get("status") == "ok" for record in _records(folder))


def _progress(done: int, total: int, elapsed_s: float) -> str:
    line = TEXTS.report_progress.format(done=done, total=total, elapsed=elapsed_s)
    share = 100 * done / total if total else 100
    return f'<div class="gauge" role="status"><div class="bar"><div style="width:{share:.0f}%"></div></div>{line}</div>'


def _interrupt(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(OSError):
        if os.name == "nt":
            process.terminate()
        else:
            process.send_signal(signal.SIGINT)
