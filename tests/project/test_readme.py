"""What the README tells people to type exists and works."""

from __future__ import annotations

import functools
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from ov_afm import cli

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(?:sh|console|powershell)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
CALL = re.compile(r"(?:^|[\\/\s$])(?:ov-afm |python -m ov_afm[. ])(.*)")
# A model directory in an example, to be replaced by a real one.
EXAMPLE_MODEL = re.compile(r"AFM-4\.5B-int4|afm-int4|models/smollm2")


def commands() -> list[str]:
    """Every ov-afm command line of the README, from blocks and from inline code, comments cut off."""
    lines = [line for block in BLOCKS for line in re.sub(r"\\\n\s*", " ", block).splitlines()]
    lines += re.findall(r"`((?:ov-afm|python -m ov_afm[. ])[^`]*)`", README)
    calls = [match[1] for line in lines if (match := CALL.search(line.split(" #")[0]))]
    return sorted({command.strip().replace("\\", "/") for command in calls})


@functools.cache
def help_of(verb: str) -> str:
    command = [sys.executable, "-m", "ov_afm", verb, "--help"]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout


def test_readme_shows_the_main_commands() -> None:
    assert {shlex.split(command)[0] for command in commands()} >= {"export", "generate", "info", "compress"}


@pytest.mark.parametrize("module", sorted(set(re.findall(r"python -m (ov_afm\.\w+)", README))))
def test_module_that_readme_runs_is_one_with_a_command(module: str) -> None:
    result = subprocess.run([sys.executable, "-m", module, "--help"], capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith(f"usage: ov-afm {module.removeprefix('ov_afm.')}")


@pytest.mark.parametrize("command", commands())
def test_command_exists_with_its_options(command: str) -> None:
    verb, *arguments = shlex.split(command)
    assert verb in cli.COMMANDS
    options = {word.partition("=")[0] for word in arguments if re.match(r"--?[a-z]", word)}
    existing = set(re.findall(r"(?<![\w-])--?[a-z][\w-]*", help_of(verb)))
    assert not options - existing, f"ov-afm {verb} has no {sorted(options - existing)}"
    for flag, value in zip(arguments, arguments[1:], strict=False):
        if flag == "--recipe":
            from ov_afm.presets import RECIPES

            assert value in RECIPES or value.endswith(".json")


@pytest.mark.slow
@pytest.mark.parametrize("command", [command for command in commands() if re.match(r"(generate|info) ", command)])
def test_commands_that_use_a_model_work(command: str, tiny_model: Path, tmp_path: Path) -> None:
    arguments = [str(tiny_model) if EXAMPLE_MODEL.search(word) else word for word in shlex.split(command)]
    assert str(tiny_model) in arguments, f"no model directory that this test can replace in: {command}"
    if arguments[0] == "generate":
        arguments += ["--max-new-tokens", "4"]
    result = subprocess.run(
        [sys.executable, "-m", "ov_afm", *arguments], capture_output=True, text=True, timeout=200, cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr
    # Random weights may end their answer at once; the line end is there all the same.
    assert result.stdout.endswith("\n")
