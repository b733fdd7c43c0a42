"""Records files: complete, or refused with the line; other folders are left alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from ov_afm.bench.plan import Settings
from ov_afm.bench.records import FILE_NAME, read
from ov_afm.bench.sweep import bench
from ov_afm.errors import ConfigError

FEW = Settings(devices=("CPU",), prompt_tokens=(32,), new_tokens=8, runs=2)


def test_report_folder_of_something_else_is_left_alone(tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "thesis.txt").write_text("years of work")
    with pytest.raises(ConfigError) as caught:
        bench(tiny_model, settings=FEW, report_dir=folder)
    assert caught.value.code == "report-folder"
    assert str(caught.value) == (
        f"{folder} exists and holds no records.jsonl; name another folder, nothing in it was changed"
    )
    assert [path.name for path in folder.iterdir()] == ["thesis.txt"]


def test_report_folder_of_another_sweep_is_left_alone(tiny_model: Path, swept: Path) -> None:
    before = {path.name: path.read_bytes() for path in swept.iterdir()}
    with pytest.raises(ConfigError) as caught:
        bench(tiny_model, settings=FEW, report_dir=swept)
    assert caught.value.code == "other-sweep"
    assert str(caught.value).startswith(f"{swept} holds another sweep (other settings, models, versions or machine); ")
    assert {path.name: path.read_bytes() for path in swept.iterdir()} == before


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"half": ', "Expecting value"),
        (b"\xff\xfe", "'utf-8' codec"),
        (b"[1]", "found list, not an object"),
        (b'{"model": "m"}', "lacks 'device'"),
    ],
    ids=["half", "bytes", "list", "keys"],
)
def test_corrupt_records_file_names_the_line(swept: Path, line: bytes, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    content = (swept / FILE_NAME).read_bytes().splitlines()[0] + b"\n" + line + b"\n"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        read(path)
    assert caught.value.code == "record-unreadable"
    assert str(caught.value).startswith(f"{path} line 2 is no benchmark record (")
    assert reason in str(caught.value)
    assert path.read_bytes() == content


@pytest.mark.parametrize("content", [b"my records", b"one\ntwo", b'{"mine": 1}\nhalf'], ids=["line", "lines", "json"])
def test_records_of_another_program_are_left_alone(tiny_model: Path, tmp_path: Path, content: bytes) -> None:
    (tmp_path / FILE_NAME).write_bytes(content)
    with pytest.raises(ConfigError):
        bench(tiny_model, settings=FEW, report_dir=tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {FILE_NAME: content}
