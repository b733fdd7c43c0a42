"""`ov-afm export` whose conversion stops in a phase until it is killed: python slow_export.py PHASE READY_FILE ..."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

from ov_afm import export
from ov_afm.model_dir import manifest
from ov_afm.system import child_process

STEPS = ("tokenizer", "reading", "converting", "proving", "compressing", "verifying")


def build(bundle: str, work: str, stop_in: str, ready: str, **_: Any) -> dict[str, Any]:
    """Stands in for `convert.build`: writes a little in each phase and hangs in one."""
    for step in STEPS:
        child_process.emit("step", name=step)
        (Path(bundle) / f"{step}.bin").write_bytes(b"x" * 1000)
        (Path(work) / f"{step}.bin").write_bytes(b"x" * 1000)
        if step == stop_in:
            _stop(ready)
    return {"recipe": {}, "checks": {}}


def _stop(ready: str) -> None:
    mark = Path(ready).with_suffix(".tmp")
    mark.write_text(str(os.getpid()))
    mark.replace(ready)
    time.sleep(600)


def main() -> int:
    """Run the command with the slow conversion."""
    phase, ready = sys.argv[1:3]
    run = child_process.run

    def slow(target: str, arguments: dict[str, Any], **options: Any) -> Any:
        if target != "ov_afm.conversion.convert:build":
            return {"prompts": []}
        return run("slow_export:build", {**arguments, "stop_in": phase, "ready": ready}, **options)

    child_process.run = slow
    if phase == "hashing":
        manifest.scan = lambda *_: _stop(ready)  # type: ignore[assignment, return-value, misc]
    return sys.modules[export.__module__].main(sys.argv[3:])  # type: ignore[no-any-return]


if __name__ == "__main__":
    sys.exit(main())
