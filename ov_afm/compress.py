"""Compress the weights of an IR with NNCF: `ov-afm compress`, and the last step of an export.

NNCF keeps activations in floating point and stores weight matrices as INT8 or INT4 with scales.
Where it would skip an algorithm or change a layer's format in silence, this module says so: what was
asked and what was done are both in the manifest.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from . import bundle, calibration, console, manifest, resources, supervise
from .errors import CompressionError, ConfigError
from .presets import DEFAULT_MODEL, RECIPES, Recipe
from .staging import disk_full_as_error, staging

__all__ = ["add_recipe_arguments", "compress", "recipe_from_arguments"]

AWQ_NO_PATTERN = "No matching patterns were found for applying AWQ"


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
        msg = f"compress makes int8 and int4 models, found {recipe.weight_format}; export the model in that format"
        raise ConfigError(msg)
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
                summary = supervise.run(
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


def resolve_recipe(recipe: str | Recipe, device: str | None = None) -> Recipe:
    """The recipe of that name, checked for what its data and its device need.

    Raises:
        ConfigError: Unknown name, or calibration data is missing or unreadable.
        DeviceError: The device cannot run the recipe.
    """
    if isinstance(recipe, str):
        if recipe not in RECIPES:
            msg = f"recipe {recipe!r} is unknown; choose one of {', '.join(RECIPES)}"
            raise ConfigError(msg)
        recipe = RECIPES[recipe]
    if recipe.dataset is not None:
        calibration.check(recipe.dataset)
    elif recipe.scale_estimation or recipe.gptq:
        what = "scale estimation" if recipe.scale_estimation else "GPTQ"
        msg = f"recipe {recipe.name} uses {what}, which needs calibration data: add --dataset FILE.txt (or .jsonl)"
        raise ConfigError(msg)
    if device:
        from .devices import check as check_device

        check_device(recipe, device)
    return recipe


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
        result: dict[str, Any] = supervise.run("ov_afm.verify:cost_between", arguments, log=log, died=CompressionError)
    return result


# -- In the child process


def _child(source: str, out: str, recipe: dict[str, Any]) -> dict[str, Any]:
    return compress_ir(Path(source) / "openvino_model.xml", Path(out), Recipe.from_dict(recipe), Path(source))


def compress_ir(ir: Path, out: Path, settings: Recipe, tokenizer: Path) -> dict[str, Any]:
    """Compress the weights of an IR.

    Args:
        ir: Path of an uncompressed `openvino_model.xml`.
        out: Folder for the compressed one.
        settings: What to do.
        tokenizer: Folder with the tokenizer, for calibration.

    Returns:
        `layers`: weight matrices by format; `notes` for the user; `calibration` data if any was used.

    Raises:
        CompressionError: The weights are compressed already, or NNCF refuses the recipe for this model.
    """
    import nncf
    import openvino

    model = openvino.Core().read_model(ir)
    present = _weight_formats(model)
    if any(name.startswith(("int", "uint", "nf4")) for name in present):
        msg = f"the weights are compressed already ({', '.join(present)}); start from an fp16 or fp32 export"
        raise CompressionError(msg)
    options, data = _nncf_options(settings, model, tokenizer)
    notes: list[str] = []
    with _relay_progress(), _collect_warnings(settings, notes):
        try:
            model = nncf.compress_weights(model, **options)
        except (nncf.InvalidGroupSizeError, nncf.ValidationError, nncf.ParameterNotSupportedError) as error:
            msg = f"NNCF cannot apply recipe {settings.name}: {' '.join(str(error).split())}"
            raise CompressionError(msg) from error
    _drop_cache_precision(model)
    formats = _weight_formats(model)
    notes += _fallback_notes(settings, formats)
    openvino.save_model(model, out / "openvino_model.xml", compress_to_fp16=False)
    return {"layers": formats, "notes": notes, **({"calibration": data} if data else {})}


def _nncf_options(settings: Recipe, model: Any, tokenizer: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    import nncf

    suffix = "SYM" if settings.sym else "ASYM"
    options: dict[str, Any] = {"mode": nncf.CompressWeightsMode[f"INT{settings.bits}_{suffix}"]}
    if settings.bits == 8:
        return options, {}
    fallback = nncf.GroupSizeFallbackMode[settings.group_size_fallback.upper()]
    options |= {
        "group_size": settings.group_size,
        "ratio": settings.ratio,
        "all_layers": settings.all_layers,
        "backup_mode": nncf.BackupMode[settings.backup_precision.upper()],
        "awq": settings.awq,
        "scale_estimation": settings.scale_estimation,
        "gptq": settings.gptq,
        "advanced_parameters": nncf.AdvancedCompressionParameters(group_size_fallback_mode=fallback),
    }
    if settings.dataset is None:
        return options, {}
    from transformers import AutoTokenizer

    samples = calibration.token_samples(
        settings.dataset, AutoTokenizer.from_pretrained(tokenizer), settings.num_samples
    )
    names = {name for port in model.inputs for name in port.get_names()}
    options["dataset"] = nncf.Dataset([calibration.model_inputs(ids, names) for ids in samples])
    options["subset_size"] = len(samples)
    tokens = sum(map(len, samples))
    return options, {**calibration.describe(settings.dataset), "samples": len(samples), "tokens": tokens}


def describe_weights(folder: str) -> dict[str, Any]:
    """The manifest's `layers` of a model directory that was made elsewhere."""
    import openvino

    return {"layers": _weight_formats(openvino.Core().read_model(Path(folder) / "openvino_model.xml"))}


