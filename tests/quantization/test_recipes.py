"""A recipe's name becomes a recipe that can be run, or is refused before any work."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from ov_afm.errors import ConfigError, DeviceError
from ov_afm.presets import RECIPES, Recipe
from ov_afm.quantization import calibration
from ov_afm.quantization.recipes import load_recipe, resolve_recipe


def test_recipe_that_needs_data_and_was_given_none_takes_the_packaged_text() -> None:
    assert resolve_recipe("int4-quality").dataset == calibration.PACKAGED
    assert resolve_recipe("int4").dataset is None
    assert resolve_recipe(Recipe(equalise="fp16")).dataset == calibration.PACKAGED


def test_recipe_of_a_file_is_read(tmp_path: Path) -> None:
    recipe = replace(RECIPES["int4"], name="tuned", kinds=(("head", "int4"),))
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps({"recipe": recipe.to_dict()}))
    assert resolve_recipe(str(path)) == recipe


@pytest.mark.parametrize(
    ("content", "code"),
    [
        ("{", "recipe-unreadable"),
        ("[]", "recipe-unreadable"),
        ("{}", "recipe-unreadable"),
        ('{"recipe": [1]}', "recipe-unreadable"),
        ('{"recipe": {"weight_format": "int3"}}', "recipe-invalid"),
    ],
    ids=["no-json", "list", "no-recipe", "no-object", "impossible"],
)
def test_file_without_a_recipe_is_refused(tmp_path: Path, content: str, code: str) -> None:
    path = tmp_path / "recipe.json"
    path.write_text(content)
    with pytest.raises(ConfigError) as caught:
        load_recipe(str(path))
    assert caught.value.code == code


def test_unknown_name_is_refused_with_those_that_exist() -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe("int5")
    assert caught.value.code == "recipe-unknown"
    assert all(name in str(caught.value) for name in ("'int5'", *RECIPES))


def test_device_that_cannot_run_a_recipe_refuses_it() -> None:
    assert resolve_recipe("int4-npu", "NPU") is RECIPES["int4-npu"]
    with pytest.raises(DeviceError, match="NPU"):
        resolve_recipe("int4-quality", "NPU")
