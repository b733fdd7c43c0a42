"""The command: answer on standard output, the rest on standard error, one line for every refusal."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support import tiny
from support.exact import EXACT_OPTIONS

from ov_afm.cli.generate import main

FEW = ["--greedy", "--max-new-tokens", "8"]
EXACT_FEW = [*FEW, *EXACT_OPTIONS]


def pipe_in(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))


@pytest.mark.slow
def test_answer_goes_to_standard_output_and_figures_to_standard_error(
    tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tiny_model), "hi", *FEW, "--stats"]) == 0
    shown = capsys.readouterr()
    assert shown.out.endswith("\n")
    assert len(shown.out) > 1
    assert shown.err.startswith("CPU, prompt ")
    assert "8 tokens at" in shown.err
    assert shown.err.count("\n") == 1


@pytest.mark.slow
def test_json_is_one_object(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tiny_model), "hi", *EXACT_FEW, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["finish_reason"] in ("length", "stop")
    assert record["metrics"]["new_tokens"] <= 8
    assert (record["device"], record["emulated"]) == ("CPU", False)
    assert main([str(tiny_model), "hi", *EXACT_FEW]) == 0
    assert capsys.readouterr().out == record["text"] + "\n"


@pytest.mark.parametrize("argument", [["-"], []], ids=["dash", "nothing"])
def test_prompt_comes_from_standard_input(
    tiny_model: Path, argument: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    main([str(tiny_model), "what is ünïcödé?", *EXACT_FEW])
    expected = capsys.readouterr().out
    pipe_in(monkeypatch, "what is ünïcödé?\n".encode())
    assert main([str(tiny_model), *argument, *EXACT_FEW]) == 0
    assert capsys.readouterr().out == expected


def test_system_message_changes_the_prompt(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def prompt_tokens(*extra: str) -> int:
        main([str(tiny_model), "hi", *FEW, "--json", *extra])
        count: int = json.loads(capsys.readouterr().out)["metrics"]["prompt_tokens"]
        return count

    assert prompt_tokens("--raw") < prompt_tokens() < prompt_tokens("--system", "Be brief.")


@pytest.mark.slow
def test_emulated_npu_is_named_in_every_output(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--device", "NPU-EMULATED", "--ov-config", "MAX_PROMPT_LEN=128", "--stats", "--json"]
    assert main([str(tiny_model), "hi", *FEW, *options]) == 0
    shown = capsys.readouterr()
    assert [line for line in shown.err.splitlines() if "emulated NPU" not in line] == []
    assert json.loads(shown.out)["emulated"] is True


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([""], "the prompt has 0 tokens; give it some text"),
        (["hi", "--temperature", "-1"], "temperature must be a number at least 0, found -1.0"),
        (["hi", "--max-new-tokens", "0"], "max_new_tokens must be a whole number of at least 1, found 0"),
        (["hi", "--device", "FOO"], "device 'FOO' is not here; available: CPU, or AUTO; details: ov-afm devices"),
    ],
    ids=["empty", "temperature", "no-tokens", "device"],
)
def test_bad_input_is_one_line_and_status_1(
    tiny_model: Path, arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tiny_model), *arguments]) == 1
    shown = capsys.readouterr()
    assert shown.err == f"ov-afm: error: {expected}\n"
    assert shown.out == ""


def test_invalid_utf8_on_standard_input_is_one_line(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe_in(monkeypatch, b"caf\xe9 au lait")
    assert main([str(tiny_model)]) == 1
    expected = "ov-afm: error: the prompt on standard input is not UTF-8: byte 0xe9 at offset 3\n"
    assert capsys.readouterr().err == expected


def test_checkpoint_in_place_of_a_model_names_the_export_command(
    tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tiny_checkpoint), "hi"]) == 1
    assert f"run: ov-afm export {tiny_checkpoint} --output DIR" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [["hi", "--raw", "--system", "x"], ["hi", "--ov-config", "MAX_PROMPT_LEN"], ["hi", "--top-k", "many"]]
)
def test_wrong_usage_exits_with_2(tiny_model: Path, arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([str(tiny_model), *arguments])
    assert end.value.code == 2


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGINT")
def test_ctrl_c_while_answering_exits_130_without_a_traceback(tiny_model: Path, tmp_path: Path) -> None:
    endless = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    (endless / "ov_afm.json").unlink()
    tiny.edit_json(endless / "generation_config.json", min_new_tokens=2000)
    command = [sys.executable, "-m", "ov_afm", "generate", str(endless), "hi", "--max-new-tokens", "2000"]
    with subprocess.Popen(
        [*command, "--repetition-penalty", "1.5"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    ) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        child.stdout.read(1)
        child.send_signal(signal.SIGINT)
        error = child.stderr.read().decode()
        child.stdout.read()
    assert child.returncode == 130
    assert error.strip().endswith("ov-afm: interrupted")
    assert "Traceback" not in error


@pytest.mark.slow
def test_options_of_the_engine_reach_it(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = ["--json", *FEW, *EXACT_OPTIONS]
    texts = set()
    for extra in (
        [],
        ["--no-prefix-caching"],
        ["--threads", "1"],
        ["--kv-cache", "f32"],
        ["--prompt-lookup"],
        ["--draft-model", str(tiny_model)],
    ):
        assert main([str(tiny_model), "one two one two", *plain, *extra]) == 0
        texts.add(json.loads(capsys.readouterr().out)["text"])
    assert len(texts) == 1


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGINT")
def test_ctrl_c_is_heard_while_native_code_runs() -> None:
    code = (
        "import ctypes, time\n"
        "from ov_afm.system.interrupt import leave_at_once, wait_for\n"
        "with leave_at_once():\n"
        "    print('running', flush=True)\n"
        "    wait_for(lambda: ctypes.CDLL(None).sleep(60))\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        child.stdout.readline()
        began = time.monotonic()
        child.send_signal(signal.SIGINT)
        error = child.stderr.read().decode()
    assert child.returncode == 130
    assert time.monotonic() - began < 10
    assert error.strip() == "ov-afm: interrupted"


@pytest.mark.slow
def test_real_language_is_answered_and_streamed(smollm2_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(smollm2_model), "What is the capital of France?", "--greedy", "--max-new-tokens", "24"]) == 0
    assert "Paris" in capsys.readouterr().out


@pytest.mark.slow
def test_emulated_npu_speaks_real_language(smollm2_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--greedy", "--max-new-tokens", "24", "--device", "NPU-EMULATED", "--prompt-tokens", "128"]
    assert main([str(smollm2_model), "What is the capital of France?", *options]) == 0
    assert "Paris" in capsys.readouterr().out
