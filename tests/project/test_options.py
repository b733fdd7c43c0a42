"""Every option of every command reaches something: `given` leaves out, without a word, what no function takes."""

from __future__ import annotations

import argparse
import ast
import importlib
import inspect
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest

from ov_afm import cli

# Modules of `cli` whose functions take the arguments of the commands that import them.
SHARED = ("options", "recipe_options")


class Parsed(Exception):
    """Ends a command once its options are known."""


def parser_of(verb: str, monkeypatch: pytest.MonkeyPatch) -> argparse.ArgumentParser:
    parsers: list[argparse.ArgumentParser] = []

    def parse(self: argparse.ArgumentParser, *_: object, **__: object) -> None:
        parsers.append(self)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
    with pytest.raises(Parsed):
        cli.main([verb])
    return parsers[0]


def parameters(tree: ast.Module, module: ModuleType) -> Iterator[str]:
    """Names that the functions and classes take to which a module gives arguments by `given`."""
    names = dict(vars(module))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            source = importlib.import_module("." * node.level + (node.module or ""), module.__package__)
            for each in node.names:
                name = f"{source.__name__}.{each.name}"
                names[each.asname or each.name] = getattr(source, each.name, None) or importlib.import_module(name)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "given" and len(node.args) == 2:
            target: Any = eval(compile(ast.Expression(node.args[0]), "given", "eval"), names)
            yield from inspect.signature(target).parameters


def mentioned(tree: ast.Module) -> Iterator[str]:
    """Arguments that a module reads by name, as `args.NAME` or as a text that an operation takes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") in ("args", "arguments", "chosen"):
            yield node.attr
        found: list[ast.expr] = []
        if isinstance(node, ast.Subscript):
            found = [node.slice]
        elif isinstance(node, ast.Compare):
            found = [node.left, *getattr(node.comparators[0], "elts", [])]
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in (
            "get",
            "getattr",
        ):
            found = node.args
        elif isinstance(node, ast.BinOp):
            found = [each for side in (node.left, node.right) for each in getattr(side, "elts", [])]
        elif isinstance(node, ast.For):
            found = getattr(node.iter, "elts", [])
        yield from (each.value for each in found if isinstance(each, ast.Constant) and isinstance(each.value, str))


def used(verb: str) -> set[str]:
    module = importlib.import_module(cli.COMMANDS[verb][0])
    modules = [module]
    for name in SHARED:
        shared = importlib.import_module(f"ov_afm.cli.{name}")
        if any(getattr(value, "__module__", "") == shared.__name__ for value in vars(module).values()):
            modules.append(shared)
    names: set[str] = set()
    for each in modules:
        tree = ast.parse(inspect.getsource(each))
        names |= {*parameters(tree, each), *mentioned(tree)}
    return names


@pytest.mark.parametrize("verb", list(cli.COMMANDS))
def test_every_option_of_a_command_is_used(verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {action.dest for action in parser_of(verb, monkeypatch)._actions} - {"help"}
    assert options
    assert options - used(verb) == set(), f"ov-afm {verb} takes these and drops them"


def test_an_option_that_nothing_takes_would_be_found() -> None:
    assert "no_such_option" not in used("export")
    assert {"force", "adapters", "work_dir", "golden", "kinds", "ovms"} <= used("export")
