"""Functions of child processes, run in this process or not at all; and whether they wrote anything."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ov_afm.conversion import convert
from ov_afm.system.child_process import ChildProcess

__all__ = ["no_children", "run_in_process", "stamps"]


def run_in_process(patch: pytest.MonkeyPatch) -> None:
    """Let `ChildProcess.run` call in this process: imports that a child pays for each time are paid once."""

    def run(self: ChildProcess, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self.on_event is not None:
            patch.setattr(convert, "emit", self.on_event)
        function, args, kwargs = pickle.loads(pickle.dumps((function, args, kwargs)))
        return pickle.loads(pickle.dumps(function(*args, **kwargs)))

    patch.setattr(ChildProcess, "run", run)


def no_children(patch: pytest.MonkeyPatch) -> None:
    """Fail the test if any work starts in a child process."""

    def run(self: ChildProcess, function: Callable[..., Any], *_: Any, **__: Any) -> None:
        pytest.fail(f"{function.__name__} was started")

    patch.setattr(ChildProcess, "run", run)


def stamps(folder: Path) -> dict[str, tuple[int, int]]:
    """Time and inode of each file: the same afterwards where nothing was written."""
    return {path.name: (path.stat().st_mtime_ns, path.stat().st_ino) for path in folder.iterdir()}
