"""Flags of recipes mean what they mean for optimum-cli."""

from __future__ import annotations

import argparse

import pytest

from ov_afm.cli.recipe_options import add_recipe_arguments, recipe_from_arguments
from ov_afm.errors import ConfigError
from ov_afm.presets import RECIPES, Recipe


def recipe_of(*flags: str) -> Recipe | None:
    parser = argparse.ArgumentParser()
    add_recipe_arguments(parser)
    return recipe_from_arguments(parser.parse_args(flags))


def test_no_flags_ask_for_no_recipe() -> None:
    assert recipe_of() is None
    assert recipe_of("--device", "NPU") is None


@pytest.mark.parametrize("name", list(RECIPES))
def test_named_recipe_is_that_recipe(name: str) -> None:
    assert recipe_of("--recipe", name) is RECIPES[name]


def test_weight_format_alone_is_the_recipe_of_that_name() -> None:
    assert recipe_of("--weight-format", "int4") is RECIPES["int4"]


def test_flags_override_parts_and_make_the_recipe_custom() -> None:
    flags = ["--group-size", "32", "--ratio", "0", "--no-sym", "--all-layers", "--backup-precision", "none"]
    assert recipe_of("--recipe", "int4", *flags) == Recipe(
        name="custom",
        weight_format="int4",
        sym=False,
        group_size=32,
        ratio=0.0,
        all_layers=True,
        backup_precision="none",
    )


def test_formats_of_kinds_are_one_flag() -> None:
    found = recipe_of("--recipe", "int4", "--kind", "attention=int8, head=int4")
    assert found == Recipe(
        weight_format="int4", sym=True, group_size=128, kinds=(("head", "int4"), ("attention", "int8"))
    )
    with pytest.raises(ConfigError, match="^format '' of kind head is unknown; choose one of int4, int8$"):
        recipe_of("--recipe", "int4", "--kind", "head")


def test_data_does_not_change_the_name_of_a_recipe() -> None:
    found = recipe_of("--recipe", "int4-quality", "--dataset", "my.txt", "--num-samples", "7")
    assert found is not None
    assert (found.name, found.dataset, found.num_samples) == ("int4-quality", "my.txt", 7)


def test_every_algorithm_flag_arrives() -> None:
    found = recipe_of("--weight-format", "int4", "--awq", "--scale-estimation", "--gptq", "--dataset", "x.txt")
    assert found is not None
    assert found.awq
    assert found.scale_estimation
    assert found.gptq


def test_int4_with_the_weight_format_of_another_recipe_is_refused() -> None:
    with pytest.raises(ConfigError, match="only applies to int4"):
        recipe_of("--recipe", "int4", "--weight-format", "int8")
