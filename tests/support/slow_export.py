"""`ov-afm export` whose conversion stops in a phase until it is killed: python slow_export.py PHASE READY_FILE ..."""

from __future__ import annotations

import importlib
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ov_afm.cli import export as export_command
from ov_afm.conversion import convert
from ov_afm.model_dir import model_directory
from ov_afm.system import child_process
from ov_afm.system.child_process import ChildProcess


def build(job: convert.Job, stop_in: str, ready: Path) -> convert.Converted:
    """Stands in for `convert.build`: writes a little in each phase and hangs in one."""
    for step in convert.STEPS:
        child_process.emit(child_process.Step(step))
        (job.output / f"{step}.bin").write_bytes(b"x" * 1000)
        (job.work / f"{step}.bin").write_bytes(b"x" * 1000)
        if step == stop_in:
            _stop(ready)
    return convert.Converted({}, {}, {})


def _stop(ready: Path) -> None:
    mark = ready.with_suffix(".tmp")
    mark.write_text(str(os.getpid()))
    mark.replace(ready)
    time.sleep(600)


def main() -> int:
    """Run the command with the slow conversion."""
    phase, ready = sys.argv[1], Path(sys.argv[2])
    run = ChildProcess.run

    def slow(self: ChildProcess, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        if function is not convert.build:
            return {"prompts": []}
        # This file runs as `__main__`; a child knows its functions by the name of the module.
        return run(self, importlib.import_module("slow_export").build, *arguments, phase, ready)

    ChildProcess.run = slow  # type: ignore[assignment, method-assign]
    if phase == "hashing":
        model_directory.scan = lambda *_: _stop(ready)  # type: ignore[assignment, return-value, misc]
    return export_command.main(sys.argv[3:])


if __name__ == "__main__":
    sys.exit(main())
