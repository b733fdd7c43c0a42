"""A manifest with a value of the wrong kind is damaged; nothing that reads it meets one."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from ov_afm import cli
from ov_afm.errors import SourceError
from ov_afm.model_dir import manifest

# What a field may be replaced by: none of it is right anywhere.
WRONG: tuple[Any, ...] = (5, "", [], None, {"x": [1]})


@pytest.fixture
def copy(tiny_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def places(value: Any, way: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The way to each value of a manifest; of a list, to its first element."""
    items = value.items() if isinstance(value, dict) else list(enumerate(value))[:1] if isinstance(value, list) else ()
    return [place for key, each in items for place in ((*way, key), *places(each, (*way, key)))]


def changed(fields: dict[str, Any], way: tuple[Any, ...], value: Any) -> dict[str, Any]:
    fields = json.loads(json.dumps(fields))
    target: Any = fields
    for key in way[:-1]:
        target = target[key]
    target[way[-1]] = value
    return fields


def test_no_value_of_the_wrong_kind_ends_in_a_traceback(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each field of a real manifest, replaced by one of: a number, an empty text or list, null, an object."""
    path = copy / manifest.FILE_NAME
    fields = json.loads(path.read_text(encoding="utf-8"))
    refused = 0
    for number, way in enumerate(places(fields)):
        value = WRONG[number % len(WRONG)]
        path.write_text(json.dumps(changed(fields, way, value)), encoding="utf-8")
        status = cli.main(["info", str(copy)])
        out, err = capsys.readouterr()
        assert status in (0, 1), (way, value)
        # A warning, such as of an edited file, may stand before.
        assert (err.count("ov-afm: error: "), bool(out)) == (status, not status), (way, value, err)
        refused += status
    assert refused > 30


@pytest.mark.parametrize(
    ("way", "value", "reason"),
    [
        (("recipe", "name"), 5, "recipe.name is 5, and text is needed"),
        (("versions", "openvino"), 2026, "versions.openvino is 2026, and text is needed"),
        (("files", "config.json", "bytes"), True, "bytes is True, and a whole number is needed"),
        (("files", "config.json", "sha256"), "", "sha256 is '', and a sha256 is needed"),
        (("files", "config.json"), {"bytes": 3}, "files.config.json.sha256 is missing"),
        (("checks", "golden", "prompts"), [], "checks.golden.prompts is empty"),
        (("checks", "golden", "prompts", 0, "steps", 0), "x", "steps[0] is 'x', and text of the form"),
        (("checks", "tokenizer"), 3, "checks.tokenizer is 3, and an object is needed"),
        (("geometry", "hidden"), "64", "geometry.hidden is '64'"),
    ],
    ids=lambda value: ".".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_damaged_field_is_named_with_its_value(copy: Path, way: tuple[Any, ...], value: Any, reason: str) -> None:
    path = copy / manifest.FILE_NAME
    path.write_text(json.dumps(changed(json.loads(path.read_text(encoding="utf-8")), way, value)), encoding="utf-8")
    with pytest.raises(SourceError, match=re.escape(reason)) as caught:
        manifest.read(copy)
    assert caught.value.code == "manifest-damaged"


@pytest.mark.parametrize("name", ["../thesis.txt", "/etc/passwd", "a/../../b", "a\\b", "", "a//b"])
def test_file_outside_of_the_directory_is_none_of_the_model(copy: Path, name: str) -> None:
    path = copy / manifest.FILE_NAME
    fields = json.loads(path.read_text(encoding="utf-8"))
    fields["files"][name] = fields["files"]["config.json"]
    path.write_text(json.dumps(fields), encoding="utf-8")
    with pytest.raises(SourceError, match="is no file in this directory"):
        manifest.read(copy)


def test_manifest_that_does_not_list_the_model_verifies_nothing(copy: Path) -> None:
    path = copy / manifest.FILE_NAME
    fields = json.loads(path.read_text(encoding="utf-8"))
    for files in ({}, {name: each for name, each in fields["files"].items() if name != manifest.MODEL_BIN}):
        path.write_text(json.dumps({**fields, "files": files}), encoding="utf-8")
        with pytest.raises(SourceError, match="does not list openvino_.*, so nothing shows that it is whole") as caught:
            manifest.verify(copy)
        assert caught.value.code == "manifest-incomplete"


def test_a_folder_named_cache_above_the_model_does_not_matter(copy: Path, tmp_path: Path) -> None:
    below = Path(shutil.copytree(copy, tmp_path / ".cache" / ".git" / "model"))
    assert manifest.scan(below) == manifest.scan(copy) != {}
    (below / "openvino_model.bin").write_bytes(bytes((below / "openvino_model.bin").stat().st_size))
    with pytest.raises(SourceError, match="its sha256 is not the one recorded"):
        manifest.verify(below, hashes=True)


def test_packed_model_that_was_deleted_by_hand_does_not_block_the_plain_one(
    copy: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    from ov_afm.kernels import pack, select

    (copy / "relu2").mkdir()
    for name in ("openvino_model.xml", "openvino_model.bin"):
        (copy / "relu2" / name).write_text(name)
    contents = manifest.read(copy)
    assert contents is not None
    contents.files = manifest.scan(copy)
    contents.sparsity["kernels"] = {"folder": "relu2", "replaced": ["layer 0"]}
    manifest.write(copy, contents)
    manifest.verify(copy, hashes=True)
    (copy / "relu2" / "openvino_model.bin").write_text("cut")
    with pytest.raises(SourceError, match=re.escape(f"pack it again with: ov-afm kernels {copy}")):
        manifest.verify(copy)
    assert manifest.verify(copy, packed=False) is not None
    shutil.rmtree(copy / "relu2")
    manifest.verify(copy, hashes=True)
    assert select.engine_model(copy, "CPU") == (copy, {})
    assert f"{copy / 'relu2'} is gone; make it again with: ov-afm kernels {copy}" in caplog.text
    assert cli.main(["info", str(copy)]) == 0
    assert "1 MLPs were packed, but are gone from relu2/" in capsys.readouterr().out
    assert pack.remove(copy)
    assert not pack.remove(copy)
    caplog.clear()
    assert select.engine_model(copy, "CPU") == (copy, {})
    assert caplog.text == ""


@pytest.mark.parametrize("kind", ["none", "docs", "checkpoint", "foreign"])
def test_portable_deletes_nothing_but_a_packed_model(kind: str, copy: Path, tmp_path: Path) -> None:
    folder = copy if kind == "foreign" else tmp_path / kind
    if kind != "none":
        (folder / "relu2").mkdir(parents=True)
        (folder / "relu2" / "thesis.txt").write_text("years of work")
    if kind == "checkpoint":
        (folder / "config.json").write_text("{}")
    assert cli.main(["kernels", "--portable", str(folder)]) == 1
    assert kind == "none" or (folder / "relu2" / "thesis.txt").read_text() == "years of work"
