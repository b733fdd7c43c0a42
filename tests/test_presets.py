"""Recipes that exist can be run; the rest are refused with the value found."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from ov_afm.errors import ConfigError
from ov_afm.presets import KINDS, RECIPES, SAMPLING, Recipe, Sampling


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
        ({"equalise": "some"}, "equalisation 'some' is unknown; choose one of none, fp16, full"),
        (
            {"weight_format": "fp16", "equalise": "full"},
            "equalisation 'full' prepares for int8 and int4, found fp16; choose fp16 or none",
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
    for name, bits, equalise in (("int4-quality", 4, "fp16"), ("int8-quality", 8, "full")):
        quality = RECIPES[name]
        assert (quality.bits, quality.equalise, quality.rounding) == (bits, equalise, "fitted")
        assert quality.needs_data


def test_manifest_gets_no_path_of_this_machine() -> None:
    recipe = Recipe(weight_format="int4", gptq=True, dataset="some/folder/data.txt")
    assert recipe.recorded()["dataset"] == "data.txt"
    assert RECIPES["int8"].recorded()["dataset"] is None


def test_sampling_that_the_makers_recommend() -> None:
    assert {"arcee": Sampling(temperature=0.5, top_k=50, top_p=0.95, repetition_penalty=1.1)} == SAMPLING


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"kinds": (("norm", "int8"),)},
            "kind of matrices 'norm' is unknown; choose one of embedding, head, attention, up, gate, down",
        ),
        ({"kinds": (("head", "int2"),)}, "format 'int2' of kind head is unknown; choose one of int4, int8"),
        ({"kinds": (("head", ""),)}, "format '' of kind head is unknown; choose one of int4, int8"),
        (
            {"kinds": (("down", "int8"),), "backup_precision": "none"},
            "down=int8 takes the backup precision, found none; choose int8_sym or int8_asym",
        ),
        (
            {"kinds": (("embedding", "int8"),), "all_layers": True},
            "--all-layers has a format for embedding and head already, found embedding=int8; choose one",
        ),
        (
            {"kinds": (("up", "int4"), ("up", "int8"))},
            "a kind of matrices has one format, found up=int4 up=int8",
        ),
        (
            {"kinds": (("head", "int4"),), "weight_format": "int8"},
            "--kind only applies to int4, found weight format int8",
        ),
    ],
    ids=["kind", "format", "no-format", "no-backup", "all-layers", "twice", "int8"],
)
def test_impossible_formats_of_kinds_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Recipe(**{"weight_format": "int4", **fields})
    assert str(caught.value) == message


def test_formats_of_kinds_survive_json_in_any_order() -> None:
    recipe = Recipe(weight_format="int4", kinds=(("down", "int8"), ("head", "int4")))
    fields = recipe.to_dict()
    assert fields["kinds"] == {"head": "int4", "down": "int8"}
    assert json.loads(json.dumps(fields)) == fields
    assert Recipe.from_dict(fields) == recipe
    assert hash(recipe) == hash(replace(recipe, kinds=(("head", "int4"), ("down", "int8"))))
    assert Recipe.from_dict({"weight_format": "int4"}).kinds == ()


def test_what_is_kept_out_of_four_bits() -> None:
    recipe = Recipe(weight_format="int4", kinds=(("down", "int8"), ("head", "int4")))
    assert [kind for kind in KINDS if recipe.in_backup(kind)] == ["embedding", "down"]
    assert not any(map(Recipe(weight_format="int4", all_layers=True).in_backup, KINDS))
