"""A checkpoint becomes a verified model directory.

The steps: resolve the source, refuse what does not fit on this machine, convert with Optimum-Intel at the checkpoint's
own precision, prove the IR equal to its source, compress with NNCF, prove tokenizer and template, write the manifest,
and only then give the directory its name.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from .conversion import convert, generation_config, text_encoders
from .conversion.export_key import differences
from .conversion.pack_kernels import pack, pack_if_it_pays
from .conversion.sources import Source, resolve
from .conversion.verify import prebuilt_checks
from .errors import ConfigError, ExportError, ExtensionError, OVAFMError, SourceError
from .kernels import extension
from .model_dir import manifest, outputs
from .model_dir.manifest import PACKED_FOLDER, Manifest
from .model_dir.model_directory import ModelDirectory, ModelResult, finish
from .model_dir.text_encoder import TEXT_GENERATION
from .presets import DEFAULT_MODEL, Recipe
from .quantization import calibration
from .quantization.compress_weights import describe_weights
from .quantization.recipes import resolve_recipe
from .runtime import self_test
from .runtime.lora import Adapter, another_base, read_all, unused_files
from .system import console, resources
from .system.atomic import disk_full_as_error
from .system.child_process import ChildProcess
from .system.interrupt import in_background

__all__ = ["export"]

# Memory that Python, torch, Optimum and NNCF take before the first weight is read.
BASE_BYTES = 2e9
# Above it, recording answers to a prompt of 2,112 tokens at f32 would take longer than the export.
GOLDEN_PARAMETERS = 1e9
NOT_VERIFIED = {"skipped": "asked for with --no-verify"}


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
    task: str = TEXT_GENERATION,
    progress: console.Progress | None = None,
) -> ModelResult:
    """Export a model to a verified OpenVINO model directory.

    Args:
        model: Hub id, checkpoint folder, `.gguf` file, embedded name or OpenVINO model; see `sources`.
        output: New model directory; default `NAME-RECIPE` in the current folder.
        recipe: Name of a recipe or a `Recipe`; default int8.
        revision: Commit, tag or branch of a Hub repository.
        device: Device that must be able to run the result; refused before any work if it cannot.
        verify: Compare tokenizer, template, weights and logits with the source.
        golden: Record how the model answers on CPU at f32, for the self-test of other devices. None
            records them up to 1 B parameters, and for any size when `device` is a GPU or an NPU; otherwise that
            self-test records them when it first needs them.
        kernels: Pack a ReLU² model for the native CPU kernels too, beside the plain model. None does so for a quantized
            model that is for the CPU, if the kernels are installed and its share of zeros is large enough.
        force: Replace an older model directory; other folders never.
        work_dir: Folder for the uncompressed IR (about the checkpoint's size); default beside `output`.
        allow_pickle: Accept weights that exist only as pickles.
        trust_remote_code: Run Python code that comes with the checkpoint.
        adapters: LoRA adapters in PEFT's form (files, folders, or either with `:WEIGHT`) to merge before the export.
        task: What the model is for: `text-generation`, `feature-extraction` (embeddings) or `text-classification`
            (a reranker); see `conversion.text_encoders`.
        progress: Where to draw progress.

    Returns:
        The model directory; an existing one if it is this very export, untouched but for reference answers and packed
        weights that it lacks.

    Raises:
        OVAFMError: The source, the machine or the options do not allow it, or `output` holds another export; nothing is
            left behind.
        ExtensionError: The ReLU² kernels were asked for and cannot be used; what was exported by then stays.
    """
    resources.require("export", "torch", "transformers", "optimum.intel", "nncf")
    selected = resolve_recipe(recipe if recipe is not None else "int8", device)
    to_merge = read_all(adapters)
    inputs = [model, *(adapter.path for adapter in to_merge), *calibration.files(selected.dataset)]
    if work_dir is not None:
        inputs.append(work_dir)
    if output is not None:
        # Before anything is downloaded or converted.
        outputs.check(output, force=force, inputs=inputs)
    with progress if progress is not None else console.Progress() as bars:
        source = resolve(
            model,
            revision,
            allow_pickle=allow_pickle,
            trust_remote_code=trust_remote_code,
            task=task,
            progress=bars,
        )
        source = replace(source, adapters=to_merge)
        _check_options(source, recipe, task)
        writes = task == TEXT_GENERATION
        if not writes:
            text_encoders.check_recipe(selected, task)
            text_encoders.read(source.path, task, source.config, source.id)
        _check_kernels(kernels, source, selected)
        target = Path(output) if output is not None else _default_output(source, selected)
        with_golden = writes and verify and (_golden_by_default(source, device) if golden is None else golden)
        if not force and (existing := _existing(target, source, selected, verify, bars)):
            return _complete(existing, golden=with_golden, kernels=kernels is True, bars=bars)
        log = resources.log_file(f"export-{target.name}")
        inputs.append(source.path)
        with outputs.new_folder(target, force=force, inputs=inputs) as partial, disk_full_as_error(target.parent):
            if source.prebuilt:
                contents = _adopt(source, partial, verify, bars, log)
            else:
                with _work_folder(partial, work_dir) as work:
                    _check_fit(source, selected, partial, work)
                    job = convert.Job(
                        checkpoint=source.path,
                        output=partial,
                        work=work,
                        recipe=selected,
                        proof_bytes=max(0, int(resources.free_memory() - BASE_BYTES)),
                        prove=verify,
                        trust_remote_code=trust_remote_code,
                        adapters=to_merge,
                        task=task,
                    )
                    contents = _convert(source, job, bars, log)
            if with_golden:
                with bars.step("recording reference answers"):
                    contents.checks["golden"] = ChildProcess(log=log).run(self_test.make_golden, partial)
            finish(partial, contents, bars)
            notes = [*_notes(contents), *(note for each in to_merge for note in _adapter_notes(each, source))]
            not_packed: OVAFMError | None = None
            if kernels is None and writes:
                contents, note = pack_if_it_pays(partial, contents, device, bars, log)
                notes += [note] if note else []
            elif kernels:
                contents, not_packed = _pack(partial, contents, bars)
    if not_packed is not None:
        raise ExtensionError(
            f"{target} is exported and whole, but not packed for the ReLU² kernels: {not_packed}", code=not_packed.code
        ) from not_packed
    return ModelResult(target, contents, log, notes)


def _check_options(source: Source, recipe: str | Recipe | None, task: str) -> None:
    """Refuse what cannot be done to an OpenVINO model, or to one that writes no text."""
    finished = manifest.read(source.path) if source.prebuilt else None
    if source.prebuilt and (task != TEXT_GENERATION or (finished and finished.text_encoder)):
        raise ConfigError(
            f"{source.id} is an OpenVINO model already; copy the folder as it is, or export its checkpoint",
            code="prebuilt-encoder",
        )
    if task != TEXT_GENERATION and source.adapters:
        raise ConfigError(f"adapters are merged into models that write text, not for {task}", code="encoder-adapter")
    if source.prebuilt and source.adapters:
        raise ConfigError(
            f"{source.id} is an OpenVINO model already, nothing can be merged into it; export its checkpoint",
            code="prebuilt-with-adapter",
        )
    if source.prebuilt and recipe is not None:
        raise ConfigError(
            f"{source.id} is an OpenVINO model already and is taken as it is; leave the recipe out",
            code="prebuilt-with-recipe",
        )


def _check_kernels(kernels: bool | None, source: Source, recipe: Recipe) -> None:
    """Refuse to pack what the ReLU² kernels cannot run, where that is asked for, before hours of work.

    Raises:
        ConfigError: The model or the recipe is none for them.
        ExtensionError: They are not installed.
    """
    if not kernels:
        return
    activation = source.geometry.activation
    if activation != "relu2":
        raise ConfigError(
            f"the ReLU² kernels are for models with that activation, and {source.id} has {activation}; "
            "leave --kernels out",
            code="kernels-not-relu2",
        )
    if not source.prebuilt and recipe.bits > 8:
        raise ConfigError(
            f"the ReLU² kernels need int8 or int4 weights, and recipe {recipe.name} keeps {recipe.weight_format}; "
            "choose another recipe, or leave --kernels out",
            code="kernels-need-quantized",
        )
    extension.load()


def _pack(folder: Path, contents: Manifest, bars: console.Progress) -> tuple[Manifest, OVAFMError | None]:
    """The manifest with a packed model, or as it was with the reason: the export is whole without it."""
    try:
        return pack(folder, bars), None
    except OVAFMError as error:
        return contents, error


def _default_output(source: Source, recipe: Recipe) -> Path:
    name = source.id.rpartition("/")[2]
    if name.lower().endswith(".gguf"):
        name = name[: -len(".gguf")]
    return Path(name if source.prebuilt else f"{name}-{recipe.name}")


def _golden_by_default(source: Source, device: str | None) -> bool:
    return source.parameters <= GOLDEN_PARAMETERS or (device or "CPU").upper().startswith(("GPU", "NPU"))


def _notes(contents: Manifest) -> list[str]:
    notes = [*contents.recipe.get("notes", []), *contents.generation.get("notes", [])]
    if elsewhere := contents.checks.get("chat_template", {}).get("genai_differs"):
        notes.append(
            f"OpenVINO GenAI's own template engine does not render {', '.join(elsewhere)} as the source does "
            f"({next(iter(elsewhere.values()))}); ov-afm does, programs that leave it to GenAI do not"
        )
    if contents.checks.get("tokenizer", {}).get("reads_spelled_bytes"):
        notes.append("OpenVINO's tokenizer takes text that spells the token of a byte, such as <0x0A>, for that byte")
    if contents.source.get("synthetic"):
        notes.append("the weights are random (synthetic checkpoint): speed is real, words are not")
    return notes


def _adapter_notes(adapter: Adapter, source: Source) -> list[str]:
    base = another_base(adapter, source.id)
    return [*([base] if base else []), *unused_files(adapter, source.path)]


# -- An export that exists already


def _existing(target: Path, source: Source, recipe: Recipe, verify: bool, bars: console.Progress) -> ModelResult | None:
    """The existing export, if it is the requested one; None if there is none.

    Raises:
        ConfigError: The directory holds another export (the message says how it differs), or is damaged.
    """
    if not (target / manifest.FILE_NAME).exists():
        return None
    try:
        existing = ModelDirectory.open(target, any_task=True).manifest
    except SourceError as error:
        reason = str(error).rpartition(";")[0]
        raise ConfigError(
            f"{target} holds a model that cannot be used ({reason}); replace it with --force", code="output-damaged"
        ) from error
    assert existing is not None
    size = sum(path.stat().st_size for path in source.weights)
    with bars.step("comparing with the existing export", total=size, unit="B") as advance:
        described = source.describe(advance)
    changed = differences(existing, described, None if source.prebuilt else recipe)
    if changed:
        more = f" (and {len(changed) - 1} more differences)" if len(changed) > 1 else ""
        raise ConfigError(
            f"{target} holds another model ({existing.source.get('id')}, recipe {existing.recipe.get('name')}): "
            f"{changed[0]}{more}; choose another output directory, or replace it with --force",
            code="output-is-another-export",
        )
    if verify and "skipped" in existing.checks:
        raise ConfigError(
            f"{target} holds this export, but not verified; verify a new one with --force, or go on with --no-verify",
            code="output-not-verified",
        )
    return ModelResult(target, existing)


def _complete(existing: ModelResult, *, golden: bool, kernels: bool, bars: console.Progress) -> ModelResult:
    """Add what an existing export may lack without being another one: reference answers, packed weights."""
    contents, notes = existing.manifest, []
    log = resources.log_file(f"export-{existing.path.name}")
    if golden and "golden" not in contents.checks:
        with bars.step("recording reference answers"):
            contents.checks["golden"] = ChildProcess(log=log).run(self_test.make_golden, existing.path)
        manifest.write(existing.path, contents)
        notes.append("reference answers were added to the existing export")
    if kernels and not (existing.path / PACKED_FOLDER / manifest.MODEL_XML).exists():
        contents = pack(existing.path, bars)
        notes.append(f"the model for the ReLU² kernels was added to the existing export, in {PACKED_FOLDER}/")
    return ModelResult(existing.path, contents, log, notes) if notes else existing


# -- What has to fit on this machine


def _check_fit(source: Source, recipe: Recipe, partial: Path, work: Path) -> None:
    """Refuse, with figures and before any work, what disk or memory cannot hold.

    Raises:
        OVAFMError: It does not fit.
    """
    geometry = source.geometry
    tables = geometry.table_parameters(tied=source.tied)
    compressed = recipe.bits <= 8
    asked = {"fp32": 4, "fp16": 2}.get(recipe.weight_format)
    uncompressed = asked * source.parameters if asked else source.stored_bytes()
    final: float = uncompressed
    if compressed:
        scales = 2.0 / recipe.group_size if recipe.group_size > 0 else 0.0
        final = tables * 1.01 + geometry.layer_parameters * (recipe.bits / 8 + scales)
    if work.parent == partial and compressed:
        resources.check_disk(partial, {"the uncompressed IR": uncompressed, "the model": final})
    else:
        resources.check_disk(work, {"the uncompressed IR": uncompressed})
        resources.check_disk(partial, {"the model": final})
    # Weights are mapped from their file and can be dropped from memory; converted ones are made in memory.
    largest = 4.0 * geometry.hidden * max(geometry.vocab, geometry.intermediate)
    resources.check_memory(BASE_BYTES + 2 * largest + final, "this export")


@contextmanager
def _work_folder(partial: Path, work_dir: str | Path | None) -> Iterator[Path]:
    """A folder for the uncompressed IR, deleted at the end."""
    place, prefix = (partial, ".work-") if work_dir is None else (work_dir, "ov_afm-")
    try:
        folder = TemporaryDirectory(prefix=prefix, dir=place, ignore_cleanup_errors=True)
    except OSError as error:
        raise ConfigError(
            f"cannot write to the work folder {place} ({error.strerror})", code="work-folder-unwritable"
        ) from error
    with folder, disk_full_as_error(Path(folder.name)):
        yield Path(folder.name)


# -- The two ways to fill a model directory


def _convert(source: Source, job: convert.Job, bars: console.Progress, log: Path) -> Manifest:
    """Convert a checkpoint, while the source is hashed."""
    with in_background(source.describe) as description:
        with console.step_bars(bars, convert.STEPS, in_bytes=("converting",)) as on_event:
            build = convert.build if job.task == TEXT_GENERATION else text_encoders.build
            built = ChildProcess(log=log, on_event=on_event, died=ExportError).run(build, job)
        for path in source.license_files:
            shutil.copyfile(path, job.output / path.name)
        with bars.step("hashing the source"):
            origin = description()
    return Manifest(
        source=origin,
        geometry=source.geometry,
        recipe={**job.recipe.recorded(), **built.compression},
        versions=manifest.installed_versions(),
        checks=built.checks if job.prove else dict(NOT_VERIFIED),
        generation=built.generation,
        text_encoder=built.text_encoder,
    )


def _adopt(source: Source, partial: Path, verify: bool, bars: console.Progress, log: Path) -> Manifest:
    """Take an OpenVINO model as it is: copy it, check its tokenizer, describe it.

    Raises:
        OVAFMError: It is not whole, not what its manifest records, or its tokenizer cannot be used.
    """
    files = manifest.files_of(source.path)
    if (source.path / manifest.FILE_NAME).exists():
        # Or its manifest would be replaced by one that calls the damage correct.
        size = sum(path.stat().st_size for path in files)
        with bars.step("comparing with its manifest", total=size, unit="B") as advance:
            manifest.verify(source.path, hashes=True, packed=False, on_bytes=advance)
    resources.check_disk(partial, {"the model": sum(path.stat().st_size for path in files)})
    with bars.step("copying", total=len(files)) as advance:
        for path in files:
            copy = partial / path.relative_to(source.path)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
            advance(1)
    missing = [name for name in manifest.REQUIRED if not (partial / name).exists()]
    if missing:
        raise OVAFMError(
            f"{source.id} is not a whole OpenVINO model: {', '.join(missing)} missing; export its source instead",
            code="prebuilt-incomplete",
        )
    checks: dict[str, Any] = dict(NOT_VERIFIED)
    if verify:
        with bars.step("verifying the result"):
            child = ChildProcess(log=log, died=ExportError)
            checks = child.run(prebuilt_checks, partial)
        checks["export_parity"] = {"skipped": "made elsewhere; the checkpoint is not at hand"}
        checks["compression"] = {"skipped": "the uncompressed model is not at hand"}
    return Manifest(
        source=source.describe(),
        geometry=source.geometry,
        recipe={"name": "prebuilt", **ChildProcess(log=log).run(describe_weights, partial)},
        versions=manifest.installed_versions(),
        checks=checks,
        generation=ChildProcess(log=log, died=ExportError).run(generation_config.describe, partial),
    )


if __name__ == "__main__":
    from .cli import main

    sys.exit(main(["export", *sys.argv[1:]]))
