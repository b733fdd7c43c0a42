"""The layers of the design, read from the imports themselves."""

from __future__ import annotations

import ast
import fnmatch
import graphlib
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ov_afm.cli import COMMANDS

ROOT = Path(__file__).parent.parent / "ov_afm"
# From the lowest. A module imports from its own layer and from those below; a pattern stands for a family.
LAYERS = {
    "base": (
        "errors presets manifest console background quiet supervise paths staging resources interrupt card detokenize "
        "params engine_errors"
    ),
    "sources, devices, metrics": (
        "sources adapters checkpoint embedded gguf gguf_* hub hub_* devices device_* driver_faults selftest loading "
        "metrics stream energy bandwidth resources_used load_display sparsity.select "
        "sparsity.extension sparsity.aligned"
    ),
    "making and running models": (
        "export export_* convert verify compress calibration calibration_text self_sampling quantize recipe_options "
        "equalise rounding feedback fitted stored decoder_graph decoder_layer bundle info ovms synth prune_* sparsity "
        "sparsity.* pipeline generate upload"
    ),
    "programs": (
        "prune tune tune_* bench bench_* recommend evaluate evaluate_* eval_* report report_* serve serve.* chat chat.*"
    ),
    "doors": "cli __main__ __init__",
}
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
    "lm_eval",
    "matplotlib",
    "nncf",
    "openvino",
    "openvino_genai",
    "openvino_tokenizers",
    "peft",
    "optimum",
    "prometheus_client",
    "psutil",
    "pydantic",
    "ray",
    "rich",
    "safetensors",
    "starlette",
    "tokenizers",
    "torch",
    "transformers",
    "uvicorn",
}
# What an optional module is about may be imported at its top; nothing in the core imports that module at its own.
OPTIONAL = {
    "serve.*": {"fastapi", "prometheus_client", "pydantic", "ray", "starlette", "uvicorn"},
    "chat.page*": {"gradio"},
}


def modules() -> dict[str, ast.Module]:
    """Every module of the package by dotted name below `ov_afm`; a package by its own name."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        found[name.removesuffix(".__init__")] = ast.parse(path.read_text(encoding="utf-8"))
    return found


MODULES = modules()


def layer_of(name: str) -> int | None:
    for level, patterns in enumerate(LAYERS.values()):
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns.split()):
            return level
    return None


def top_level(tree: ast.Module) -> Iterator[ast.stmt]:
    """Statements that run on import: not those in functions, nor under `if TYPE_CHECKING` and the `-m` guard."""
    waiting: list[ast.AST] = list(tree.body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "__name__ == '__main__'"):
            continue
        if isinstance(node, ast.stmt):
            yield node
        waiting.extend(ast.iter_child_nodes(node))


def imported(name: str, nodes: Iterator[ast.AST]) -> set[str]:
    """Absolute names of what is imported, modules of the package as `ov_afm.x`."""
    package = ["ov_afm", *name.split(".")]
    if not (ROOT.joinpath(*name.split(".")) / "__init__.py").exists() and name != "__init__":
        package.pop()
    if name == "__init__":
        package = ["ov_afm"]
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            found.update(f"{origin}.{alias.name}" for alias in node.names)
    return found


def own(names: set[str]) -> set[str]:
    """Which modules of the package such names mean; `__version__` alone is the package's own."""
    found = set()
    for name in names:
        parts = name.split(".")
        if parts[0] != "ov_afm" or name == "ov_afm.__version__":
            continue
        while ".".join(parts[1:]) not in MODULES and len(parts) > 1:
            parts.pop()
        found.add(".".join(parts[1:]) or "__init__")
    return found


@pytest.mark.parametrize("name", MODULES)
def test_module_has_a_layer_and_imports_downwards(name: str) -> None:
    level = layer_of(name)
    assert level is not None, f"ov_afm.{name} stands in no layer of this test: decide where it belongs"
    used = own(imported(name, ast.walk(MODULES[name]))) - {name}
    upwards = {other for other in used if (layer_of(other) or 0) > level}
    assert not upwards, f"ov_afm.{name} imports from a layer above its own: {sorted(upwards)}"


def test_no_module_imports_itself_in_a_circle() -> None:
    graph = {name: own(imported(name, top_level(tree))) - {name} for name, tree in MODULES.items()}
    graphlib.TopologicalSorter(graph).prepare()


@pytest.mark.parametrize("name", MODULES)
def test_nothing_heavy_is_imported_with_a_module(name: str) -> None:
    allowed = {
        package for pattern, packages in OPTIONAL.items() if fnmatch.fnmatchcase(name, pattern) for package in packages
    }
    found = {other.partition(".")[0] for other in imported(name, top_level(MODULES[name]))}
    assert not found & HEAVY - allowed


def test_every_command_is_a_module_with_a_main() -> None:
    for verb, (module, summary) in COMMANDS.items():
        assert importlib.util.find_spec(module), f"ov-afm {verb}: no module {module}"
        name = module.removeprefix("ov_afm.")
        mains = [node for node in MODULES[name].body if isinstance(node, ast.FunctionDef) and node.name == "main"]
        assert len(mains) == 1, f"{module} has no main"
        assert [ast.unparse(decorator) for decorator in mains[0].decorator_list] == ["console.command"], module
        assert summary


def test_importing_the_command_line_loads_nothing_heavy() -> None:
    program = "import sys, ov_afm.cli; print(*{name.partition('.')[0] for name in sys.modules})"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert "ov_afm" in loaded
    assert not HEAVY & set(loaded)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("from . import manifest", {"manifest"}),
        ("from .sparsity.graph import Mlp", {"sparsity.graph"}),
        ("def f():\n    from .devices import check", {"devices"}),
        ("import ov_afm.export", {"export"}),
        ("from ov_afm import Pipeline", {"__init__"}),
        ("from . import __version__", set()),
    ],
)
def test_the_test_sees_every_form_of_import(source: str, expected: set[str]) -> None:
    assert own(imported("export", ast.walk(ast.parse(source)))) == expected
