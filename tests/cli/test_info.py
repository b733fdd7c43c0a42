"""`ov-afm info` tells recipe, sizes, checks and provenance, for people and for scripts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from support import tiny

from ov_afm.cli import info
from ov_afm.model_dir import manifest


def test_lines_for_people(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert info.main([str(tiny_model)]) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert lines["directory"].startswith(f"{tiny_model}, ")
    assert lines["model"].startswith("ArceeForCausalLM, 2 layers, hidden 64, 4/2 heads, MLP 128 (relu2), ")
    assert lines["source"] == "folder tiny-arcee, license unknown"
    assert lines["recipe"] == "int8"
    assert lines["weights"] == "14 int8_asym per row"
    assert lines["ends"] == "at      <|im_end|> (2, of generation_config and tokenizer and chat_template)"
    assert lines["added"].startswith('to generation_config.json: "do_sample": true, "temperature": 0.5')
    assert "openvino 20" in lines["made"]


def test_json_has_sizes_and_the_whole_manifest(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert info.main([str(tiny_model), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["total_bytes"] == sum(path.stat().st_size for path in tiny_model.iterdir())
    assert {"source", "geometry", "recipe", "versions", "files", "checks", "schema"} <= set(printed)


def test_verify_compares_digests(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    assert info.main([str(folder), "--verify"]) == 0
    assert capsys.readouterr().out.splitlines()[-4:] == [
        "tokenizer    as recorded",
        "chat template as recorded",
        "stop tokens  as recorded",
        "files        all as recorded (sha256)",
    ]
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


def proved(folder: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    status = info.main([str(folder), "--verify"])
    captured = capsys.readouterr()
    return status, captured.err or captured.out


def reseal(folder: Path) -> None:
    """Record the digests of the files as they are now, as somebody would who changes a model on purpose."""
    tiny.edit_json(folder / manifest.FILE_NAME, files=manifest.scan(folder))


def test_verify_proves_the_template_without_the_source(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    path = folder / "chat_template.jinja"
    path.write_text(path.read_text().replace("assistant", "Assistant"))
    reseal(folder)
    status, text = proved(folder, capsys)
    assert (status, text.count("\n")) == (1, 1)
    assert "the chat template of" in text
    path.unlink()
    (folder / "openvino_tokenizer.xml").write_text((folder / "openvino_tokenizer.xml").read_text())
    reseal(folder)
    assert proved(folder, capsys)[0] == 0, "the tokenizer's IR holds the template too"


def test_verify_proves_the_tokenizer_without_the_source(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    path = folder / "openvino_detokenizer.bin"
    path.write_bytes(path.read_bytes().replace(b"The", b"Xhe"))
    reseal(folder)
    status, text = proved(folder, capsys)
    assert (status, text.count("\n")) == (1, 1)
    assert "the tokenizer of" in text


def test_verify_tells_an_edited_configuration_from_another_set_of_stop_tokens(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    tiny.edit_json(folder / "generation_config.json", eos_token_id=[2, 300])
    status = info.main([str(folder), "--verify"])
    captured = capsys.readouterr()
    assert status == 0
    assert "stop tokens  2 at export, 2, 300 now, as generation_config.json says\n" in captured.out
    assert "edited       generation_config.json, since the export; what it says now is used\n" in captured.out
    assert "was edited since the export" in caplog.text
    tiny.edit_json(folder / "tokenizer_config.json", eos_token="<|endoftext|>")
    reseal(folder)
    status, text = proved(folder, capsys)
    assert (status, text.count("\n")) == (1, 1)
    assert "the stop tokens of" in text


def test_verify_says_what_it_cannot_compare(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    checks = json.loads((folder / manifest.FILE_NAME).read_text())["checks"]
    other = {**checks["tokenizer"], "inputs_sha256": "0" * 64}
    tiny.edit_json(folder / manifest.FILE_NAME, checks={"tokenizer": other}, generation={})
    status, text = proved(folder, capsys)
    assert status == 0
    assert "tokenizer    not compared: recorded by another release of ov_afm" in text
    assert "chat template nothing recorded to compare with" in text
    assert "stop tokens  nothing recorded to compare with" in text


def test_a_configuration_that_cannot_be_read_is_said(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    (folder / "generation_config.json").write_text('{"eos_token_id": "two"}')
    assert info.main([str(folder)]) == 0
    assert "ends at      unknown" in capsys.readouterr().out
    assert "eos_token_id" in caplog.text
