"""Shows on a terminal what loading does, for how long, and how long it took last time; silent elsewhere."""

from __future__ import annotations

import sys
from typing import Any

__all__ = ["LoadDisplay"]


class LoadDisplay:
    """A line on standard error that goes away when loading is done.

    Example:
        with LoadDisplay() as on_phase:
            pipeline = Pipeline(model_dir, on_phase=on_phase)
    """

    def __enter__(self) -> LoadDisplay:
        """Start drawing."""
        from rich import progress
        from rich.console import Console

        self._bars = progress.Progress(
            progress.SpinnerColumn(),
            progress.TextColumn("{task.description}"),
            progress.TimeElapsedColumn(),
            progress.TextColumn("{task.fields[last]}"),
            console=Console(stderr=True),
            transient=True,
            disable=not sys.stderr.isatty(),
        )
        self._bars.start()
        self._current: Any = None
        return self

    def __call__(self, name: str, last_s: float | None) -> None:
        """Show a step that begins; the one before is over."""
        if self._current is not None:
            self._bars.remove_task(self._current)
        last = "" if last_s is None else f"(last time {last_s:.0f} s)"
        self._current = self._bars.add_task(name, total=None, last=last)

    def __exit__(self, *exc: object) -> None:
        """Stop drawing."""
        self._bars.stop()
