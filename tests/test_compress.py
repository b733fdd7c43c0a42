"""`compress` refuses what it cannot do before any work."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ov_afm.compress import compress
from ov_afm.errors import ConfigError, DeviceError, OVAFMError
from ov_afm.presets import RECIPES, Recipe
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
