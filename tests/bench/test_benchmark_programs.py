"""The programs of benchmarks/: a user's mistake is one line, and relu2.py makes models that are whole."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support import benchmarks

from ov_afm.model_dir.model_directory import ModelDirectory

MISTAKES = {
    "chat": ["nosuch"],
    "draft": ["nosuch", "nosuch"],
    "draft-tokens": ["nosuch", "nosuch", "--assistant-tokens", "0"],
    "export": ["nosuch", "--work-dir", "work"],
    "export-runs": ["nosuch", "--work-dir", "work", "--runs", "0"],
    "gguf_recipes": ["nosuch", "--work-dir", "work"],
    "kill_exports": ["."],  # a folder with something else in it
    "kill_exports-kills": ["work", "--kills", "0"],
    "lock_memory": ["nosuch"],
    "lock_memory-plain": ["MODEL"],
    "peers": ["nosuch"],
    "peers-gguf": ["MODEL", "--gguf", "nosuch/peer.gguf"],
    "peers-damaged-gguf": ["MODEL", "--gguf", "FILE"],
    "peers-runs": ["MODEL", "--runs", "0"],
    "peers-report": ["MODEL", "--report", "."],
    "peers-record": ["MODEL", "--record", "--engines", "openvino-genai"],
    "prompt_cache": ["nosuch"],
    "prompt_cache-tokens": ["MODEL", "--tokens", "1"],
    "recipes": ["nosuch", "--work-dir", "work"],
    "recipes-work": ["MODEL", "--work-dir", "FILE"],
    "relu2": ["nosuch"],
    "relu2-active": ["MODEL", "--active", "10"],
    "relu2-json": ["MODEL", "--json", "nosuch/out.json"],
    "relu2-repeats": ["MODEL", "--repeats", "0"],
    "serve": ["nosuch"],
    "serve-streams": ["MODEL", "--streams", "0"],
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_line(
    case: str, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("gguf")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FILE").write_text("a file")
    words = [str(tiny_model) if word == "MODEL" else word for word in MISTAKES[case]]
    assert benchmarks.run(case.partition("-")[0], *words, monkeypatch=monkeypatch) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("ov-afm: error: ")
    assert err.count("\n") == 1


def test_errors_of_files_and_of_openvino_are_one_line_and_bugs_are_not(capsys: pytest.CaptureFixture[str]) -> None:
    program = benchmarks.load("program").program

    def failing(error: Exception) -> int | None:
        raise error

    for error in (
        FileNotFoundError(2, "No such file", "some/file"),
        ModuleNotFoundError("x", name="llama_cpp"),
        RuntimeError("Exception from src/x.cpp:1:\nreason\n"),
        subprocess.CalledProcessError(3, ["/bin/tool"]),
    ):
        assert program(lambda error=error: failing(error))() == 1
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[2] for line in lines] == ["some/file:", "the", "reason", "tool"]
    with pytest.raises(RecursionError):
        program(lambda: failing(RecursionError()))()
    with pytest.raises(KeyError):
        program(lambda: failing(KeyError()))()


@pytest.fixture(scope="module")
def packed(library: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tiny model, packed for the kernels."""
    from ov_afm.kernels import pack

    model = tmp_path_factory.mktemp("models") / "packed"
    shutil.copytree(tiny_model, model)
    pack.transform(model)
    return model


def test_relu2_writes_model_directories_that_verify(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = (packed, "--active", "0.25", "--write", tmp_path / "shares")
    assert benchmarks.run("relu2", *arguments, monkeypatch=monkeypatch) == 0
    written = ModelDirectory.open(tmp_path / "shares" / "active-0.25", hashes=True)
    assert written.manifest
    assert set(written.manifest.files) == set(ModelDirectory.open(packed).manifest.files)
    assert written.manifest.sparsity["kernels"]["active"] == pytest.approx(0.25, abs=0.02)
    # Nothing that was proved of the model's answers is claimed of these.
    assert list(written.checks) == ["skipped"]
    assert 'threshold="0"' not in (written.packed / "openvino_model.xml").read_text()
    assert benchmarks.run("relu2", *arguments, monkeypatch=monkeypatch) == 1
    assert "exists" in capsys.readouterr().err


@pytest.mark.slow
def test_relu2_measures_and_records(packed: Path, tmp_path: Path) -> None:
    few = ["--active", "1", "0.25", "--prompt", "16", "--batch", "2", "--new", "4", "--repeats", "1"]
    files = ["--record", tmp_path / "figures", "--json", tmp_path / "report.json"]
    done = subprocess.run(
        [sys.executable, benchmarks.FOLDER / "relu2.py", packed, *few, *files],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "| prefill of 16 tokens | " in done.stdout
    (record,) = benchmarks.load("records").read(tmp_path / "figures")
    kinds = [each.kind for each in record.figures]
    assert kinds == ["decode", "decode", "decode", "prefill", "together", "start", "memory"]
    assert "100% of neurons active" in record.figures[1].what
    assert all(each.ratio.median == pytest.approx(each.theirs.median / each.ours.median) for each in record.figures)
    assert record.cpu["isa"]
    assert record.cpu["limit"] is None
    assert str(tmp_path) not in json.dumps(record.model) + record.command
    assert len(json.loads((tmp_path / "report.json").read_text())["decode"]) == 3
