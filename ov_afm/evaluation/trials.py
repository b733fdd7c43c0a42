"""What `ov-afm tune` tries, and which of the trials it takes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..presets import RECIPES, Equalise, Recipe

__all__ = ["Trial", "candidates", "chosen", "front", "refinements"]

GROUP_SIZES = (128, 64, 32)
RATIOS = (0.9, 0.8)
NUM_SAMPLES = 64
FITTED = " + fitted"
EQUALISED = " + equalise"
# Kinds of matrices that gain or lose most by a format of their own.
SMALLER: tuple[tuple[str, str], ...] = (("head", "int4"), ("embedding", "int4"))
NEARER: tuple[tuple[str, str], ...] = (("attention", "int8"), ("down", "int8"))


@dataclass(frozen=True, slots=True)
class Trial:
    """One recipe, tried.

    Attributes:
        label: What people see.
        recipe: The recipe; None where NNCF or the model refused it.
        weights_bytes: Size of `openvino_model.bin`.
        kl_mean: Mean KL divergence from the uncompressed model, nats.
        top1: Share of tokens whose first-ranked token is the same.
        seconds: Time of compression and evaluation.
        refused: Why it could not be made; None where it could.
    """

    label: str
    recipe: dict[str, Any]
    weights_bytes: int = 0
    kl_mean: float = float("inf")
    top1: float = 0.0
    seconds: float = 0.0
    refused: str | None = None


def candidates(dataset: str | None = None) -> Iterator[tuple[str, Recipe]]:
    """The first round: every format, plain, equalised and fitted; what takes minutes after what takes seconds."""
    int4 = Recipe("tuned", "int4", sym=True, num_samples=NUM_SAMPLES, dataset=dataset)
    groups = [(f"int4 g{size}", replace(int4, group_size=size)) for size in GROUP_SIZES]
    int8 = replace(RECIPES["int8"], name="tuned", num_samples=NUM_SAMPLES, dataset=dataset)
    for label, plain in [*groups, ("int8", int8)]:
        yield label, plain
        yield f"{label}{EQUALISED}", replace(plain, equalise="full")
    yield f"int4 rows{EQUALISED}", replace(int4, backup_precision="int8_sym", equalise="full")
    for label, plain in groups:
        yield f"{label}{FITTED}", _fitted(plain)
    for label, plain in groups:
        yield f"{label}{EQUALISED}{FITTED}", _fitted(replace(plain, equalise="full"))
    yield "int8-quality", replace(RECIPES["int8-quality"], name="tuned", dataset=dataset)


def refinements(trial: Trial) -> Iterator[tuple[str, Recipe]]:
    """The second round: what could be better than a trial of the first."""
    recipe = Recipe.from_dict(trial.recipe)
    if recipe.bits != 4:
        return
    base = trial.label.removesuffix(FITTED)
    label, fitted = f"{base}{FITTED}", _fitted(recipe)
    yield label, fitted
    for kind, stored in (*NEARER, *SMALLER):
        yield f"{label}, {kind} {stored}", replace(fitted, kinds=((kind, stored),))
    yield f"{label}, tables too", replace(fitted, all_layers=True)
    for ratio in RATIOS:
        yield f"{label}, {ratio:.0%} of layers", replace(fitted, ratio=ratio)
    if recipe.sym:
        yield f"{label}, asymmetric", replace(fitted, sym=False)
    equalise: Equalise = "full" if recipe.equalise == "full" else "none"
    nearest = replace(recipe, equalise=equalise, rounding="nearest", num_samples=NUM_SAMPLES)
    yield f"{base} + scale estimation", replace(nearest, scale_estimation=True)
    yield f"{base} + GPTQ", replace(nearest, gptq=True)


def _fitted(recipe: Recipe) -> Recipe:
    """A recipe with the rounding of the named `int4-quality`, and its guard where there is no equalisation."""
    quality = RECIPES["int4-quality"]
    equalise = quality.equalise if recipe.equalise == "none" else recipe.equalise
    return replace(recipe, equalise=equalise, rounding=quality.rounding, num_samples=quality.num_samples)


def front(trials: Sequence[Trial]) -> list[Trial]:
    """The trials that no other beats in both size and KL divergence, smallest first."""
    best: list[Trial] = []
    for trial in sorted(trials, key=lambda each: (each.weights_bytes, each.kl_mean)):
        if trial.refused is None and (not best or trial.kl_mean < best[-1].kl_mean):
            best.append(trial)
    return best


def chosen(trials: Sequence[Trial], max_bytes: float | None, max_kl: float | None) -> Trial | None:
    """The most faithful trial of at most `max_bytes`, or the smallest of at most `max_kl`; None if there is none."""
    made = front(trials)
    if max_bytes is not None:
        made = [trial for trial in made if trial.weights_bytes <= max_bytes]
    if max_kl is not None:
        made = [trial for trial in made if trial.kl_mean <= max_kl]
        return made[0] if made else None
    return made[-1] if made else None
