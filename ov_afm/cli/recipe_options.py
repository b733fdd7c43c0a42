"""Recipes on the command line: `--recipe`, and the flags of `optimum-cli export openvino` that change one."""

from __future__ import annotations

import argparse
import dataclasses

from ..presets import KINDS, RECIPES, Recipe
from ..quantization.recipes import load_recipe
from .command import given

__all__ = ["add_recipe_arguments", "recipe_from_arguments"]


def add_recipe_arguments(parser: argparse.ArgumentParser) -> None:
    """Add `--recipe` and the flags of `optimum-cli export openvino` that change it."""
    group = parser.add_argument_group("weights", "a named recipe, and flags of optimum-cli that override parts of it")
    add = group.add_argument
    names = ", ".join(RECIPES)
    add("--recipe", metavar="NAME", help=f"{names}, or a file of `ov-afm tune` (default: int8)")
    add("--weight-format", choices=["fp32", "fp16", "int8", "int4"], help="storage of the weights")
    add("--sym", action=argparse.BooleanOptionalAction, help="symmetric quantization")
    add("--group-size", type=int, help="weights that share a scale; -1 is one scale a row")
    add("--ratio", type=float, help="share of layers in 4 bits, the rest in backup precision")
    add("--backup-precision", choices=["none", "int8_sym", "int8_asym"], help="format of the rest")
    add("--all-layers", action="store_true", default=None, help="4 bits for embedding and head too")
    formats = f"head=int4,attention=int8: a format of their own for {', '.join(KINDS)}"
    add("--kind", dest="kinds", type=_kinds, metavar="KIND=FORMAT,...", help=formats)
    fallback = "for a layer whose width the group size does not divide"
    add("--group-size-fallback", choices=["error", "adjust", "ignore"], help=fallback)
    add("--awq", action="store_true", default=None, help="activation-aware weight scaling")
    add("--scale-estimation", action="store_true", default=None, help="fit scales to activations")
    add("--gptq", action="store_true", default=None, help="GPTQ rounding")
    add("--equalise", choices=["none", "fp16", "full"], help="exact rescaling before quantization")
    add("--rounding", choices=["nearest", "fitted"], help="fitted: layer by layer, to calibration data")
    data = ".txt, .jsonl, packaged, self, wikitext2, c4, gsm8k; several as a.jsonl:0.6,b.txt:0.4"
    add("--dataset", metavar="DATA", help=f"calibration data: {data}")
    add("--num-samples", type=int, help="calibration samples")
    add("--device", metavar="NAME", help="refuse a recipe that this device cannot run")


def _kinds(text: str) -> tuple[tuple[str, str], ...]:
    """`head=int4,down=int8` as pairs; `Recipe` refuses what is wrong with them."""
    words = (word.partition("=") for word in text.split(","))
    return tuple((kind.strip(), stored.strip()) for kind, _, stored in words)


def recipe_from_arguments(args: argparse.Namespace) -> Recipe | None:
    """The recipe that the command line asks for; None if it asks for none.

    Raises:
        ConfigError: A value is out of range or contradicts another.
    """
    changes = {name: value for name, value in given(Recipe, args).items() if value is not None}
    if args.recipe is None and not changes:
        return None
    base = load_recipe(args.recipe or args.weight_format or "int8")
    if dataclasses.replace(base, **changes) == base:
        return base
    # Data does not change what a recipe is; any other difference makes it the user's own.
    name = base.name if set(changes) <= {"dataset", "num_samples"} else "custom"
    return dataclasses.replace(base, name=name, **changes)
