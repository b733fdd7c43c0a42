"""Which model and which library an engine gets: the packed model, or the plain one and the reason."""

from __future__ import annotations

import logging
import re
import shutil
from pathlib import Path

import pytest

from ov_afm.bench.records import FILE_NAME, read
from ov_afm.cli import bench
from ov_afm.errors import ExtensionError
from ov_afm.kernels import extension, pack, select
from ov_afm.model_dir.model_directory import PACKED_FOLDER

pytestmark = [pytest.mark.native, pytest.mark.usefixtures("library")]


@pytest.fixture(scope="module")
def packed(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with its packed form in it. Read-only."""
    path = Path(shutil.copytree(tiny_model, tmp_path_factory.mktemp("packed") / "model"))
    pack.transform(path)
    return path


def test_cpu_gets_the_kernels_and_other_devices_the_plain_model(packed: Path, library: Path) -> None:
    assert select.engine_model(packed, "CPU") == (packed / PACKED_FOLDER, {"extensions": [str(library)]})
    for device in ("GPU", "GPU.1", "NPU"):
        assert select.engine_model(packed, device) == (packed, {})


def test_a_packed_folder_on_another_device_names_the_plain_one(packed: Path) -> None:
    with pytest.raises(ExtensionError, match=f"is packed for the CPU, found device NPU; use {packed}$"):
        select.engine_model(packed / PACKED_FOLDER, "NPU")


def test_without_a_library_the_plain_model_runs_and_one_line_says_so(
    packed: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(extension, "_candidates", lambda: [])
    with caplog.at_level(logging.WARNING):
        assert select.engine_model(packed, "CPU") == (packed, {})
    assert [record.getMessage() for record in caplog.records] == [
        "running without the ReLU² kernels: the ReLU² kernels are not built; build them (C++ compiler and CMake "
        "needed) with: ov-afm kernels --build"
    ]


def test_a_library_of_another_openvino_is_refused_by_name(
    packed: Path, library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / f"{extension.STEM}2025.1.0{extension.SUFFIX}"
    shutil.copy(library, other)
    monkeypatch.setattr(extension, "_candidates", lambda: [other])
    running = extension.runtime_version()
    with pytest.raises(ExtensionError, match=f"built for OpenVINO 2025.1.0, this is {running}; build them again"):
        extension.library()
    with pytest.raises(ExtensionError, match="built for OpenVINO 2025"):
        select.engine_model(packed / PACKED_FOLDER, "CPU")
    assert select.engine_model(packed, "CPU") == (packed, {})


def test_a_library_of_another_ov_afm_is_refused(
    packed: Path, library: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert extension._load(library).ov_afm_interface() == extension.INTERFACE
    extension._load.cache_clear()
    monkeypatch.setattr(extension, "INTERFACE", extension.INTERFACE + 1)
    with pytest.raises(ExtensionError, match="were built for another version of ov-afm; build them again with"):
        select.engine_model(packed / PACKED_FOLDER, "CPU")
    assert select.engine_model(packed, "CPU") == (packed, {})
    assert "another version of ov-afm" in caplog.text


def test_a_damaged_library_is_an_error_not_a_crash(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / f"{extension.STEM}{extension.runtime_version()}{extension.SUFFIX}"
    broken.write_bytes(b"not a library")
    monkeypatch.setattr(extension, "_candidates", lambda: [broken])
    with pytest.raises(ExtensionError, match="cannot be loaded"):
        select.engine_model(packed / PACKED_FOLDER, "CPU")


def test_truncated_packed_constants_are_refused(packed: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    copy = Path(shutil.copytree(packed, tmp_path / "model"))
    weights = copy / PACKED_FOLDER / "openvino_model.bin"
    with weights.open("r+b") as stream:
        stream.truncate(weights.stat().st_size - 1000)
    with pytest.raises(ExtensionError, match="is damaged: 1000 bytes of packed weights are missing"):
        select.engine_model(copy / PACKED_FOLDER, "CPU")
    assert select.engine_model(copy, "CPU") == (copy, {})
    assert "1000 bytes of packed weights are missing" in caplog.text


def edit_note(folder: Path, name: str, value: str) -> None:
    """Change what packing noted in an IR."""
    xml = folder / PACKED_FOLDER / "openvino_model.xml"
    changed, count = re.subn(f'<{name} value="[^"]*"', f'<{name} value="{value}"', xml.read_text())
    assert count == 1
    xml.write_text(changed)


@pytest.mark.parametrize(
    ("note", "value", "reason"),
    [
        ("layout", "1", f"layout of another version of ov-afm (1, this one has {extension.INTERFACE})"),
        ("weights", "0" * 64, "was packed from another model"),
    ],
)
def test_what_was_packed_otherwise_is_refused_and_the_plain_model_runs(
    packed: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, note: str, value: str, reason: str
) -> None:
    copy = Path(shutil.copytree(packed, tmp_path / "model"))
    edit_note(copy, note, value)
    with pytest.raises(ExtensionError) as error:
        select.engine_model(copy / PACKED_FOLDER, "CPU")
    assert error.value.code == {"layout": "kernels-layout", "weights": "kernels-other-model"}[note]
    assert select.engine_model(copy, "CPU") == (copy, {})
    (record,) = caplog.records
    assert reason in record.getMessage()
    assert record.getMessage().endswith(f"; run: ov-afm kernels {copy}")


def test_a_model_packed_before_layouts_were_noted_has_layout_2(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = Path(shutil.copytree(packed, tmp_path / "model"))
    xml = copy / PACKED_FOLDER / "openvino_model.xml"
    xml.write_text(re.sub("<ov_afm>.*?</ov_afm>", "", xml.read_text(), flags=re.DOTALL))
    assert (select.engine_model(copy, "CPU") == (copy, {})) == (extension.INTERFACE != 2)


@pytest.mark.parametrize("requests", [1, 2])
def test_bench_measures_the_kernels_where_they_are_packed(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, requests: int
) -> None:
    monkeypatch.setenv("OV_AFM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv(select.DISABLE, "0")  # whichever is faster for a tiny model
    lengths = ["--prompt-tokens", "16", "--new-tokens", "4", "--runs", "1", "--concurrency", str(requests)]
    options = ["--device", "CPU", "--option", "no-kernels", "--report", str(tmp_path / "report")]
    assert bench.main([str(packed), *lengths, *options]) == 0
    records = read(tmp_path / "report" / FILE_NAME)
    assert {each["option"]: each["kernels"] for each in records} == {"plain": True, "no-kernels": False}
