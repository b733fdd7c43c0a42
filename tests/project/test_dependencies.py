"""What the code imports is declared in pyproject.toml, and what is declared has a tested version."""

from __future__ import annotations

import ast
import re
import sys
from importlib import metadata
from pathlib import Path

from support.environments import CONSTRAINTS, ROOT, requirements

GROUPS = ("dependencies", "export", "serve", "scale", "heal", "bench", "eval", "chat", "dev")
# Comes with a declared package, and is part of its interface.
PART_OF = {"pydantic_core": "pydantic", "tokenizers": "transformers", "datasets": "lm-eval"}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def declared() -> set[str]:
    lines = [line for group in GROUPS for line in requirements(group)]
    return {normal(re.match(r"[\w.-]+", line)[0]) for line in lines} - {"ov-afm"}  # type: ignore[index]


def imported(folder: Path) -> set[str]:
    """Top-level names that the modules of a folder import, at any place."""
    names: set[str] = set()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
                names.add(node.module.partition(".")[0])
    return names - set(sys.stdlib_module_names) - {"ov_afm", "__future__"}


def test_every_imported_package_is_declared() -> None:
    distributions = metadata.packages_distributions()
    missing = {
        name
        for name in imported(ROOT / "ov_afm")
        if not {normal(each) for each in distributions.get(name, [name])} & declared()
        and normal(PART_OF.get(name, name)) not in declared()
    }
    assert missing == set()


def test_every_declared_package_has_a_tested_version() -> None:
    pinned = {normal(line.partition("==")[0]) for line in CONSTRAINTS.read_text().splitlines() if "==" in line}
    assert declared() - pinned == set()
