"""The structure of the package: import-linter's contracts hold, and what they cannot say."""

from __future__ import annotations

import ast
import fnmatch
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from importlinter.api import read_configuration

from ov_afm.cli import COMMANDS

PROJECT = Path(__file__).parents[2]
ROOT = PROJECT / "ov_afm"
LINTER = read_configuration(str(PROJECT / "pyproject.toml"))
CONTRACTS: dict[str, dict[str, Any]] = {contract["id"]: contract for contract in LINTER["contracts_options"]}
# `python -m ov_afm.export` and `python -m ov_afm.compress` run the command of that name.
GUARDED = {"export", "compress"}
# Imported only when work needs them.
HEAVY = {
    "codecarbon",
    "datasets",
    "datasketch",
    "fastapi",
    "gguf",
    "gradio",
    "httpx",
    "huggingface_hub",
    "jinja2",
    "lm_eval",
    "matplotlib",
    "nncf",
    "openvino",
    "openvino_genai",
    "openvino_tokenizers",
    "optimum",
    "peft",
    "prometheus_client",
    "prompt_toolkit",
    "psutil",
    "pydantic",
    "ray",
    "rich",
    "safetensors",
    "sse_starlette",
    "starlette",
    "tokenizers",
    "torch",
    "transformers",
    "uvicorn",
}
# A module that is about an optional library may import it at its top; no core module imports such a module at its own.
OPTIONAL = {
    "serve.*": {"fastapi", "prometheus_client", "pydantic", "ray", "sse_starlette", "starlette", "uvicorn"},
    "chat.web.*": {"gradio", "jinja2"},
}


def modules() -> dict[str, ast.Module]:
    """Every module by its dotted name below `ov_afm`: `serve.app`, `serve` for a package, `""` for `ov_afm`."""
    parsed = {}
    for path in sorted(ROOT.rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        parsed["" if name == "__init__" else name.removesuffix(".__init__")] = ast.parse(path.read_text("utf-8"))
    return parsed


MODULES = modules()


def is_guard(node: ast.AST) -> bool:
    """Whether a statement is `if __name__ == "__main__":`."""
    return isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"


def run_on_import(tree: ast.Module) -> Iterator[ast.AST]:
    """Statements that an import runs: not those in functions, nor under `if TYPE_CHECKING` and the `-m` guard."""
    waiting: list[ast.AST] = list(tree.body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or is_guard(node):
            continue
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        yield node
        waiting.extend(ast.iter_child_nodes(node))


def imported(name: str, nodes: Iterator[ast.AST]) -> set[str]:
    """Absolute names of what is imported; `from ov_afm.x import y` gives `ov_afm.x.y`."""
    package = ["ov_afm", *(name.split(".") if name else [])]
    if name and not (ROOT.joinpath(*name.split(".")) / "__init__.py").exists():
        package.pop()
    names: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            names.update(f"{origin}.{alias.name}" for alias in node.names)
    return names


def heavy(names: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in names} & HEAVY


@pytest.mark.parametrize("contract", CONTRACTS)
def test_contract_is_kept(contract: str) -> None:
    program = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    command = [sys.executable, "-c", program, "--no-logo", "--no-cache", "--contract", contract]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=PROJECT)
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_linter_sees_the_modules_of_this_checkout() -> None:
    program = "import grimp; print(*sorted(grimp.build_graph('ov_afm', cache_dir=None).modules))"
    command = [sys.executable, "-c", program]
    seen = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True, cwd=PROJECT).stdout.split()
    assert seen == sorted(f"ov_afm.{name}".rstrip(".") for name in MODULES)


def test_contracts_excuse_only_the_two_modules_that_run_as_commands() -> None:
    excused = {line for contract in CONTRACTS.values() for line in contract.get("ignore_imports", ())}
    assert excused == {f"ov_afm.{name} -> ov_afm.cli" for name in GUARDED}


def test_package_has_seventeen_names() -> None:
    names = {
        path.stem for path in ROOT.iterdir() if path.suffix == ".py" or (path.is_dir() and path.name != "__pycache__")
    } - {"__init__", "__main__"}
    layers = {name.strip() for layer in CONTRACTS["layers"]["layers"] for name in layer.split("|")} - {"__main__"}
    assert names == layers
    assert len(names) <= 17


@pytest.mark.parametrize("name", MODULES)
def test_nothing_heavy_is_imported_with_a_module(name: str) -> None:
    allowed = {
        package for pattern, packages in OPTIONAL.items() if fnmatch.fnmatchcase(name, pattern) for package in packages
    }
    assert not heavy(imported(name, run_on_import(MODULES[name]))) - allowed


def test_importing_the_command_line_loads_nothing_heavy() -> None:
    program = "import sys, ov_afm.cli; print(*{name.partition('.')[0] for name in sys.modules})"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert "ov_afm" in loaded
    assert not HEAVY & set(loaded)


@pytest.mark.parametrize("name", sorted(MODULES.keys() - {"", "__main__"}))
def test_module_does_not_import_the_whole_package(name: str) -> None:
    """`ov_afm/__init__.py` imports the highest layers, and import-linter gives it no layer."""
    parts = {module.partition(".")[0] for module in MODULES} - {""}
    names = [other.split(".") for other in imported(name, ast.walk(MODULES[name]))]
    assert not [other for other in names if other[0] == "ov_afm" and (len(other) == 1 or other[1] not in parts)]


@pytest.mark.parametrize("name", [name for name in MODULES if name.split(".")[0] != "cli"])
def test_command_lines_are_in_cli_alone(name: str) -> None:
    assert "argparse" not in {other.partition(".")[0] for other in imported(name, ast.walk(MODULES[name]))}
    guards = [node for node in MODULES[name].body if is_guard(node)]
    assert len(guards) == (1 if name in GUARDED | {"__main__"} else 0)


@pytest.mark.parametrize("verb", COMMANDS)
def test_command_is_a_module_of_cli_with_a_main(verb: str) -> None:
    module, summary = COMMANDS[verb]
    assert importlib.util.find_spec(module), f"ov-afm {verb}: no module {module}"
    package, _, name = module.rpartition(".")
    assert package == "ov_afm.cli"
    tree = MODULES[f"cli.{name}"]
    mains = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "main"]
    assert len(mains) == 1, f"{module} has no main"
    assert [ast.unparse(decorator) for decorator in mains[0].decorator_list] == ["command"], module
    assert summary


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("from . import presets", {"ov_afm.presets"}),
        ("from .kernels.graph import Mlp", {"ov_afm.kernels.graph.Mlp"}),
        ("def f():\n    from .runtime import devices", {"ov_afm.runtime.devices"}),
        ("import ov_afm.export", {"ov_afm.export"}),
        ("from . import __version__", {"ov_afm.__version__"}),
    ],
)
def test_the_test_sees_every_form_of_import(source: str, expected: set[str]) -> None:
    assert imported("export", ast.walk(ast.parse(source))) == expected


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import torch.nn", {"torch"}),
        ("try:\n    from openvino import Core\nexcept ImportError:\n    pass", {"openvino"}),
        ("def f():\n    import torch", set()),
        ("if TYPE_CHECKING:\n    import torch", set()),
    ],
)
def test_the_test_sees_what_an_import_runs(source: str, expected: set[str]) -> None:
    assert heavy(imported("export", run_on_import(ast.parse(source)))) == expected
