"""What every command shares: one-line errors, exit status, logging, progress bars.

Results go to standard output; everything here goes to standard error. A bar is drawn only on a
terminal; elsewhere long work is silent.
"""

from __future__ import annotations

import argparse
import functools
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from ..errors import OVAFMError
from .telemetry import silence

__all__ = ["Progress", "command", "human_bytes", "note", "parser"]


class Main(Protocol):
    """A verb's entry point."""

    def __call__(self, argv: Sequence[str] | None = None) -> int:
        """Run with the given arguments, the program's own if None; returns the exit status."""


def command(main: Callable[[Sequence[str] | None], int]) -> Main:
    """Make a verb's `main` behave as a command: errors as one line, and the exit status that fits.

    0 done, 1 an `OVAFMError`, 2 wrong usage (argparse), 130 interrupted. A bug keeps its traceback.
    """

    @functools.wraps(main)
    def run(argv: Sequence[str] | None = None) -> int:
        silence()
        logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", stream=sys.stderr)
        try:
            return main(argv)
        except OVAFMError as error:
            print(f"ov-afm: error: {' '.join(str(error).split())}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            print("ov-afm: interrupted", file=sys.stderr)
            return 130
        except BrokenPipeError:
            # The reader of a pipe has gone; Python would complain once more while it exits.
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            return 0

    return run


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults that tell something: not that an option is absent, nor what its help already says."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if "(default" in (action.help or "") or action.default in (None, "", []) or isinstance(action.default, bool):
            return action.help
        if isinstance(action.default, list):
            return f"{action.help} (default: {' '.join(map(str, action.default))})"
        return super()._get_help_string(action)


def parser(verb: str, description: str) -> argparse.ArgumentParser:
    """An argument parser that calls itself `ov-afm VERB` and shows defaults."""
    return argparse.ArgumentParser(prog=f"ov-afm {verb}", description=description, formatter_class=HelpFormatter)


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
