"""What every command shares: one-line errors, exit status, logging, and the form of its help."""

from __future__ import annotations

import argparse
import functools
import logging
import os
import sys
from collections.abc import Callable, Sequence
from typing import Protocol

from ..errors import OVAFMError
from ..system.telemetry import silence

__all__ = ["command", "parser"]


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
