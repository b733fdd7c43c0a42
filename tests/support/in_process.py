"""Functions of child processes, run in this process."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import pytest

from ov_afm.conversion import convert
from ov_afm.system.child_process import ChildProcess

__all__ = ["run_in_process"]


def run_in_process(patch: pytest.MonkeyPatch) -> None:
    """Let `ChildProcess.run` call in this process: imports that a child pays for each time are paid once."""

    def run(self: ChildProcess, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self.on_event is not None:
            patch.setattr(convert, "emit", self.on_event)
        function, args, kwargs = pickle.loads(pickle.dumps((function, args, kwargs)))
        return pickle.loads(pickle.dumps(function(*args, **kwargs)))

    patch.setattr(ChildProcess, "run", run)
