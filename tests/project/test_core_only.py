"""An installation with only the core dependencies runs models; what needs more names the extra to install."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
from support import environments
from support.environments import CONSTRAINTS, ROOT, call, install, requirements

# The server and the chat's page may import what their extras install, and nothing else.
OPTIONAL = {
    "ov_afm.serve.": ("fastapi", "starlette", "pydantic", "uvicorn", "prometheus_client", "sse_starlette", "ray"),
    "ov_afm.chat.web.": ("gradio", "jinja2"),
}
EXTRAS = ("torch", "transformers", "optimum", "nncf", "fastapi", "gradio", "matplotlib", "ray")
pytestmark = [pytest.mark.slow, pytest.mark.network]


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python of an environment with the core dependencies and a wheel of this package: what users get."""
    core = environments.environment("core", *requirements("dependencies"), "-c", str(CONSTRAINTS))
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, source)
        else:
            (source / name).write_text("")
    for name in ("ov_afm", "csrc"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.so", "build"))
    install(
        core,
        "--reinstall-package" if shutil.which("uv") else "--force-reinstall",
        *(["ov-afm"] if shutil.which("uv") else []),
        "--no-deps",
        source,
    )
    return core


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """Nothing of this machine's own packages or checkout."""
    return {
        **{key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
        "OV_AFM_CACHE": str(tmp_path / "cache"),
    }


def test_environment_has_no_extra(python: Path) -> None:
    program = f"import importlib.util as u; print([name for name in {EXTRAS!r} if u.find_spec(name)])"
    assert call(python, "-c", program, cwd=python.parent).stdout.strip() == "[]"


def test_every_core_module_is_in_the_wheel_and_imports(
    python: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    modules = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in (ROOT / "ov_afm").rglob("*.py")
    }
    program = (
        "import importlib, json, sys\n"
        "failed = {}\n"
        "for name in json.loads(sys.argv[1]):\n"
        "    try: importlib.import_module(name)\n"
        "    except ModuleNotFoundError as error: failed[name] = error.name\n"
        "print(json.dumps(failed))\n"
    )
    names = sorted(name for name in modules if not name.endswith("__main__"))
    result = call(python, "-c", program, json.dumps(names), cwd=tmp_path, env=environment)
    assert result.returncode == 0, result.stderr
    failed = json.loads(result.stdout)
    allowed = [(part, package) for part, packages in OPTIONAL.items() for package in packages]
    assert {
        name: missing
        for name, missing in failed.items()
        if not any(name.startswith(part) and missing == package for part, package in allowed)
    } == {}


def test_commands_run(python: Path, environment: dict[str, str], tiny_model: Path, tmp_path: Path) -> None:
    program = python.with_name("ov-afm.exe" if sys.platform == "win32" else "ov-afm")
    helped = call(program, "--help", cwd=tmp_path, env=environment)
    assert (helped.returncode, helped.stderr) == (0, "")
    shown = call(program, "info", tiny_model, "--json", cwd=tmp_path, env=environment)
    assert shown.returncode == 0, shown.stderr
    assert json.loads(shown.stdout)["recipe"]["name"] == "int8"
    answered = call(
        program, "generate", tiny_model, "hello", "--max-new-tokens", "5", "--greedy", cwd=tmp_path, env=environment
    )
    assert answered.returncode == 0, answered.stderr
    # Random weights may end their answer at once; the line end is there all the same.
    assert answered.stdout.endswith("\n")


@pytest.mark.parametrize("verb", ["export", "compress"])
def test_making_a_model_names_the_extra(
    python: Path, environment: dict[str, str], tiny_checkpoint: Path, tmp_path: Path, verb: str
) -> None:
    result = call(python, "-m", "ov_afm", verb, tiny_checkpoint, "-o", tmp_path / "out", cwd=tmp_path, env=environment)
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("ov-afm: error: ")
    assert result.stderr.endswith(" not installed; run: pip install 'ov-afm[export]'\n")
    assert not (tmp_path / "out").exists()
