"""`compress` refuses what it cannot do before any work, and takes over nothing that is no longer true."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ov_afm.compress import compress
from ov_afm.errors import ConfigError, DeviceError, OVAFMError, SourceError
from ov_afm.model_dir import manifest
from ov_afm.model_dir.manifest import Manifest
from ov_afm.model_dir.model_directory import ModelDirectory, finish
from ov_afm.presets import RECIPES, Recipe
from ov_afm.runtime import self_test
from ov_afm.system import console, resources
from ov_afm.system.child_process import ChildProcess


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(_: ChildProcess, function: Any, *__: Any, **___: Any) -> None:
        pytest.fail(f"{function.__name__} was started")

    monkeypatch.setattr(ChildProcess, "run", run)


@pytest.mark.parametrize("recipe", ["fp16", "fp32"])
def test_formats_that_do_not_compress_are_refused(tiny_fp32: Path, tmp_path: Path, no_work: None, recipe: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compress(tiny_fp32, tmp_path / "out", recipe=recipe)
    assert caught.value.code == "recipe-does-not-compress"
    assert str(caught.value) == f"compress makes int8 and int4 models, found {recipe}; export the model in that format"


def test_device_that_cannot_run_the_recipe_is_refused_before_any_work(
    tiny_fp32: Path, tmp_path: Path, no_work: None
) -> None:
    with pytest.raises(DeviceError, match="NPU"):
        compress(tiny_fp32, tmp_path / "out", recipe=Recipe(weight_format="int4", group_size=64), device="NPU")
    with pytest.raises(DeviceError, match="NPU"):
        compress(tiny_fp32, tmp_path / "out", recipe=Recipe(weight_format="int4", sym=True, ratio=0.8), device="NPU")
    mixed = replace(RECIPES["int4-npu"], kinds=(("down", "int8"),))
    with pytest.raises(DeviceError, match="down=int8.*: it needs ratio 1.0"):
        compress(tiny_fp32, tmp_path / "out", recipe=mixed, device="NPU")
    assert list(tmp_path.iterdir()) == []


def test_checkpoint_in_place_of_a_model_gets_the_export_command(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(OVAFMError) as caught:
        compress(tiny_checkpoint, tmp_path / "out")
    assert f"run: ov-afm export {tiny_checkpoint} --output DIR" in str(caught.value)


@pytest.fixture
def fp32(tiny_fp32: Path, tmp_path: Path) -> Path:
    """An uncompressed model with all that is recorded of uncompressed weights."""
    folder = Path(shutil.copytree(tiny_fp32, tmp_path / "fp32"))
    for name in ("openvino_config.json", "npu.blob", "npu.blob.json"):
        (folder / name).write_text("{}")
    checks = {"weights": {"matrices": 14, "on_sampled_rows": 0, "equal": True}, "golden": self_test.make_golden(folder)}
    source = {"kind": "folder", "id": "tiny", "revision": None, "license": None, "weights": {}}
    geometry = ModelDirectory.open(folder).geometry
    with console.Progress() as bars:
        finish(folder, Manifest(source, geometry, RECIPES["fp32"].recorded(), checks=checks), bars)
    return folder


@pytest.mark.slow
def test_nothing_of_the_uncompressed_weights_is_carried_along(
    fp32: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ChildProcess, "run", lambda self, function, *args: function(*args))
    made = compress(fp32, tmp_path / "int4", recipe=Recipe(weight_format="int4", group_size=32))
    before = ModelDirectory.open(fp32).checks
    assert made.manifest.checks["golden"] == self_test.make_golden(made.path) != before["golden"]
    assert made.manifest.checks["compression"]["kl_mean"] > 0
    assert made.manifest.checks["weights"] == before["weights"]
    left_out = {"openvino_config.json", "npu.blob", "npu.blob.json"}
    assert {path.name for path in made.path.iterdir()} == {path.name for path in fp32.iterdir()} - left_out


def test_uncompressed_model_that_is_not_the_proved_one_is_refused(fp32: Path, tmp_path: Path, no_work: None) -> None:
    content = bytearray((fp32 / manifest.MODEL_BIN).read_bytes())
    content[0] ^= 1
    (fp32 / manifest.MODEL_BIN).write_bytes(content)
    with pytest.raises(SourceError) as caught:
        compress(fp32, tmp_path / "out")
    assert caught.value.code == "model-file-damaged"
    assert not (tmp_path / "out").exists()


def test_memory_that_cannot_hold_the_result_is_refused_with_figures(
    tiny_fp32: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resources, "free_memory", lambda: 500_000_000)
    with pytest.raises(OVAFMError, match=r"^compressing this model needs about 1\.00 GB of memory, 500\.0 MB are free"):
        compress(tiny_fp32, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
