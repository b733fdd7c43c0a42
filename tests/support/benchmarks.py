"""The programs of benchmarks/, as modules."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[2] / "benchmarks"


def load(name: str) -> Any:
    """One of them; those that it imports are found beside it."""
    if str(FOLDER) not in sys.path:
        sys.path.append(str(FOLDER))
    return importlib.import_module(name)


def run(name: str, *arguments: object, monkeypatch: Any) -> int:
    """Call a program's `main` in this process; returns its exit status."""
    module = load(name)
    monkeypatch.setattr(sys, "argv", [str(FOLDER / f"{name}.py"), *map(str, arguments)])
    status: int = module.main()
    return status
