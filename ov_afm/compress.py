"""Compress the weights of an uncompressed model directory with NNCF.

NNCF keeps activations in floating point and stores weight matrices as INT8 or INT4 with scales. What it does in
silence, such as skipping an algorithm or giving a layer another format, is in the manifest and in the notes.
"""

from __future__ import annotations

import shutil
import sys
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from .errors import CompressionError, ConfigError
from .model_dir import manifest, outputs
from .model_dir.model_directory import ModelDirectory, ModelResult, finish
from .model_dir.tokenizer_files import ADDITIONAL_TEMPLATES
from .presets import Recipe
from .quantization import calibration
from .quantization.compress_weights import compress_ir
from .quantization.recipes import resolve_recipe
from .runtime import self_test
from .system import console, resources
from .system.atomic import disk_full_as_error
from .system.child_process import ChildProcess, Step

__all__ = ["compress"]

# Memory that Python, OpenVINO and NNCF take before the first weight is read.
BASE_BYTES = 1e9
# Made anew for the compressed model, or true of the uncompressed weights alone: what Optimum records of them, and what
# an NPU compiled from them.
LEFT_OUT = (
    manifest.MODEL_XML,
    manifest.MODEL_BIN,
    manifest.FILE_NAME,
    manifest.CARD_FILE,
    "openvino_config.json",
    "*.blob",
    "*.blob.json",
)


def compress(
    model_dir: str | Path,
    output: str | Path,
    *,
    recipe: str | Recipe = "int8",
    device: str | None = None,
    force: bool = False,
    progress: console.Progress | None = None,
) -> ModelResult:
    """Make a compressed model directory from an uncompressed one.

    Args:
        model_dir: Model directory with fp32, fp16 or bf16 weights.
        output: New model directory.
        recipe: Name of a recipe, or a `Recipe`.
        device: Device that must be able to run the result, such as "NPU"; refused before any work if it cannot.
        force: Replace an older model directory; other folders never.
        progress: Where to draw progress.

    Returns:
        The new model directory. Reference answers are recorded anew where the uncompressed model has them.

    Raises:
        SourceError: A file of the uncompressed model is not the one that its manifest records.
        CompressionError: The weights are compressed already, or the recipe does not fit them.
        ConfigError: The recipe is unknown or `output` cannot be written.
        DeviceError: `device` cannot run the recipe.
    """
    resources.require("export", "transformers", "nncf")
    recipe = resolve_recipe(recipe, device)
    if recipe.bits > 8:
        raise ConfigError(
            f"compress makes int8 and int4 models, found {recipe.weight_format}; export the model in that format",
            code="recipe-does-not-compress",
        )
    source, target = ModelDirectory.open(model_dir), Path(output)
    inputs = [source.path, *calibration.files(recipe.dataset)]
    log = resources.log_file(f"compress-{target.name}")
    with (
        outputs.new_folder(target, force=force, inputs=inputs) as partial,
        disk_full_as_error(target.parent),
        progress if progress is not None else console.Progress() as bars,
    ):
        resources.check_disk(partial, {"the compressed model": source.weights_bytes})
        _check_memory(source, recipe)
        _check_files(source, bars)
        for path in source.path.iterdir():
            if path.is_file() and not any(fnmatch(path.name, pattern) for pattern in LEFT_OUT):
                shutil.copyfile(path, partial / path.name)
        if (templates := source.path / ADDITIONAL_TEMPLATES).is_dir():
            shutil.copytree(templates, partial / ADDITIONAL_TEMPLATES)
        with console.step_bars(bars) as on_event:
            on_event(Step("compressing weights"))
            child = ChildProcess(log=log, on_event=on_event, died=CompressionError)
            summary = child.run(compress_ir, source.xml, partial, recipe, source.path)
        with bars.step("measuring the cost"):
            checks = {**source.checks, "compression": _cost(source, partial, log)}
        if checks.pop("golden", None):
            with bars.step("recording reference answers"):
                checks["golden"] = ChildProcess(log=log).run(self_test.make_golden, partial)
        contents = manifest.Manifest(
            source=source.manifest.source if source.manifest else {"kind": "openvino", "id": source.path.name},
            geometry=source.geometry,
            recipe={**recipe.recorded(), **summary},
            versions=manifest.installed_versions(),
            checks=checks,
            generation=source.manifest.generation if source.manifest else {},
        )
        finish(partial, contents, bars)
    return ModelResult(target, contents, log, summary.get("notes", []))


def _check_files(source: ModelDirectory, bars: console.Progress) -> None:
    """Make sure that what was proved of the uncompressed model is true of the files that are compressed."""
    if source.manifest is not None:
        size = sum(file["bytes"] for file in source.manifest.files.values())
        with bars.step("comparing with the manifest", total=size, unit="B") as advance:
            ModelDirectory.open(source.path, hashes=True, on_bytes=advance)


def _check_memory(source: ModelDirectory, recipe: Recipe) -> None:
    """Refuse what memory cannot hold: the source is mapped from its file, the compressed weights are made in memory."""
    shape = source.geometry
    largest = 4.0 * shape.hidden * max(shape.vocab, shape.intermediate)
    final = source.parameters * recipe.bits / 8
    resources.check_memory(BASE_BYTES + 2 * largest + final, "compressing this model")


def _cost(source: ModelDirectory, target: Path, log: Path) -> dict[str, Any]:
    """What compression cost, where memory holds the uncompressed model."""
    from .quantization.cost import cost_between

    required = 2.0 * source.weights_bytes + 2e9
    if required > resources.free_memory():
        return {"skipped": f"the uncompressed model needs {required / 1e9:.1f} GB of memory"}
    return ChildProcess(log=log, died=CompressionError).run(cost_between, source.path, target)


if __name__ == "__main__":
    from .cli import main

    sys.exit(main(["compress", *sys.argv[1:]]))
