"""Messages and progress bars on the terminal.

Results go to standard output; everything here goes to standard error. A bar is drawn only on a
terminal; elsewhere long work is silent.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["Progress", "human_bytes", "note"]


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


class Progress:
    """Progress bars with rate and time left, on a terminal; one line a finished step elsewhere.

    Example:
        with Progress() as progress, progress.step("hashing", total=size, unit="B") as advance:
            advance(4096)
    """

    def __enter__(self) -> Progress:
        """Start drawing."""
        from rich import progress as bars
        from rich.console import Console

        self._bars = bars.Progress(
            bars.TextColumn("{task.description:<28}"),
            bars.BarColumn(),
            bars.TaskProgressColumn(),
            bars.TextColumn("{task.fields[amount]}"),
            bars.TimeElapsedColumn(),
            bars.TextColumn("left"),
            bars.TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=not sys.stderr.isatty(),
        )
        self._bars.start()
        return self

    def __exit__(self, *exc: object) -> None:
        """Stop drawing."""
        self._bars.stop()

    @contextmanager
    def step(self, description: str, total: float | None = None, unit: str = "") -> Iterator[Callable[..., None]]:
        """One bar; yields `advance(amount)` (or `advance(to=absolute, total=new_total)`)."""
        task = self._bars.add_task(description, total=total, amount="")

        def advance(amount: float = 0, *, to: float | None = None, total: float | None = None) -> None:
            change: dict[str, Any] = {"advance": amount} if to is None else {"completed": to}
            if total is not None:
                change["total"] = total
            self._bars.update(task, **change)
            if unit == "B":
                self._bars.update(task, amount=human_bytes(self._bars.tasks[task].completed))

        yield advance
        row = self._bars.tasks[task]
        self._bars.update(task, total=row.total or 1, completed=row.total or 1)
