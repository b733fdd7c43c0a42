"""Messages and progress bars on the terminal.

Results go to standard output; everything here goes to standard error. A bar is drawn only on a
terminal; elsewhere a step that takes long writes a line now and then, and one when it is done.
"""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from . import child_process

__all__ = ["Progress", "any_encoding", "human_bytes", "load_display", "markdown_table", "note", "step_bars"]

# Without a terminal, quicker steps say nothing, and longer ones so often.
QUIET_S = 15.0
EVERY_S = 30.0


def any_encoding() -> None:
    """Let output that cannot show a character (Windows' code pages, ASCII) show a question mark instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.encoding.lower().replace("-", "") != "utf8":
            stream.reconfigure(errors="replace")


def note(message: str) -> None:
    """Tell the user something that is neither a result nor an error."""
    print(message, file=sys.stderr, flush=True)


def human_bytes(count: float) -> str:
    """A size for people, in decimal units as disks and model cards have them."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def markdown_table(headers: Sequence[str], rows: Iterable[Sequence[str]], align: str = "l") -> str:
    """A Markdown table.

    Args:
        headers: Titles of the columns.
        rows: Cells, as many as titles; Markdown in them stays.
        align: A letter for each column, `l` for left or `r` for right; the last one counts for all that follow.
    """
    rules = ["---:" if letter == "r" else "---" for letter in align.ljust(len(headers), align[-1])]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (headers, rules, *rows))


class Progress:
    """Progress bars with the time left, on a terminal; elsewhere a line now and then.

    Example:
        with Progress() as progress, progress.step("hashing", total=size, unit="B") as advance:
            advance(4096)
    """

    def __init__(self) -> None:
        self._depth = 0

    def __enter__(self) -> Progress:
        """Start drawing; where it is drawing already, for a caller, do nothing."""
        self._depth += 1
        if self._depth > 1:
            return self
        from rich import progress as bars
        from rich.console import Console

        text = bars.TextColumn
        share = (bars.BarColumn(), bars.TaskProgressColumn(), text("{task.fields[amount]}"))
        times = (bars.TimeElapsedColumn(), text("left"), bars.TimeRemainingColumn())
        columns = (text("{task.description:<28}"), *share, *times)
        self._bars = bars.Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty())
        self._bars.start()
        return self

    def __exit__(self, *exc: object) -> None:
        """Stop drawing, except for a caller that still draws."""
        self._depth -= 1
        if not self._depth:
            self._bars.stop()

    @contextmanager
    def step(self, description: str, total: float | None = None, unit: str = "") -> Iterator[Callable[..., None]]:
        """One bar; yields `advance(amount)` (or `advance(to=absolute, total=new_total)`)."""
        task = self._bars.add_task(description, total=total, amount="")
        begun = said = time.monotonic()

        def say(text: str, after_s: float) -> None:
            nonlocal said
            now = time.monotonic()
            if self._bars.disable and now - said >= after_s:
                note(f"{description}: {text} {now - begun:.0f} s")
                said = now

        def advance(amount: float = 0, *, to: float | None = None, total: float | None = None) -> None:
            change: dict[str, Any] = {"advance": amount} if to is None else {"completed": to}
            if total is not None:
                change["total"] = total
            self._bars.update(task, **change)
            row = self._bars.tasks[task]
            if unit == "B":
                self._bars.update(task, amount=human_bytes(row.completed))
            if row.total:
                share = row.completed / row.total
                say(f"{share:.0%} after", EVERY_S if said > begun else QUIET_S)

        yield advance
        row = self._bars.tasks[task]
        self._bars.update(task, total=row.total or 1, completed=row.total or 1)
        if time.monotonic() - begun >= QUIET_S:
            say("done in", 0)


@contextmanager
def step_bars(
    progress: Progress, names: Mapping[str, str] | None = None, in_bytes: Sequence[str] = ()
) -> Iterator[Callable[[object], None]]:
    """Draw a bar for each step that a child process reports; yields what takes its events.

    A `Step` ends one bar and begins the next, a `Progress` moves it.

    Args:
        progress: Where to draw.
        names: What people read for a step, where that is not its own name.
        in_bytes: Steps whose progress is counted in bytes.
    """
    titles = names or {}
    advance: Callable[..., None] | None = None
    with ExitStack() as stack:

        def on_event(event: object) -> None:
            nonlocal advance
            if isinstance(event, child_process.Step):
                stack.close()
                unit = "B" if event.name in in_bytes else ""
                advance = stack.enter_context(progress.step(titles.get(event.name, event.name), unit=unit))
            elif isinstance(event, child_process.Progress) and event.total and advance:
                advance(to=event.done, total=event.total)

        yield on_event


@contextmanager
def load_display() -> Iterator[Callable[[str, float | None], None]]:
    """On a terminal, a line with what loading does, for how long, and how long it took last time; gone when it is done.

    Example:
        with load_display() as on_phase:
            pipeline = Pipeline(model_dir, on_phase=on_phase)
    """
    from rich import progress as bars
    from rich.console import Console

    text = bars.TextColumn
    columns = (bars.SpinnerColumn(), text("{task.description}"), bars.TimeElapsedColumn(), text("{task.fields[last]}"))
    console = Console(stderr=True)
    with bars.Progress(*columns, console=console, transient=True, disable=not sys.stderr.isatty()) as display:

        def on_phase(name: str, last_s: float | None) -> None:
            for task in display.task_ids:
                display.remove_task(task)
            display.add_task(name, total=None, last="" if last_s is None else f"(last time {last_s:.0f} s)")

        yield on_phase
