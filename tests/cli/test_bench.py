"""`ov-afm bench` with bad input: one line, and nothing is touched."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from ov_afm.cli.bench import main
from ov_afm.model_dir import manifest

FAST = ["--device", "CPU", "--prompt-tokens", "32", "--new-tokens", "8", "--runs", "2"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OV_AFM_CACHE", str(tmp_path / "cache"))


def refused(capsys: pytest.CaptureFixture[str]) -> str:
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("ov-afm: error: ")
    assert shown.err.count("\n") == 1
    return shown.err.removeprefix("ov-afm: error: ").strip()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--runs", "0"], "runs must be at least 1, found 0"),
        (["--new-tokens", "1"], "new_tokens must be at least 2, found 1"),
        (["--prompt-tokens", "0"], "prompt_tokens must be at least 1, found 0"),
        (["--concurrency", "0"], "concurrency must be at least 1, found 0"),
        (["--threads", "0"], "threads must be at least 1, found 0"),
        (
            ["--device", "CPU", "--prompt-tokens", "2559", "--new-tokens", "8"],
            "nothing to measure: a prompt of 2559 tokens and 8 new ones need 2567 positions; "
            "{name} has a context of 2560",
        ),
        (
            ["--device", "NPU-EMULATED", "--prompt-tokens", "300", "--ov-config", "MAX_PROMPT_LEN=256"],
            "nothing to measure: the prompt has 300 tokens, MAX_PROMPT_LEN allows 256",
        ),
        (
            ["--device", "GPU"],
            "nothing to measure: device 'GPU' is not here; available: CPU, or AUTO; details: ov-afm devices",
        ),
        (
            ["--option", "faster"],
            "option 'faster' is unknown; choose of plain, prompt-lookup, draft, kv-u8, kv-f16, prefix-cache, "
            "no-prefix-cache, no-kernels",
        ),
        (["--option", "draft"], "option draft needs a draft model; add: --draft-model DIR"),
        (["--ov-config", "MAX_PROMPT_LEN"], "--ov-config takes KEY=VALUE, found 'MAX_PROMPT_LEN'"),
    ],
)
def test_bad_settings_are_one_line(
    tiny_model: Path, arguments: list[str], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tiny_model), *arguments, "--report", str(tmp_path / "out")]) == 1
    assert refused(capsys) == expected.format(name=tiny_model.name)
    assert not (tmp_path / "out").exists()


def test_directory_of_another_architecture_is_refused(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "bert"
    shutil.copytree(tiny_model, other, ignore=shutil.ignore_patterns(manifest.FILE_NAME))
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "architectures": ["BertModel"]}))
    assert main([str(other), *FAST]) == 1
    assert refused(capsys) == f"{other} holds BertModel, not a text-generation model; export one: ov-afm export --help"


def test_draft_model_of_another_vocabulary_is_refused(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "draft"
    shutil.copytree(tiny_model, other, ignore=shutil.ignore_patterns(manifest.FILE_NAME))
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "vocab_size": 600}))
    assert main([str(tiny_model), *FAST, "--draft-model", str(other)]) == 1
    assert refused(capsys) == f"the draft model {other} has 600 tokens, {tiny_model.name} has 512; use one tokenizer"


def test_the_same_model_twice_is_refused(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tiny_model), str(tiny_model), *FAST]) == 1
    assert refused(capsys) == f"{tiny_model} and {tiny_model} are the same model; give it once"


def test_no_model_is_wrong_usage() -> None:
    with pytest.raises(SystemExit) as end:
        main([])
    assert end.value.code == 2


def test_missing_records_file_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 1
    assert refused(capsys) == f"no such records file: {tmp_path / 'a'}"
