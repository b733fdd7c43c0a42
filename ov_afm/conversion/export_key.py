"""What an export depends on: whether a finished one is the requested one, and if not, why not.

The manifest records all of it: the digest of every file of the source, adapters with their configuration, the recipe
with its calibration data, and the versions of the packages that did the work.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ..model_dir import manifest
from ..model_dir.manifest import Manifest
from ..presets import Recipe
from ..quantization import calibration

__all__ = ["differences"]


def differences(existing: Manifest, source: Mapping[str, Any], recipe: Recipe | None) -> list[str]:
    """How a new export would differ from a finished one; empty where it is the same.

    Args:
        existing: Manifest of the finished export.
        source: The source now, from `Source.describe`.
        recipe: The requested recipe; None for an OpenVINO model that is taken as it is.
    """
    found = [*_of_source(existing.source, source)]
    if recipe is not None:
        found += _of_recipe(existing.recipe, recipe)
    return [*found, *_of_versions(existing.versions)]


def _of_source(recorded: Mapping[str, Any], source: Mapping[str, Any]) -> Iterator[str]:
    for key in sorted({*recorded, *source}):
        before, now = recorded.get(key), source.get(key)
        if before == now:
            continue
        if key in ("weights", "files") and isinstance(before, dict):
            yield from _of_files(before, now or {})
        elif key == "files":
            yield "made by an ov_afm that did not record the source's files"
        elif key == "adapters":
            yield f"its adapters are {_names(before)}, not {_names(now)} as they are now"
        else:
            yield f"its source has {key} {before}, now {now}"


def _of_files(before: Mapping[str, str], now: Mapping[str, str]) -> Iterator[str]:
    for name in sorted({*before, *now}):
        if name not in now:
            yield f"{name} of its source is not there any more"
        elif name not in before:
            yield f"its source had no {name}"
        elif before[name] != now[name]:
            yield f"{name} of its source has changed"


def _names(adapters: list[dict[str, Any]] | None) -> str:
    return " + ".join(f"{each.get('name')}:{each.get('weight'):g}" for each in adapters or ()) or "none"


def _of_recipe(recorded: Mapping[str, Any], recipe: Recipe) -> Iterator[str]:
    # A field that an older ov_afm did not record had its default.
    complete = {**Recipe().recorded(), **recorded}
    for key, value in recipe.recorded().items():
        if complete[key] != value:
            what = "recipe" if key == "name" else key.replace("_", " ")
            yield f"its {what} is {complete[key]}, not {value}"
    used = recorded.get("calibration")
    if used is not None and recipe.dataset is not None:
        now = calibration.describe(recipe.dataset)
        if any(used.get(key) != value for key, value in now.items()):
            yield f"its calibration data {used.get('name')} has changed"


def _of_versions(recorded: Mapping[str, str | None]) -> Iterator[str]:
    for package, version in manifest.installed_versions().items():
        if recorded.get(package) != version:
            yield f"made with {package} {recorded.get(package) or 'unknown'}, {version} is installed"
