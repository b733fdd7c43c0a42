"""The command line: quick, one line for every error, results apart from messages."""

from __future__ import annotations

import errno
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import pytest

from ov_afm import __version__, cli
from ov_afm.cli.command import command
from ov_afm.errors import ConfigError, ExportError

SCRIPT = Path(sys.executable).with_name("ov-afm")


def run(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=60, **options)  # type: ignore[call-overload, no-any-return]


def test_help_lists_every_verb_with_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    for verb, (_, summary) in cli.COMMANDS.items():
        assert any(line.split() == [verb, *summary.split()] for line in out.splitlines())


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
@pytest.mark.parametrize("arguments", [["--help"], ["kernels", "--help"]], ids=["verbs", "kernels"])
def test_help_can_be_shown_in_any_encoding(encoding: str, arguments: list[str]) -> None:
    shown = run("-m", "ov_afm", *arguments, env={**os.environ, "PYTHONIOENCODING": encoding}, encoding=encoding)
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.startswith("usage: ov-afm")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="the script is ov-afm.exe there")
def test_help_takes_less_than_half_a_second() -> None:
    """Processor time, because other work on the machine must not fail a test."""

    def seconds() -> float:
        process = psutil.Popen([str(SCRIPT), "--help"], stdout=subprocess.DEVNULL)
        before = os.times()
        assert process.wait(30) == 0
        after = os.times()
        return after.children_user + after.children_system - before.children_user - before.children_system

    assert statistics.median(seconds() for _ in range(5)) < 0.5


def test_no_arguments_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    assert capsys.readouterr() == ("", cli.usage())


def test_unknown_verb_names_those_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["exprot"]) == 2
    assert capsys.readouterr().err == f"ov-afm: error: no command 'exprot'; there are {', '.join(cli.COMMANDS)}\n"


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"ov-afm {__version__}\n"


def test_module_is_the_command() -> None:
    result = run("-m", "ov_afm", "--help")
    assert (result.returncode, result.stdout, result.stderr) == (0, cli.usage(), "")


@pytest.mark.parametrize("verb", list(cli.COMMANDS))
def test_every_verb_shows_its_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.COMMANDS[verb][0] == f"ov_afm.cli.{verb}"
    with pytest.raises(SystemExit) as end:
        cli.main([verb, "--help"])
    assert end.value.code == 0
    out, err = capsys.readouterr()
    assert out.startswith(f"usage: ov-afm {verb} ")
    assert err == ""


@pytest.mark.parametrize("verb", ["export", "compress"])
def test_two_verbs_run_as_modules_without_a_warning(verb: str) -> None:
    result = run("-W", "default::RuntimeWarning", "-m", f"ov_afm.{verb}", "--help")
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert result.stdout.startswith(f"usage: ov-afm {verb} ")


@pytest.mark.parametrize("verb", ["export", "compress", "info", "synth"])
def test_unknown_option_is_wrong_usage(verb: str) -> None:
    result = run("-m", "ov_afm", verb, "--no-such-option")
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.splitlines()[-1].startswith(f"ov-afm {verb}: error: ")


def test_error_is_one_line_and_status_1(tmp_path: Path) -> None:
    result = run("-m", "ov_afm", "info", str(tmp_path / "none"))
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr == f"ov-afm: error: no such model directory: {tmp_path / 'none'}\n"


def test_reader_that_leaves_is_no_error(tiny_model: Path) -> None:
    command = f"'{sys.executable}' -m ov_afm info --json '{tiny_model}'"
    program = f"import subprocess; p = subprocess.Popen({command!r}, shell=True, stdout=-1, stderr=-1)"
    program += "; p.stdout.close(); print(p.stderr.read().decode(), p.wait())"
    assert run("-c", program).stdout.split() == ["0"]


@command
def failing(argv: object = None) -> int:
    """Raise what the test asks for."""
    raise argv  # type: ignore[misc]


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (ExportError("two\nlines  of text"), 1, "ov-afm: error: two lines of text\n"),
        (ConfigError("no"), 1, "ov-afm: error: no\n"),
        (KeyboardInterrupt(), 130, "ov-afm: interrupted\n"),
        (
            PermissionError(errno.EACCES, "Permission denied", "/data/config.json"),
            1,
            "ov-afm: error: /data/config.json: Permission denied; ask its owner for access, or name another one\n",
        ),
    ],
    ids=["own-error", "configuration", "interrupt", "operating-system"],
)
def test_exit_status(error: BaseException, status: int, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert failing(error) == status  # type: ignore[arg-type]
    assert capsys.readouterr().err == message


def test_bug_keeps_its_traceback() -> None:
    for error in (ZeroDivisionError(), OSError("said by a library")):
        with pytest.raises(type(error)):
            failing(error)  # type: ignore[arg-type]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_standard_output_that_is_full_is_one_line(tiny_model: Path) -> None:
    command = [sys.executable, "-m", "ov_afm", "info", "--json", str(tiny_model)]
    with Path("/dev/full").open("w") as full:
        result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert result.returncode == 1
    assert result.stderr.startswith("ov-afm: error: ")
    assert result.stderr.count("\n") == 1


FOREIGN = """
import os, sys
import huggingface_hub.hf_api, rich.progress
from ov_afm import cli
from ov_afm.cli import {verb}
# What is imported later may belong to root alone.
os.setgroups([])
os.setgid(65534)
os.setuid(65534)
sys.exit(cli.main({arguments}))
"""


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize("verb", ["info", "export", "upload"])
def test_files_of_another_user_are_one_line_that_names_them(verb: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "openvino_model.xml").touch()
    for each in (*tmp_path.parents, tmp_path):
        if each.is_relative_to(Path(tempfile.gettempdir()).resolve()):
            each.chmod(each.stat().st_mode | 0o055)
    folder.chmod(0o700)
    if verb == "export":  # the folder may be listed, its files may not be read
        folder.chmod(0o755)
        (folder / "openvino_model.xml").unlink()
        (folder / "config.json").chmod(0o600)
    arguments = [verb, str(folder), *(["a/b"] if verb == "upload" else [])]
    result = run("-c", FOREIGN.format(verb=verb, arguments=arguments), env={**os.environ, "HF_HUB_OFFLINE": "0"})
    assert result.returncode == 1, result.stderr
    assert result.stderr.startswith(f"ov-afm: error: {folder}")
    assert "Permission denied; ask its owner for access" in result.stderr
    assert result.stderr.count("\n") == 1


def test_json_goes_to_standard_output_alone(tiny_model: Path) -> None:
    result = run("-m", "ov_afm", "info", "--json", str(tiny_model))
    assert json.loads(result.stdout)["recipe"]["name"] == "int8"
    assert result.stderr == ""
