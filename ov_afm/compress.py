"""Compress the weights of an IR with NNCF: `ov-afm compress`, and the last step of an export.

NNCF keeps activations in floating point and stores weight matrices as INT8 or INT4 with scales.
Where it would skip an algorithm or change a layer's format in silence, this module says so: what was
asked and what was done are both in the manifest.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .cli.command import command
from .cli.command import parser as command_parser
from .cli.recipe_options import add_recipe_arguments, recipe_from_arguments, resolve_recipe
from .errors import CompressionError, ConfigError
from .model_dir import bundle, manifest
from .presets import DEFAULT_MODEL, Recipe
from .quantization.compress_weights import compress_ir, describe_weights
from .system import child_process, console, resources
from .system.atomic import disk_full_as_error, staging

__all__ = [
    "add_recipe_arguments",
    "compress",
    "compress_ir",
    "describe_weights",
    "recipe_from_arguments",
    "resolve_recipe",
]


def compress(
    model_dir: str | Path,
    output: str | Path,
    *,
    recipe: str | Recipe = "int8",
    device: str | None = None,
    force: bool = False,
    progress: console.Progress | None = None,
) -> bundle.Bundle:
    """Make a compressed model directory from an uncompressed one.

    Args:
        model_dir: Model directory with fp32, fp16 or bf16 weights.
        output: New model directory.
        recipe: Name of a recipe, or a `Recipe`.
        device: Device that must be able to run the result, such as "NPU"; refused before any work if it cannot.
        force: Replace a non-empty `output`.
        progress: Where to draw progress.

    Returns:
        The new model directory.

    Raises:
        CompressionError: The weights are compressed already, or the recipe does not fit them.
        ConfigError: The recipe is unknown or `output` cannot be written.
        DeviceError: `device` cannot run the recipe.
    """
    resources.require("export", "transformers", "nncf")
    source, target = Path(model_dir), Path(output)
    recipe = resolve_recipe(recipe, device)
    if recipe.bits > 8:
        raise ConfigError(
            f"compress makes int8 and int4 models, found {recipe.weight_format}; export the model in that format"
        )
    made_by = manifest.verify(source)
    progress = progress if progress is not None else console.Progress()
    log = resources.log_file(f"compress-{target.name}")
    with staging(target, replace=force) as partial, disk_full_as_error(target.parent):
        resources.check_disk(partial, {"the compressed model": (source / "openvino_model.bin").stat().st_size})
        for path in source.iterdir():
            skip = path.name in ("openvino_model.xml", "openvino_model.bin", manifest.FILE_NAME, "README.md")
            if path.is_file() and not skip:
                shutil.copyfile(path, partial / path.name)
        with progress:
            with progress.step("compressing weights") as advance:
                arguments = {"source": str(source), "out": str(partial), "recipe": recipe.to_dict()}
                summary = child_process.run(
                    "ov_afm.compress:_child",
                    arguments,
                    log=log,
                    on_event=progress_relay(advance),
                    died=CompressionError,
                )
            checks = dict(made_by.checks) if made_by else {}
            checks["compression"] = _cost_against_ir(source, partial, progress, log)
            result = manifest.Manifest(
                source=made_by.source if made_by else {"kind": "openvino", "id": source.name},
                geometry=made_by.geometry if made_by else bundle.geometry(source),
                recipe={**recipe.recorded(), **summary},
                versions=manifest.installed_versions(),
                checks=checks,
            )
            bundle.finish(partial, result, progress)
    return bundle.Bundle(target, result, log, summary.get("notes", []))


def progress_relay(advance: Any) -> Callable[[dict[str, Any]], None]:
    """A handler of a child's events that moves a bar by NNCF's own progress."""

    def show(event: dict[str, Any]) -> None:
        if event["event"] == "progress" and event["total"]:
            advance(to=event["done"], total=event["total"])

    return show


def _cost_against_ir(source: Path, target: Path, progress: console.Progress, log: Path) -> dict[str, Any]:
    """KL of a compressed IR against the uncompressed one, where memory allows."""
    need = 2.0 * (source / "openvino_model.bin").stat().st_size + 2e9
    if need > resources.free_memory():
        return {"skipped": f"the uncompressed model needs {need / 1e9:.1f} GB of memory"}
    with progress.step("measuring the cost"):
        arguments = {"source": str(source), "target": str(target)}
        result: dict[str, Any] = child_process.run(
            "ov_afm.conversion.verify:cost_between", arguments, log=log, died=CompressionError
        )
    return result


# -- In the child process


def _child(source: str, out: str, recipe: dict[str, Any]) -> dict[str, Any]:
    return compress_ir(Path(source) / "openvino_model.xml", Path(out), Recipe.from_dict(recipe), Path(source))


@command
def main(argv: Sequence[str] | None = None) -> int:
    """`ov-afm compress`."""
    parser = command_parser("compress", "Compress the weights of a model to INT8 or INT4.")
    what = "model directory with fp16 or fp32 weights, or what `ov-afm export` takes, which is exported first"
    parser.add_argument("model", nargs="?", default=DEFAULT_MODEL, help=f"{what} (default: {DEFAULT_MODEL})")
    parser.add_argument("--output", "-o", metavar="DIR", help="new model directory")
    add_recipe_arguments(parser)
    parser.add_argument("--force", action="store_true", help="replace a directory that is not empty")
    parser.add_argument("--json", action="store_true", help="print the manifest")
    args = parser.parse_args(argv)
    recipe = recipe_from_arguments(args)
    options = {"recipe": recipe if recipe is not None else "int8", "device": args.device, "force": args.force}
    if (Path(args.model) / "openvino_model.xml").exists():
        if args.output is None:
            parser.error("give the new model directory: --output DIR")
        result = compress(args.model, args.output, **options)
    else:
        # Both verbs end in the same compression; an export keeps the uncompressed model only while it works.
        from .export import export

        result = export(args.model, args.output, **options)
    bundle.report(result, as_json=args.json)
    return 0


if __name__ == "__main__":
    from .compress import main as run

    sys.exit(run())
