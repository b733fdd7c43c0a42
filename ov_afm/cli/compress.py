"""`ov-afm compress`: the weights of a model in INT8 or INT4."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..compress import compress
from ..model_dir.manifest import MODEL_XML
from ..presets import DEFAULT_MODEL
from ..system import console
from .command import command, command_parser
from .info import report
from .recipe_options import add_recipe_arguments, recipe_from_arguments

__all__ = ["main"]


@command
def main(argv: Sequence[str] | None = None) -> int:
    """`ov-afm compress`."""
    options = command_parser("compress", "Compress the weights of a model to INT8 or INT4.")
    kind = "model directory with fp16 or fp32 weights, or what `ov-afm export` takes, which is exported first"
    options.add_argument("model", nargs="?", default=DEFAULT_MODEL, help=f"{kind} (default: {DEFAULT_MODEL})")
    options.add_argument("--output", "-o", metavar="DIR", help="new model directory")
    add_recipe_arguments(options)
    options.add_argument("--force", action="store_true", help="replace an older model directory")
    options.add_argument("--json", action="store_true", help="print the manifest")
    args = options.parse_args(argv)
    recipe = recipe_from_arguments(args) or "int8"
    if (Path(args.model) / MODEL_XML).exists():
        if args.output is None:
            options.error("give the new model directory: --output DIR")
        result = compress(args.model, args.output, recipe=recipe, device=args.device, force=args.force)
    else:
        # An export ends in the same compression and keeps the uncompressed model only while it works.
        from ..export import export

        result = export(args.model, args.output, recipe=recipe, device=args.device, force=args.force)
        if result.log is None:
            console.note(f"{result.path} is this export already; nothing was done (replace it with --force)")
    report(result, as_json=args.json)
    return 0
