"""Checkpoint → verified model directory: `ov-afm export`, `python -m ov_afm.export`.

The steps: resolve the source, refuse what cannot fit, convert with Optimum-Intel at the checkpoint's
own precision, prove the IR equal to its source, compress with NNCF, prove tokenizer and template,
write the manifest, and only then give the directory its name.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from .cli.command import command
from .cli.command import parser as command_parser
from .compress import add_recipe_arguments, recipe_from_arguments, resolve_recipe
from .conversion.pack_kernels import pack, pack_if_it_pays
from .conversion.prebuilt import adopt
from .conversion.requirements import BASE_BYTES, check_fit, parameters
from .conversion.sources import Source, resolve
from .errors import ConfigError, ExportError, SourceError
from .model_dir import bundle, manifest, ovms
from .model_dir.bundle import Bundle
from .presets import DEFAULT_MODEL, SAMPLING, Recipe
from .quantization import calibration
from .runtime.lora import Adapter, read_all
from .system import child_process, console, resources
from .system.atomic import disk_full_as_error, staging
from .system.background import StepBars, in_background

__all__ = ["export"]

STEPS = {
    "tokenizer": "converting the tokenizer",
    "reading": "reading the checkpoint",
    "converting": "converting the model",
    "proving": "comparing with the source",
    "compressing": "compressing weights",
    "verifying": "verifying the result",
}
KERNELS = {"auto": None, "relu2": True, "none": False}
# Above it, recording answers to a prompt of 2,112 tokens at f32 would take longer than the export.
GOLDEN_PARAMETERS = 1e9


def export(
    model: str | Path = DEFAULT_MODEL,
    output: str | Path | None = None,
    *,
    recipe: str | Recipe | None = None,
    revision: str | None = None,
    device: str | None = None,
    verify: bool = True,
    golden: bool | None = None,
    kernels: bool | None = False,
    force: bool = False,
    work_dir: str | Path | None = None,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    adapters: Sequence[str | Path | Adapter] = (),
    progress: console.Progress | None = None,
) -> Bundle:
    """Export a model to a verified OpenVINO model directory.

    Args:
        model: Hub id, checkpoint folder, `.gguf` file, embedded name or OpenVINO model; see `sources`.
        output: New model directory; default `NAME-RECIPE` in the current folder.
        recipe: Name of a recipe or a `Recipe`; default int8.
        revision: Commit, tag or branch of a Hub repository.
        device: Device that must be able to run the result; refused before any work if it cannot.
        verify: Compare tokenizer, template, weights and logits with the source.
        golden: Record how the model answers on CPU at f32, for the self-test of other devices. None
            does it up to 1 B parameters, and for any size when `device` is a GPU or an NPU; otherwise that self-test
            does it when it is first needed.
        kernels: Pack a ReLU² model for the native CPU kernels too, beside the plain model. None does it for a quantized
            model that is for the CPU, if its share of zeros pays and nothing is in the way.
        force: Replace a non-empty `output`.
        work_dir: Folder for the uncompressed IR (about the checkpoint's size); default beside `output`.
        allow_pickle: Accept weights that are only there as pickles.
        trust_remote_code: Run Python code that comes with the checkpoint.
        adapters: LoRA adapters in PEFT's form (files, folders, or either with `:WEIGHT`) to merge before the export.
        progress: Where to draw progress.

    Returns:
        The model directory; the one that is there, untouched, if it is this very export.

    Raises:
        OVAFMError: The source, the machine or the options do not allow it; nothing is left behind.
    """
    resources.require("export", "torch", "transformers", "optimum.intel", "nncf")
    settings = resolve_recipe(recipe if recipe is not None else "int8", device)
    to_merge = read_all(adapters)
    with progress if progress is not None else console.Progress() as bars:
        source = resolve(model, revision, allow_pickle=allow_pickle, trust_remote_code=trust_remote_code, progress=bars)
        source = dataclasses.replace(source, adapters=to_merge)
        if source.prebuilt and adapters:
            raise ConfigError(
                f"{source.id} is an OpenVINO model already, nothing can be merged into it; export its checkpoint"
            )
        if source.prebuilt and recipe is not None:
            raise ConfigError(f"{source.id} is an OpenVINO model already and is taken as it is; leave the recipe out")
        target = Path(output) if output is not None else _default_output(source, settings)
        if not force and (finished := _finished(target, source, settings, verify, bars)):
            return finished
        log = resources.log_file(f"export-{target.name}")
        with ExitStack() as stack:
            partial = stack.enter_context(staging(target, replace=force))
            stack.enter_context(disk_full_as_error(target.parent))
            if source.prebuilt:
                result = adopt(source, partial, bars, log, verify)
            else:
                work = stack.enter_context(_work_folder(partial, work_dir))
                check_fit(source, settings, partial, work)
                result = _build(source, settings, partial, work, bars, log, verify, trust_remote_code)
                shutil.rmtree(work)
            if golden is None:
                golden = sum(parameters(source)) <= GOLDEN_PARAMETERS or (device or "CPU").upper()[:3] in (
                    "GPU",
                    "NPU",
                )
            if golden and verify:
                with bars.step("recording reference answers"):
                    answers = child_process.run(
                        "ov_afm.runtime.self_test:make_golden", {"model_dir": str(partial)}, log=log
                    )
                result.checks["golden"] = answers
            bundle.finish(partial, result, bars)
            note = None
            if kernels:
                result = pack(partial, bars)
            elif kernels is None:
                result, note = pack_if_it_pays(partial, result, device, bars, log)
    return Bundle(target, result, log, [*_notes(result), *filter(None, [note])])


def _default_output(source: Source, settings: Recipe) -> Path:
    name = source.id.rpartition("/")[2].removesuffix(".gguf")
    return Path(name if source.prebuilt else f"{name}-{settings.name}")


def _finished(
    target: Path, source: Source, settings: Recipe, verify: bool, progress: console.Progress
) -> Bundle | None:
    """The export that is there already, if it is the one asked for.

    Raises:
        ConfigError: Another model or recipe is there, or this one is damaged.
    """
    if not (target / manifest.FILE_NAME).exists():
        return None
    try:
        there = manifest.verify(target)
    except SourceError as error:
        what = str(error).rpartition(";")[0]
        raise ConfigError(f"{target} holds a model that cannot be used ({what}); replace it with --force") from error
    assert there is not None
    with progress.step("comparing with what is there", total=_weight_bytes(source), unit="B") as advance:
        same_source = there.source == source.describe(advance)
    wanted = {} if source.prebuilt else settings.recorded()
    # What an older ov_afm did not record it did not do.
    recorded = {**Recipe().recorded(), **there.recipe}
    same_recipe = all(recorded[key] == value for key, value in wanted.items())
    if not (same_source and same_recipe and _same_data(settings, there)):
        raise ConfigError(
            f"{target} holds another model ({there.source.get('id')}, recipe {there.recipe.get('name')}); "
            "choose another output directory, or replace it with --force"
        )
    if verify and "skipped" in there.checks:
        raise ConfigError(
            f"{target} holds this export, but not verified; verify a new one with --force, or go on with --no-verify"
        )
    return Bundle(target, there)


def _same_data(settings: Recipe, there: manifest.Manifest) -> bool:
    """Whether the calibration data are those that were used; of a recipe that read none, any are."""
    used = there.recipe.get("calibration")
    if used is None or settings.dataset is None:
        return True
    return all(used.get(key) == value for key, value in calibration.describe(settings.dataset).items())


def _weight_bytes(source: Source) -> int:
    return sum(path.stat().st_size for path in source.weights)


@contextmanager
def _work_folder(partial: Path, work_dir: str | Path | None) -> Iterator[Path]:
    if work_dir is None:
        work = partial / ".work"
        work.mkdir()
        yield work
        return
    try:
        work = Path(tempfile.mkdtemp(prefix="ov_afm-", dir=work_dir))
    except OSError as error:
        raise ConfigError(f"cannot write to the work folder {work_dir} ({error.strerror})") from error
    try:
        with disk_full_as_error(work):
            yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _build(
    source: Source,
    settings: Recipe,
    partial: Path,
    work: Path,
    progress: console.Progress,
    log: Path,
    verify: bool,
    trust_remote_code: bool,
) -> manifest.Manifest:
    arguments = {
        "checkpoint": str(source.path),
        "bundle": str(partial),
        "work": str(work),
        "recipe": settings.to_dict(),
        "proof_bytes": max(0, int(resources.free_memory() - BASE_BYTES)),
        "prove": verify,
        "trust_remote_code": trust_remote_code,
        "adapters": [(str(adapter.path.absolute()), adapter.weight) for adapter in source.adapters],
    }
    with in_background(source.describe) as description:
        with StepBars(progress, STEPS) as show:
            built = child_process.run(
                "ov_afm.conversion.convert:build", arguments, log=log, on_event=show, died=ExportError
            )
        _write_generation_config(partial, source)
        for path in source.license_files:
            shutil.copyfile(path, partial / path.name)
        with progress.step("hashing the source"):
            origin = description()
    return manifest.Manifest(
        source=origin,
        geometry=manifest.geometry_of(source.config),
        recipe={**settings.recorded(), **built["recipe"]},
        versions=manifest.installed_versions(),
        checks=built["checks"] if verify else {"skipped": "asked for with --no-verify"},
    )


def _write_generation_config(folder: Path, source: Source) -> None:
    """Add the recommended sampling of the architecture, where the source does not say its own."""
    path = folder / "generation_config.json"
    fields = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    sampling = SAMPLING.get(source.config.get("model_type", ""))
    if sampling is not None:
        recommended = {"do_sample": True, **{name: getattr(sampling, name) for name in sampling.__slots__}}
        fields = {**recommended, **{key: value for key, value in fields.items() if value is not None}}
    path.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


def _notes(result: manifest.Manifest) -> list[str]:
    notes = list(result.recipe.get("notes", []))
    if result.source.get("synthetic"):
        notes.append("the weights are random (synthetic checkpoint): speed is real, words are not")
    return notes


@command
def main(argv: Sequence[str] | None = None) -> int:
    """`ov-afm export`."""
    parser = command_parser("export", "Export a model to a verified OpenVINO model directory.")
    parser.add_argument("model", nargs="?", default=DEFAULT_MODEL, help="Hub id, folder, .gguf file or embedded name")
    parser.add_argument("--output", "-o", metavar="DIR", help="new model directory (default: ./NAME-RECIPE)")
    parser.add_argument("--revision", help="commit, tag or branch of a Hub repository")
    add_recipe_arguments(parser)
    parser.add_argument("--no-verify", action="store_true", help="leave out the comparison with the source")
    parser.add_argument(
        "--golden",
        action=argparse.BooleanOptionalAction,
        help="record answers for the self-test of other devices (default: up to 1 B parameters, or with --device)",
    )
    parser.add_argument(
        "--kernels",
        choices=list(KERNELS),
        default="auto",
        help="pack the model for the native CPU kernels too (auto: a ReLU² model, for the CPU, where zeros pay)",
    )
    parser.add_argument("--force", action="store_true", help="replace a directory that is not empty")
    parser.add_argument("--work-dir", metavar="DIR", help="folder for the uncompressed IR (default: beside the output)")
    parser.add_argument("--allow-pickle", action="store_true", help="accept pickled weights (they can run code)")
    parser.add_argument("--trust-remote-code", action="store_true", help="run Python code of the checkpoint")
    parser.add_argument(
        "--merge-adapter",
        action="append",
        default=[],
        metavar="FILE[:WEIGHT]",
        help="LoRA adapter in PEFT's form to merge before the export; may be given again",
    )
    parser.add_argument("--ovms", metavar="DIR", help="add the model to this repository of OpenVINO Model Server too")
    parser.add_argument("--json", action="store_true", help="print the manifest")
    args = parser.parse_args(argv)
    if args.ovms is not None:
        # Before the long work.
        ovms.read_config(Path(args.ovms))
    result = export(
        args.model,
        args.output,
        recipe=recipe_from_arguments(args),
        revision=args.revision,
        device=args.device,
        verify=not args.no_verify,
        golden=args.golden,
        kernels=KERNELS[args.kernels],
        force=args.force,
        work_dir=args.work_dir,
        allow_pickle=args.allow_pickle,
        trust_remote_code=args.trust_remote_code,
        adapters=args.merge_adapter,
    )
    if result.log is None:
        console.note(f"{result.path} is this export already; nothing was done (replace it with --force)")
    if args.ovms is not None:
        served = ovms.add(result.path, Path(args.ovms), device=args.device or "CPU", replace=args.force)
        console.note(f"OpenVINO Model Server: ovms --config_path {served.parent / ovms.CONFIG} --rest_port 8000")
    bundle.report(result, as_json=args.json)
    return 0


if __name__ == "__main__":
    from .export import main as run

    sys.exit(run())
