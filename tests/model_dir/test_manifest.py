"""The manifest tells a whole directory from a damaged, foreign or future one before anything is loaded."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from support import tiny

from ov_afm.errors import OVAFMError, SourceError
from ov_afm.model_dir import manifest
from ov_afm.model_dir.geometry import Geometry
from ov_afm.model_dir.model_directory import ModelDirectory

CONFIG = {**tiny.ARCEE, "architectures": ["ArceeForCausalLM"], "model_type": "arcee", "hidden_act": "relu2"}


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    """A directory with the shape of a model; nothing here loads it."""
    path = tmp_path / "model"
    path.mkdir()
    for name in manifest.REQUIRED:
        (path / name).write_bytes(name.encode() * 100)
    (path / "config.json").write_text(json.dumps(CONFIG))
    (path / "README.md").write_text("# card\n")
    write(path)
    return path


def write(path: Path, **changes: Any) -> None:
    fields: dict[str, Any] = {
        "source": {"kind": "folder", "id": "x"},
        "geometry": Geometry.from_config(CONFIG),
        "recipe": {"name": "int8"},
        "versions": manifest.installed_versions(),
        "files": manifest.scan(path),
    }
    manifest.write(path, manifest.Manifest(**{**fields, **changes}))


def error_of(path: Path, **options: Any) -> str:
    with pytest.raises(OVAFMError) as caught:
        manifest.verify(path, **options)
    return str(caught.value)


def test_written_manifest_reads_back(model_dir: Path) -> None:
    found = manifest.verify(model_dir, hashes=True)
    assert found is not None
    assert found.schema == manifest.SCHEMA
    assert set(found.files) == set(manifest.REQUIRED)
    assert found.geometry == Geometry.from_config(CONFIG)
    assert not list(model_dir.glob(".ov_afm*"))


def test_card_may_be_edited(model_dir: Path) -> None:
    (model_dir / "README.md").write_text("# my own words\n")
    assert manifest.verify(model_dir, hashes=True) is not None


@pytest.mark.parametrize("text", ['{"temperature": 0.1}', '{"temperature": 0.50}'], ids=["size", "content"])
def test_generation_config_may_be_edited_and_it_is_said(
    model_dir: Path, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = model_dir / "generation_config.json"
    path.write_text('{"temperature": 0.75}')
    write(model_dir)
    assert ModelDirectory.open(model_dir, hashes=True).edited == []
    assert caplog.messages == []
    path.write_text(text)
    assert ModelDirectory.open(model_dir, hashes=True).edited == ["generation_config.json"]
    assert caplog.messages == [f"{path} was edited since the export; what it says now is used"]
    path.unlink()
    assert error_of(model_dir) == f"{path} is missing; export the model again"


@pytest.mark.parametrize("name", ["openvino_model.bin", "openvino_model.xml", "openvino_tokenizer.bin"])
def test_truncated_file_is_named_with_both_sizes(model_dir: Path, name: str) -> None:
    whole = (model_dir / name).read_bytes()
    (model_dir / name).write_bytes(whole[:-1])
    assert error_of(model_dir) == (
        f"{model_dir / name} is damaged: {len(whole) - 1} bytes where {len(whole)} were written; export the model again"
    )


@pytest.mark.parametrize("name", ["openvino_model.bin", "openvino_model.xml", "openvino_detokenizer.xml"])
def test_flipped_bit_is_found_by_its_digest_only(model_dir: Path, name: str) -> None:
    content = bytearray((model_dir / name).read_bytes())
    content[7] ^= 1
    (model_dir / name).write_bytes(content)
    assert manifest.verify(model_dir) is not None
    assert error_of(model_dir, hashes=True) == (
        f"{model_dir / name} is damaged: its sha256 is not the one recorded; export the model again"
    )


def test_missing_needed_files_are_named(model_dir: Path) -> None:
    (model_dir / "openvino_tokenizer.xml").unlink()
    (model_dir / "config.json").unlink()
    assert error_of(model_dir) == (
        f"{model_dir} is not a whole model directory: openvino_tokenizer.xml, config.json missing; "
        "export the model again"
    )


def test_missing_recorded_file_is_named(model_dir: Path) -> None:
    (model_dir / "LICENSE").write_text("terms")
    write(model_dir)
    (model_dir / "LICENSE").unlink()
    assert error_of(model_dir) == f"{model_dir / 'LICENSE'} is missing; export the model again"


def test_model_of_a_newer_openvino_is_refused_with_the_upgrade_command(model_dir: Path) -> None:
    running = manifest.installed_versions()["openvino"]
    write(model_dir, versions={"openvino": "2031.2.1-19000-abc"})
    assert error_of(model_dir) == (
        f"{model_dir} was made by OpenVINO 2031.2.1-19000-abc, this is {running}; "
        "upgrade with: pip install -U 'openvino-genai>=2031.2'"
    )


def test_patch_of_the_same_release_is_accepted(model_dir: Path) -> None:
    running = manifest.installed_versions()["openvino"]
    assert running is not None
    year, minor = running.split(".")[:2]
    write(model_dir, versions={"openvino": f"{year}.{minor}.99"})
    assert manifest.verify(model_dir) is not None


def test_directory_without_manifest_is_accepted_without_one(model_dir: Path) -> None:
    (model_dir / manifest.FILE_NAME).unlink()
    assert manifest.verify(model_dir) is None


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "3", "{}", '{"schema": 1}', '{"schema": 1, "source": {}}', '{"schema": 1, "files": null}', "\xff"],
)
def test_damaged_manifest_is_named(model_dir: Path, text: str) -> None:
    path = model_dir / manifest.FILE_NAME
    path.write_bytes(text.encode("latin-1"))
    message = error_of(model_dir)
    assert message.startswith(f"{path} is damaged (")
    assert message.endswith("; export the model again")


@pytest.mark.parametrize(
    "changes",
    [
        {"files": {"openvino_model.bin": 3}},
        {"files": {"openvino_model.bin": {"bytes": 3}}},
        {"files": []},
        {"recipe": "int8"},
        {"versions": ["2026.4"]},
    ],
    ids=lambda changes: str(next(iter(changes))),
)
def test_manifest_with_entries_of_the_wrong_kind_is_named(model_dir: Path, changes: dict[str, Any]) -> None:
    tiny.edit_json(model_dir / manifest.FILE_NAME, **changes)
    assert "is damaged (" in error_of(model_dir)


def test_manifest_of_a_newer_layout_is_refused(model_dir: Path) -> None:
    tiny.edit_json(model_dir / manifest.FILE_NAME, schema=manifest.SCHEMA + 1)
    assert error_of(model_dir) == (
        f"{model_dir / manifest.FILE_NAME} has layout 2, this ov_afm reads up to 1; upgrade with: pip install -U ov-afm"
    )


def test_keys_that_a_newer_ov_afm_added_are_ignored(model_dir: Path) -> None:
    tiny.edit_json(model_dir / manifest.FILE_NAME, future={"a": 1})
    assert manifest.verify(model_dir) is not None


def test_missing_path_and_file_are_told_apart(tmp_path: Path) -> None:
    assert error_of(tmp_path / "none") == f"no such model directory: {tmp_path / 'none'}"
    (tmp_path / "file").touch()
    assert error_of(tmp_path / "file") == f"{tmp_path / 'file'} is a file; a model directory is needed"


def test_checkpoint_gets_the_command_that_makes_a_model_of_it(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert error_of(tmp_path) == (
        f"{tmp_path} is a checkpoint, not an OpenVINO model; run: ov-afm export {tmp_path} --output DIR"
    )


def test_digest_reports_every_byte(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x" * (9 << 20))
    blocks: list[int] = []
    digest = manifest.sha256(tmp_path / "file", blocks.append)
    assert sum(blocks) == 9 << 20
    assert len(blocks) > 1
    assert digest == hashlib.sha256(b"x" * (9 << 20)).hexdigest()


def test_download_bookkeeping_is_no_part_of_the_model(model_dir: Path) -> None:
    (model_dir / ".cache" / "huggingface").mkdir(parents=True)
    (model_dir / ".cache" / "huggingface" / "x.lock").touch()
    assert set(manifest.scan(model_dir)) == set(manifest.REQUIRED)


def test_source_error_is_what_a_damaged_directory_raises(model_dir: Path) -> None:
    (model_dir / "openvino_model.bin").unlink()
    with pytest.raises(SourceError):
        manifest.verify(model_dir)