def _drop_cache_precision(model: Any) -> None:
    """Forget the f16 KV cache that Optimum asks for uncompressed models, as optimum-cli does too."""
    if model.has_rt_info(["runtime_options", "KV_CACHE_PRECISION"]):
        options = model.get_rt_info("runtime_options").value
        options.pop("KV_CACHE_PRECISION")
        model.set_rt_info(options, "runtime_options")


def _weight_formats(model: Any) -> dict[str, int]:
    """How many weight matrices are stored in each format, such as `{"int4_sym g128": 252}`."""
    constants = {
        node.get_friendly_name(): node
        for node in model.get_ops()
        if node.get_type_name() == "Constant" and len(node.get_output_shape(0)) >= 2
    }
    found: Counter[str] = Counter()
    for name, node in constants.items():
        if not name.startswith("self.") or name.endswith(("/zero_point", "/scale")):
            continue
        kind, shape = node.get_element_type().get_type_name(), node.get_output_shape(0)
        if kind in ("i4", "u4", "i8", "u8"):
            symmetry = "asym" if f"{name}/zero_point" in constants else "sym"
            group = f"g{shape[-1]}" if len(shape) == 3 else "per row"
            found[f"int{kind[1:]}_{symmetry} {group}"] += 1
        else:
            found[kind] += 1
    return dict(found)


def _fallback_notes(settings: Recipe, formats: dict[str, int]) -> list[str]:
    if settings.bits != 4 or settings.group_size < 0:
        return []
    expected = f"g{settings.group_size}"
    other = {name: count for name, count in formats.items() if name.startswith("int4") and not name.endswith(expected)}
    # Without a backup precision, embedding and head stay as they are too.
    left = 2 if settings.backup_precision == "none" and not settings.all_layers else 0
    floats = {name: count for name, count in formats.items() if not name.startswith("int")}
    if sum(floats.values()) > left:
        other |= floats
    if not other and any(name.startswith("int4") for name in formats):
        return []
    found = ", ".join(f"{count} of {name}" for name, count in (other or formats).items())
    return [f"group size {settings.group_size} does not divide every layer's input dimension: {found}"]


@contextmanager
def _relay_progress() -> Iterator[None]:
    """Send NNCF's progress bars (rich's) to the parent as events."""
    from rich.progress import Progress

    original = Progress.advance

    def advance(self: Progress, task_id: Any, advance: float = 1) -> None:
        original(self, task_id, advance)
        task = self._tasks[task_id]
        supervise.emit("progress", name=task.description, done=float(task.completed), total=float(task.total or 0))

    Progress.advance = advance  # type: ignore[method-assign]
    try:
        yield
    finally:
        Progress.advance = original  # type: ignore[method-assign]


@contextmanager
def _collect_warnings(settings: Recipe, notes: list[str]) -> Iterator[None]:
    """Turn what NNCF only logs, an algorithm that did nothing, into notes for the user."""

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if settings.awq and AWQ_NO_PATTERN in record.getMessage():
                notes.append(
                    "AWQ did nothing: NNCF knows no pattern that fits this model's MLP; the weights are plain "
                    f"{settings.weight_format}"
                )

    handler, logger = Collector(), logging.getLogger("nncf")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


# -- Command line


def add_recipe_arguments(parser: argparse.ArgumentParser) -> None:
    """Add `--recipe` and the flags of `optimum-cli export openvino` that change it."""
    group = parser.add_argument_group("weights", "a named recipe, and flags of optimum-cli that override parts of it")
    group.add_argument("--recipe", choices=list(RECIPES), help="named recipe (default: int8)")
    group.add_argument("--weight-format", choices=["fp32", "fp16", "int8", "int4"], help="storage of the weights")
    group.add_argument("--sym", action=argparse.BooleanOptionalAction, help="symmetric quantization")
    group.add_argument("--group-size", type=int, help="weights that share a scale; -1 is one scale a row")
    group.add_argument("--ratio", type=float, help="share of layers in 4 bits, the rest in backup precision")
    group.add_argument("--backup-precision", choices=["none", "int8_sym", "int8_asym"], help="format of the rest")
    group.add_argument("--all-layers", action="store_true", default=None, help="4 bits for embedding and head too")
    group.add_argument("--group-size-fallback", choices=["error", "adjust", "ignore"], help="layer that it splits not")
    group.add_argument("--awq", action="store_true", default=None, help="activation-aware weight scaling")
    group.add_argument("--scale-estimation", action="store_true", default=None, help="fit scales to activations")
    group.add_argument("--gptq", action="store_true", default=None, help="GPTQ rounding")
    group.add_argument("--dataset", metavar="FILE", help="calibration data: .txt, .jsonl, or wikitext2, c4, gsm8k")
    group.add_argument("--num-samples", type=int, help="calibration samples")
    group.add_argument("--device", metavar="NAME", help="refuse a recipe that this device cannot run")


def recipe_from_arguments(args: argparse.Namespace) -> Recipe | None:
    """The recipe that the command line asks for; None if it asks for none.

    Raises:
        ConfigError: A value is out of range or contradicts another.
    """
    fields = {field.name for field in dataclasses.fields(Recipe)} - {"name"}
    changes = {name: value for name, value in vars(args).items() if name in fields and value is not None}
    if args.recipe is None and not changes:
        return None
    base = RECIPES[args.recipe or args.weight_format or "int8"]
    if all(getattr(base, name) == value for name, value in changes.items()):
        return base
    # Data does not change what a recipe is; any other difference makes it the user's own.
    name = base.name if set(changes) <= {"dataset", "num_samples"} else "custom"
    return dataclasses.replace(base, name=name, **changes)


@console.command
def main(argv: Sequence[str] | None = None) -> int:
    """`ov-afm compress`."""
    parser = console.parser("compress", "Compress the weights of a model to INT8 or INT4.")
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
    from ov_afm.compress import main as run

    sys.exit(run())
