"""Separate Python environments, for packages that cannot be installed beside the project's."""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import sys
import venv
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CONSTRAINTS = ROOT / "constraints.txt"


def call(*command: str | Path, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=400, **options)  # type: ignore[call-overload, no-any-return]


def install(python: Path, *arguments: str | Path) -> None:
    if uv := shutil.which("uv"):
        result = call(uv, "pip", "install", "--python", python, *arguments)
    else:
        result = call(python, "-m", "pip", "install", "--progress-bar", "off", *arguments)
    _succeeded(result)


def _succeeded(result: subprocess.CompletedProcess[str]) -> None:
    if result.returncode:
        if re.search(r"(?i)network|connection|dns|resolve host|timed out", result.stderr):
            pytest.skip("the package index is not reached")
        pytest.fail(result.stderr[-2000:])


def environment(name: str, *requirements: str) -> Path:
    """Python of `.venv-NAME` with these packages.

    It is kept in the repository's folder, ignored by git, until the requirements change: making it takes up to a minute
    and 300 MB.
    """
    folder = ROOT / f".venv-{name}"
    python = folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")

    def make() -> None:
        venv.create(folder, with_pip=shutil.which("uv") is None)
        install(python, *requirements)

    _made(folder, [*requirements, CONSTRAINTS.read_text(), sys.version], make)
    return python


def node_environment(name: str, *packages: str) -> Path:
    """A folder `.venv-node-NAME` with these npm packages, kept like an environment; a script in it can import them."""
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("Node.js is not installed")
    folder = ROOT / f".venv-node-{name}"

    def make() -> None:
        folder.mkdir()
        (folder / "package.json").write_text('{"private": true, "type": "module"}')
        quiet = ("--no-audit", "--no-fund", "--ignore-scripts", "--loglevel", "error")
        _succeeded(call(npm, "install", *quiet, *packages, cwd=folder))

    _made(folder, list(packages), make)
    return folder


def _made(folder: Path, key: list[str], make: Callable[[], None]) -> None:
    """Make a folder unless it was made for the same key."""
    stamp = folder / "made-for"
    expected = hashlib.sha256("\n".join(key).encode()).hexdigest()
    if not stamp.exists() or stamp.read_text() != expected:
        shutil.rmtree(folder, ignore_errors=True)
        make()
        stamp.write_text(expected)


def requirements(group: str) -> list[str]:
    """The lines of a list of requirements in pyproject.toml: `dependencies`, or an extra's name."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    return re.findall(r'"([^"]+)"', re.search(rf"^{group} = \[(.*?)^\]", text, re.MULTILINE | re.DOTALL)[1])  # type: ignore[index]


def node_packages(name: str, *packages: str) -> Path:
    """A folder whose `node_modules` has these npm packages, given as `NAME@VERSION`; kept like an environment."""
    npm = shutil.which("npm")
    if npm is None or shutil.which("node") is None:
        pytest.skip("Node.js and npm are not installed")
    folder = ROOT / f".venv-node-{name}"
    stamp, expected = folder / "made-for", "\n".join(packages)
    if not stamp.exists() or stamp.read_text() != expected:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        (folder / "package.json").write_text('{"private": true, "type": "module"}\n')
        result = call(npm, "install", "--no-audit", "--no-fund", "--ignore-scripts", *packages, cwd=folder)
        if result.returncode:
            if re.search(r"(?i)ENOTFOUND|ECONN|ETIMEDOUT|EAI_AGAIN|network", result.stderr):
                pytest.skip("the npm registry is not reached")
            pytest.fail(result.stderr[-2000:])
        stamp.write_text(expected)
    return folder
