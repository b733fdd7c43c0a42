"""What all benchmarks share: a mistake is one line and exit status 1, only a bug has a traceback."""

from __future__ import annotations

import functools
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ov_afm.cli.command import command
from ov_afm.errors import ConfigError, OVAFMError, last_line


def program(main: Callable[[], int | None]) -> Callable[[], int]:
    """Make a benchmark's `main` behave as ov_afm's commands do, errors of packages, processes and OpenVINO included."""

    @command
    @functools.wraps(main)
    def run() -> int:
        try:
            return main() or 0
        except ModuleNotFoundError as error:
            raise ConfigError(f"the package {error.name} is missing; install what benchmarks need: .[dev]") from error
        except subprocess.CalledProcessError as error:
            raise OVAFMError(f"{Path(error.cmd[0]).name} ended with status {error.returncode}") from error
        except RuntimeError as error:
            # OpenVINO and its GenAI have no exceptions of their own; classes derived from this one are bugs.
            if type(error) is not RuntimeError:
                raise
            raise OVAFMError(last_line(error)) from error

    return run


def check_counts(options: Any, least: dict[str, int]) -> None:
    """Refuse options that are too small.

    Args:
        options: The parsed arguments; None and lists are allowed as values.
        least: Name of each option to the smallest value.

    Raises:
        ConfigError: One is smaller.
    """
    for name, smallest in least.items():
        values = getattr(options, name)
        for value in values if isinstance(values, list) else [values]:
            if value is not None and value < smallest:
                raise ConfigError(f"--{name.replace('_', '-')} must be at least {smallest}, found {value}")


def last_words(log: str) -> str:
    """What a process that failed printed last, which is the reason."""
    return next((line.strip() for line in reversed(log.splitlines()) if line.strip()), "no message")
