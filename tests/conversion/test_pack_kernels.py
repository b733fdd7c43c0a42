"""The end of an export: packed for the kernels where that pays, whole without them where not."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from ov_afm.cli.export import main
from ov_afm.conversion import pack_kernels
from ov_afm.errors import ExtensionError
from ov_afm.kernels import extension
from ov_afm.kernels.profile import Profile
from ov_afm.model_dir import manifest
from ov_afm.model_dir.model_directory import PACKED_FOLDER
from ov_afm.system import console, resources
from ov_afm.system.child_process import ChildDied, ChildProcess

pytestmark = pytest.mark.native


@pytest.fixture(scope="module", autouse=True)
def library() -> None:
    try:
        extension.load()
    except ExtensionError:
        extension.build()


def attempt(model: Path, folder: Path, device: str | None = None, **changes: Any) -> tuple[bool, str | None]:
    """Whether a copy of a model is packed, and the note."""
    shutil.copytree(model, folder)
    record = manifest.read(folder)
    assert record is not None
    record.recipe |= changes
    with console.Progress() as progress:
        result, note = pack_kernels.pack_if_it_pays(folder, record, device, progress, folder.with_suffix(".log"))
    assert ("kernels" in result.sparsity) == (folder / PACKED_FOLDER).exists()
    assert manifest.verify(folder) is not None
    return (folder / PACKED_FOLDER).exists(), note


def test_the_command_packs_a_model_for_the_cpu_and_the_function_only_when_asked(
    tiny_checkpoint: Path, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tiny_checkpoint), "--output", str(tmp_path / "command"), "--no-verify"]) == 0
    said = capsys.readouterr().err
    assert "packed for the ReLU² kernels too, in relu2/ (--kernels none leaves that out); on this machine " in said
    assert "model is used" in said
    assert "packed against plain: " in said
    record = manifest.verify(tmp_path / "command", hashes=True)
    assert record is not None
    assert record.sparsity["kernels"]["replaced"] == ["layer 0", "layer 1"]
    assert 0.3 < record.sparsity["profile"]["mean"] < 0.7
    assert main([str(tiny_checkpoint), "--output", str(tmp_path / "plain"), "--no-verify", "--kernels", "none"]) == 0
    assert not (tmp_path / "plain" / PACKED_FOLDER).exists()
    assert not (tiny_model / PACKED_FOLDER).exists()


def test_what_is_not_for_the_cpu_or_not_quantized_is_left_alone_in_silence(tiny_model: Path, tmp_path: Path) -> None:
    assert attempt(tiny_model, tmp_path / "gpu", "GPU") == (False, None)
    assert attempt(tiny_model, tmp_path / "npu", "NPU") == (False, None)
    assert attempt(tiny_model, tmp_path / "npu-recipe", name="int4-npu-g128") == (False, None)
    assert attempt(tiny_model, tmp_path / "fp16", weight_format="fp16") == (False, None)


def test_without_room_the_export_is_whole_and_says_what_it_lacks(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resources, "free_memory", lambda: 1000)
    packed, note = attempt(tiny_model, tmp_path / "model")
    assert not packed
    assert note is not None
    assert note.startswith("not packed for the ReLU² kernels: ")
    assert note.endswith("of memory needed, 1.0 kB free; later: ov-afm kernels MODEL_DIR")


def test_without_the_library_the_note_says_how_to_build_it(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extension, "_candidates", lambda: [])
    packed, note = attempt(tiny_model, tmp_path / "model")
    assert not packed
    assert note is not None
    assert note.endswith("build them (C++ compiler and CMake needed) with: ov-afm kernels --build")


def test_few_zeros_are_not_worth_a_second_copy(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = Profile({}, mean=0.04, tokens=64, text_sha256="", weights_bytes=100, down_bytes=20, speedup=1.01)
    monkeypatch.setattr(ChildProcess, "run", lambda *_, **__: few)
    note = "not packed for the ReLU² kernels: with 4% zeros they would gain little"
    assert attempt(tiny_model, tmp_path / "model") == (False, note)


def test_a_profile_that_dies_does_not_take_the_export_with_it(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*_: Any, **__: Any) -> None:
        raise ChildDied("the process was killed (SIGKILL)", -9, "")

    monkeypatch.setattr(ChildProcess, "run", die)
    packed, note = attempt(tiny_model, tmp_path / "model")
    assert not packed
    assert note == "not packed for the ReLU² kernels: the process was killed (SIGKILL)"
