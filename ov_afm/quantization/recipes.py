"""From the name of a recipe to a recipe that can be run on this data and that device."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ..errors import ConfigError
from ..presets import RECIPES, Recipe
from ..runtime import rules
from ..system.json_text import parse
from . import calibration

__all__ = ["load_recipe", "resolve_recipe"]


def resolve_recipe(recipe: str | Recipe, device: str | None = None) -> Recipe:
    """A recipe, with calibration data if it needs any, checked for its data and its device.

    Raises:
        ConfigError: The name is unknown, or calibration data is missing or unreadable.
        DeviceError: The device cannot run the recipe.
    """
    if isinstance(recipe, str):
        recipe = load_recipe(recipe)
    if recipe.dataset is not None:
        calibration.check(recipe.dataset)
    elif recipe.needs_data:
        recipe = replace(recipe, dataset=calibration.PACKAGED)
    if device is not None:
        rules.check(recipe, device)
    return recipe


def load_recipe(name: str) -> Recipe:
    """A named recipe, or the one in a file that `ov-afm tune` wrote.

    Raises:
        ConfigError: There is no recipe of that name, or the file holds none.
    """
    if name in RECIPES:
        return RECIPES[name]
    path = Path(name)
    if path.suffix != ".json" or not path.is_file():
        raise ConfigError(
            f"recipe {name!r} is unknown; choose one of {', '.join(RECIPES)}, or give a file that `ov-afm tune` wrote",
            code="recipe-unknown",
        )
    try:
        return Recipe.from_dict(parse(path.read_text(encoding="utf-8"))["recipe"])
    except ConfigError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{path} holds no recipe ({error!r}); write one with: ov-afm tune", code="recipe-unreadable"
        ) from error
