"""What every command shares: one-line errors, exit status, logging, and the form of its help."""

from __future__ import annotations

import argparse
import functools
import logging
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from inspect import signature
from typing import Any, NoReturn, ParamSpec

from ..errors import OVAFMError
from ..system import console
from ..system.os_errors import explained
from ..system.telemetry import silence

__all__ = ["command", "command_parser", "given"]

P = ParamSpec("P")


def command(main: Callable[P, int]) -> Callable[P, int]:
    """Make a verb's `main` behave as a command: errors as one line, and the exit status that fits.

    0 done, 1 an `OVAFMError` or something that the operating system refused, 2 wrong usage (argparse), 130 interrupted.
    A bug keeps its traceback.
    """

    @functools.wraps(main)
    def run(*args: P.args, **kwargs: P.kwargs) -> int:
        silence()
        console.any_encoding()
        logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", stream=sys.stderr)
        try:
            status = main(*args, **kwargs)
            sys.stdout.flush()
            return status
        except OVAFMError as error:
            return _failed(error)
        except KeyboardInterrupt:
            print("ov-afm: interrupted", file=sys.stderr)
            return 130
        except BrokenPipeError:
            # The reader of a pipe has gone; Python would complain once more while it exits.
            _drop_output()
            return 0
        except OSError as error:
            shown = explained(error)
            if shown is None:
                raise
            with suppress(OSError):
                sys.stdout.flush()
                return _failed(shown)
            # What cannot be written is standard output; Python would complain once more while it exits.
            _drop_output()
            return _failed(shown)

    return run


def _failed(error: OVAFMError) -> int:
    print(f"ov-afm: error: {' '.join(str(error).split())}", file=sys.stderr)
    return 1


def _drop_output() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults that tell something: not that an option is absent, nor what its help already says."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if "(default" in (action.help or "") or action.default in (None, "", []) or isinstance(action.default, bool):
            return action.help
        if isinstance(action.default, list):
            return f"{action.help} (default: {' '.join(map(str, action.default))})"
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong with a command line, without a page of usage."""

    def error(self, message: str) -> NoReturn:
        """End with status 2."""
        self.exit(2, f"{self.prog}: error: {message}; {self.prog} --help shows the options\n")


def command_parser(verb: str, description: str) -> argparse.ArgumentParser:
    """An argument parser that calls itself `ov-afm VERB` and shows defaults."""
    return Parser(prog=f"ov-afm {verb}", description=description, formatter_class=HelpFormatter)


def given(target: Callable[..., Any], arguments: argparse.Namespace) -> dict[str, Any]:
    """The options that were given and are named like a parameter of a function, or a field of a dataclass.

    Lists, which argparse makes of repeated values, become tuples.
    """
    values = {name: value for name, value in vars(arguments).items() if name in signature(target).parameters}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
