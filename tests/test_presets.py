"""Recipes that exist can be run; the rest are refused with the value found."""

from __future__ import annotations

from typing import Any

import pytest

from ov_afm.errors import ConfigError
from ov_afm.presets import GEOMETRIES, RECIPES, SAMPLING, Recipe, Sampling


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"weight_format": "int3"}, "weight format 'int3' is unknown; choose one of fp32, fp16, int8, int4"),
        (
            {"weight_format": "int4", "backup_precision": "int2"},
            "backup precision 'int2' is unknown; choose one of none, int8_sym, int8_asym",
        ),
        ({"weight_format": "int4", "ratio": 1.1}, "ratio must lie between 0 and 1, found 1.1"),
        ({"weight_format": "int4", "ratio": -0.1}, "ratio must lie between 0 and 1, found -0.1"),
        ({"weight_format": "int4", "ratio": float("nan")}, "ratio must lie between 0 and 1, found nan"),
        (
            {"weight_format": "int4", "group_size": 0},
            "group size must be -1 (one scale a row) or a multiple of 16, found 0",
        ),
        (
            {"weight_format": "int4", "group_size": 100},
            "group size must be -1 (one scale a row) or a multiple of 16, found 100",
        ),
        ({"rounding": "up"}, "rounding 'up' is unknown; choose one of nearest, fitted"),
        (
            {"weight_format": "int4", "rounding": "fitted", "scale_estimation": True, "gptq": True},
            "fitted rounding takes the place of --scale-estimation, --gptq; choose one",
        ),
        ({"weight_format": "fp16", "rounding": "fitted"}, "fitted rounding is for int8 and int4, found fp16"),
        ({"num_samples": 0}, "number of calibration samples must be at least 1, found 0"),
        (
            {"weight_format": "int8", "group_size": 64, "awq": True},
            "--group-size, --awq only applies to int4, found weight format int8",
        ),
        ({"weight_format": "fp16", "ratio": 0.5}, "--ratio only applies to int4, found weight format fp16"),
    ],
)
def test_impossible_recipe_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Recipe(**fields)
    assert str(caught.value) == message


def test_ratio_zero_is_legitimate() -> None:
    assert Recipe(weight_format="int4", ratio=0.0).ratio == 0.0


@pytest.mark.parametrize("name", list(RECIPES))
def test_recipe_survives_the_manifest(name: str) -> None:
    recipe = RECIPES[name]
    assert recipe.name == name
    assert Recipe.from_dict({**recipe.to_dict(), "added_by_a_newer_one": 1}) == recipe


def test_named_recipes_are_what_the_guides_say() -> None:
    int4, npu = RECIPES["int4"], RECIPES["int4-npu"]
    assert (int4.sym, int4.group_size, int4.ratio) == (True, 128, 1.0)
    assert (npu.sym, npu.group_size, npu.ratio, npu.backup_precision) == (True, -1, 1.0, "int8_sym")
    assert RECIPES["int4-npu-g128"].group_size == 128
    for name, bits in (("int4-quality", 4), ("int8-quality", 8)):
        quality = RECIPES[name]
        assert (quality.bits, quality.equalise, quality.rounding) == (bits, "full", "fitted")
        assert quality.needs_data


def test_manifest_gets_no_path_of_this_machine() -> None:
    recipe = Recipe(weight_format="int4", gptq=True, dataset="some/folder/data.txt")
    assert recipe.recorded()["dataset"] == "data.txt"
    assert RECIPES["int8"].recorded()["dataset"] is None


def test_sampling_that_the_makers_recommend() -> None:
    assert {"arcee": Sampling(temperature=0.5, top_k=50, top_p=0.95, repetition_penalty=1.1)} == SAMPLING


def test_afm_has_its_published_size() -> None:
    assert GEOMETRIES["afm-4.5b"].parameters == pytest.approx(4.62e9, rel=0.005)
