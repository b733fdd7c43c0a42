"""Recipes on the command line: `--recipe`, and the flags of `optimum-cli export openvino` that change one."""

from __future__ import annotations

import argparse
import dataclasses

from ..presets import KINDS, RECIPES, Recipe
from ..quantization.recipes import load_recipe

__all__ = ["add_recipe_arguments", "recipe_from_arguments"]


def add_recipe_arguments(parser: argparse.ArgumentParser) -> None:
    """Add `--recipe` and the flags of `optimum-cli export openvino` that change it."""
    group = parser.add_argument_group("weights", "a named recipe, and flags of optimum-cli that override parts of it")
    names = ", ".join(RECIPES)
    group.add_argument("--recipe", metavar="NAME", help=f"{names}, or a file of `ov-afm tune` (default: int8)")
    group.add_argument("--weight-format", choices=["fp32", "fp16", "int8", "int4"], help="storage of the weights")
    group.add_argument("--sym", action=argparse.BooleanOptionalAction, help="symmetric quantization")
    group.add_argument("--group-size", type=int, help="weights that share a scale; -1 is one scale a row")
    group.add_argument("--ratio", type=float, help="share of layers in 4 bits, the rest in backup precision")
    group.add_argument("--backup-precision", choices=["none", "int8_sym", "int8_asym"], help="format of the rest")
    group.add_argument("--all-layers", action="store_true", default=None, help="4 bits for embedding and head too")
    group.add_argument("--kind", dest="kinds", type=_kinds, metavar="KIND=FORMAT,...",
                       help=f"head=int4,attention=int8: a format of their own for {', '.join(KINDS)}")  # fmt: skip
    group.add_argument("--group-size-fallback", choices=["error", "adjust", "ignore"],
                       help="for a layer whose width the group size does not divide")  # fmt: skip
    group.add_argument("--awq", action="store_true", default=None, help="activation-aware weight scaling")
    group.add_argument("--scale-estimation", action="store_true", default=None, help="fit scales to activations")
    group.add_argument("--gptq", action="store_true", default=None, help="GPTQ rounding")
    group.add_argument("--equalise", choices=["none", "fp16", "full"], help="exact rescaling before quantization")
    group.add_argument("--rounding", choices=["nearest", "fitted"], help="fitted: layer by layer, to calibration data")
    group.add_argument(
        "--dataset",
        metavar="DATA",
        help="calibration data: .txt, .jsonl, packaged, self, wikitext2, c4, gsm8k; several as a.jsonl:0.6,b.txt:0.4",
    )
    group.add_argument("--num-samples", type=int, help="calibration samples")
    group.add_argument("--device", metavar="NAME", help="refuse a recipe that this device cannot run")


def _kinds(text: str) -> tuple[tuple[str, str], ...]:
    """`head=int4,down=int8` as pairs; `Recipe` refuses what is wrong with them."""
    words = (word.partition("=") for word in text.split(","))
    return tuple((kind.strip(), stored.strip()) for kind, _, stored in words)


def recipe_from_arguments(args: argparse.Namespace) -> Recipe | None:
    """The recipe that the command line asks for; None if it asks for none.

    Raises:
        ConfigError: A value is out of range or contradicts another.
    """
    fields = {field.name for field in dataclasses.fields(Recipe)} - {"name"}
    changes = {name: value for name, value in vars(args).items() if name in fields and value is not None}
    if args.recipe is None and not changes:
        return None
    base = load_recipe(args.recipe or args.weight_format or "int8")
    if dataclasses.replace(base, **changes) == base:
        return base
    # Data does not change what a recipe is; any other difference makes it the user's own.
    name = base.name if set(changes) <= {"dataset", "num_samples"} else "custom"
    return dataclasses.replace(base, name=name, **changes)
