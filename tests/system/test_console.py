"""Tables, sizes and bars on the terminal."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from ov_afm.system import console
from ov_afm.system.child_process import Progress, Step


def test_markdown_table_aligns_its_columns() -> None:
    table = console.markdown_table(["model", "size", "KL"], [["a", "1", "0.1"], ["b", "2", "0.2"]], "lr")
    assert table.splitlines() == [
        "| model | size | KL |",
        "| --- | ---: | ---: |",
        "| a | 1 | 0.1 |",
        "| b | 2 | 0.2 |",
    ]


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (999_999_999, "1000.0 MB"),
        (9.24e9, "9.24 GB"),
        (2e12, "2000.00 GB"),
    ],
)
def test_sizes_are_decimal(count: float, text: str) -> None:
    assert console.human_bytes(count) == text


class Recorder:
    """Stands in for `console.Progress`: what it would draw."""

    def __init__(self) -> None:
        self.drawn: list[Any] = []

    @contextmanager
    def step(self, name: str, unit: str = "") -> Iterator[Callable[..., None]]:
        """As `console.Progress.step`."""
        self.drawn.append(("begin", name, unit))
        yield lambda *, to, total: self.drawn.append((to, total))
        self.drawn.append(("end", name))


def test_step_bars_follow_the_steps_of_a_child() -> None:
    recorder = Recorder()
    with console.step_bars(recorder, {"a": "first", "b": "second"}, ("b",)) as show:  # type: ignore[arg-type]
        for event in (Progress(1, 2), Step("a"), Progress(1, 4), Progress(1, 0), Step("b"), Progress(2, 3), "other"):
            show(event)
    expected = [("begin", "first", ""), (1, 4), ("end", "first"), ("begin", "second", "B"), (2, 3), ("end", "second")]
    assert recorder.drawn == expected


def test_nothing_is_drawn_where_there_is_no_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    with console.load_display() as on_phase:
        on_phase("loading", 3.0)
        on_phase("compiling", None)
    with console.Progress() as progress, progress.step("hashing", total=2) as advance:
        advance(2)
    assert capfd.readouterr() == ("", "")


def test_progress_within_progress_draws_in_the_same_bars() -> None:
    with console.Progress() as outer:
        with outer as inner, inner.step("inner", total=1) as advance:
            advance(1)
        with outer.step("outer", total=2) as advance:
            advance(1)


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_progress_on_a_terminal_shows_share_amount_and_time_left() -> None:
    import pty

    main, secondary = pty.openpty()
    program = (
        "import time\nfrom ov_afm.system.console import Progress\n"
        "with Progress() as bars, bars.step('hashing', total=4_000_000, unit='B') as advance:\n"
        "    for _ in range(4): advance(1_000_000); time.sleep(0.15)\n"
    )
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "110", "PYTHONUTF8": "1"}
    process = subprocess.Popen([sys.executable, "-c", program], stderr=secondary, env=environment)
    os.close(secondary)
    drawn = b""
    while True:
        try:
            block = os.read(main, 65536)
        except OSError:
            break
        if not block:
            break
        drawn += block
    os.close(main)
    assert process.wait(10) == 0
    text = drawn.decode()
    assert "hashing" in text
    assert "100%" in text
    assert "4.0 MB" in text
    assert "left" in text


def test_long_work_without_a_terminal_writes_a_line_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(console, "QUIET_S", 0)
    with console.Progress() as progress, progress.step("scoring", total=4) as advance:
        advance(1)
        advance(1)
    assert capsys.readouterr().err == "scoring: 25% after 0 s\nscoring: done in 0 s\n"
    monkeypatch.setattr(console, "QUIET_S", 60)
    with console.Progress() as progress, progress.step("scoring", total=4) as advance:
        advance(1)
    assert capsys.readouterr().err == ""
