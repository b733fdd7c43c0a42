"""`ov-afm info` tells recipe, sizes, checks and provenance, for people and for scripts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from support import tiny

from ov_afm.cli import info


def test_lines_for_people(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert info.main([str(tiny_model)]) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert lines["directory"].startswith(f"{tiny_model}, ")
    assert lines["model"].startswith("ArceeForCausalLM, 2 layers, hidden 64, 4/2 heads, MLP 128 (relu2), ")
    assert lines["source"] == "folder tiny-arcee, license unknown"
    assert lines["recipe"] == "int8"
    assert lines["weights"] == "14 int8_asym per row"
    assert "openvino 20" in lines["made"]


def test_json_has_sizes_and_the_whole_manifest(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert info.main([str(tiny_model), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["total_bytes"] == sum(path.stat().st_size for path in tiny_model.iterdir())
    assert {"source", "geometry", "recipe", "versions", "files", "checks", "schema"} <= set(printed)


def test_verify_compares_digests(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    assert info.main([str(folder), "--verify"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "files        all as recorded (sha256)"
    content = bytearray((folder / "openvino_model.bin").read_bytes())
    content[100] ^= 1
    (folder / "openvino_model.bin").write_bytes(content)
    assert info.main([str(folder)]) == 0
    assert info.main([str(folder), "--verify"]) == 1
    assert capsys.readouterr().err == (
        f"ov-afm: error: {folder / 'openvino_model.bin'} is damaged: its sha256 is not the one recorded; "
        "export the model again\n"
    )


def test_directory_of_another_program_is_described(tiny_fp32: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert info.main([str(tiny_fp32), "--verify"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2].startswith("manifest     none: made by another program")
    assert lines[-1] == "files        no digests to compare"


def test_synthetic_weights_are_shouted(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    source = json.loads((folder / "ov_afm.json").read_text())["source"]
    tiny.edit_json(folder / "ov_afm.json", source={**source, "synthetic": True})
    assert info.main([str(folder)]) == 0
    assert "SYNTHETIC: random weights" in capsys.readouterr().out
