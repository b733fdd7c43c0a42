"""From an IR to a compressed IR: what the recipe asks NNCF for, and what NNCF did.

Where NNCF would skip an algorithm or change a layer's format in silence, this module notes it: the manifest has both
what was requested and what was done.
"""

from __future__ import annotations

import logging
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from logging.handlers import BufferingHandler
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CompressionError
from ..model_dir.hf_tokenizer import load_hf_tokenizer
from ..model_dir.inference import decoder_inputs, input_names
from ..model_dir.manifest import MODEL_XML
from ..presets import TABLES, Recipe
from ..system.child_process import Progress, emit
from . import calibration

if TYPE_CHECKING:
    from .decoder_weights import Decoder, Matrix

__all__ = ["compress_ir", "describe_weights"]

# Less than the share of one matrix.
NO_RATIO = 1e-9
AWQ_NO_PATTERN = "No matching patterns were found for applying AWQ"


def compress_ir(ir: Path, out: Path, recipe: Recipe, folder: Path) -> dict[str, Any]:
    """Compress the weights of an IR.

    Args:
        ir: Path of an uncompressed `openvino_model.xml`.
        out: Folder for the compressed one.
        recipe: What to do.
        folder: Folder with the tokenizer and the `config.json`, for calibration.

    Returns:
        `layers`: weight matrices by format; `notes` for the user; `calibration` data if any was used.

    Raises:
        CompressionError: The weights are compressed already, the model lacks a kind of matrices that the recipe names,
            or NNCF refuses the recipe for this model.
    """
    import openvino

    from .decoder_weights import Decoder, find_matrices

    model = openvino.Core().read_model(ir)
    _check_uncompressed(model)
    matrices = find_matrices(model) if recipe.kinds else []
    _check_kinds(recipe, matrices)
    notes: list[str] = []
    summary: dict[str, Any] = {}
    ids: list[list[int]] = []
    if recipe.needs_data and recipe.dataset is not None:
        tokenizer = load_hf_tokenizer(folder)
        ids, summary["calibration"] = calibration.prepare(recipe.dataset, tokenizer, recipe.num_samples, ir=ir)
    fitted = recipe.rounding == "fitted"
    decoder = Decoder.of(model, folder) if fitted or recipe.equalise != "none" else None
    if decoder and recipe.equalise != "none":
        summary["equalisation"] = _equalise(recipe, decoder, ids, notes)
        # Fitted codes replace those of NNCF, so it need not see rescaled matrices, which would all be in memory.
        for layer in decoder.layers:
            layer.write(matrices=not fitted)
    if recipe.bits > 8:
        openvino.save_model(model, out / MODEL_XML, compress_to_fp16=recipe.bits == 16)
        return {"notes": notes, **summary}
    model = _run_nncf(recipe, model, ids, matrices, notes)
    if decoder and fitted:
        from .reconstruction import fit

        summary["fitted_matrices"] = fit(decoder, model, ids)
    _drop_cache_precision(model)
    formats = _weight_formats(model)
    notes += _fallback_notes(recipe, formats)
    openvino.save_model(model, out / MODEL_XML, compress_to_fp16=False)
    return {"layers": formats, "notes": notes, **summary}


def describe_weights(folder: Path) -> dict[str, Any]:
    """The manifest's `layers` of a model directory that another program made."""
    import openvino

    return {"layers": _weight_formats(openvino.Core().read_model(folder / MODEL_XML))}


def _check_uncompressed(model: Any) -> None:
    formats = _weight_formats(model)
    if any(name.startswith(("int", "uint", "nf4")) for name in formats):
        raise CompressionError(
            f"the weights are compressed already ({', '.join(formats)}); start from an fp16 or fp32 export",
            code="compressed-already",
        )


def _check_kinds(recipe: Recipe, matrices: Sequence[Matrix]) -> None:
    """Refuse kinds that the model lacks, or that are one matrix with another format.

    Raises:
        CompressionError: Names them.
    """
    formats = dict(recipe.kinds)
    present = {matrix.kind for matrix in matrices}
    lacking = [kind for kind in formats if kind not in present]
    if lacking:
        raise CompressionError(
            f"the model has no matrices of kind {', '.join(lacking)}; it has {', '.join(sorted(present)) or 'none'}",
            code="kind-missing",
        )
    tied = len({matrix.key for matrix in matrices if matrix.kind in TABLES}) == 1
    embedding, head = (formats.get(kind) for kind in TABLES)
    if tied and embedding != head:
        given = ", ".join(f"{kind}={formats[kind]}" for kind in TABLES if kind in formats)
        both = embedding or head
        raise CompressionError(
            f"embedding and head are one matrix in this model, found {given}; "
            f"give both the same: --kind embedding={both},head={both}",
            code="tables-tied",
        )


def _equalise(recipe: Recipe, decoder: Decoder, ids: list[list[int]], notes: list[str]) -> dict[str, Any]:
    from .equalization import FP16_LIMIT, equalise
    from .quantizer import Quantizer

    rounding = recipe.equalise == "full" and recipe.bits <= 8
    quantizer = Quantizer(recipe.bits, recipe.sym, recipe.group_size) if rounding else None
    backup = Quantizer(8, recipe.backup_precision == "int8_sym")
    kinds = {kind: backup for kind, stored in recipe.kinds if stored == "int8"} if rounding else {}
    result = equalise(decoder, ids, quantizer, kinds=kinds)
    if result.peak_up > FP16_LIMIT:
        notes.append(
            f"up_proj reaches {result.peak_up:.0f}, whose square overflows fp16; {result.guarded} neurons were "
            "rescaled so that it does not"
        )
    return result.recorded()


def _run_nncf(recipe: Recipe, model: Any, ids: list[list[int]], matrices: Sequence[Matrix], notes: list[str]) -> Any:
    """The model with compressed weights.

    Raises:
        CompressionError: NNCF refuses the recipe for this model.
    """
    import nncf

    names = input_names(model)
    samples = [decoder_inputs(sample, names) for sample in ids]
    with _relay_progress(), _collect_warnings(recipe, notes):
        try:
            for options in _passes(recipe, samples, matrices):
                model = nncf.compress_weights(model, **options)
        except (nncf.InvalidGroupSizeError, nncf.ValidationError, nncf.ParameterNotSupportedError) as error:
            raise CompressionError(
                f"NNCF cannot apply recipe {recipe.name}: {' '.join(str(error).split())}", code="recipe-refused"
            ) from error
    return model


def _passes(recipe: Recipe, samples: list[dict[str, Any]], matrices: Sequence[Matrix]) -> Iterator[dict[str, Any]]:
    """The options of NNCF, one pass after the other: the recipe's rule, then the kinds with a format of their own.

    The rule comes first, because NNCF takes the last MatMul that is not compressed yet for the head. A pass leaves
    what is compressed already, and what it ignores, as it is.
    """
    import nncf

    formats = dict(recipe.kinds)

    def only(selected: Callable[[str], bool]) -> dict[str, Any]:
        ignored = [matrix.reader for matrix in matrices if not selected(matrix.kind)]
        return {"ignored_scope": nncf.IgnoredScope(names=ignored)}

    options = _nncf_options(recipe, samples)
    if not formats:
        yield options
        return
    if any(matrix.kind not in formats for matrix in matrices):
        yield options | only(lambda kind: kind not in formats)
    if "int4" in formats.values():
        # No pattern of AWQ has a table in it.
        awq = recipe.awq and any(stored == "int4" and kind not in TABLES for kind, stored in recipe.kinds)
        yield options | {"ratio": 1.0, "all_layers": True, "awq": awq} | only(lambda kind: formats.get(kind) == "int4")
    if "int8" in formats.values():
        mode = nncf.CompressWeightsMode[recipe.backup_precision.upper()]
        yield {"mode": mode} | only(lambda kind: formats.get(kind) == "int8")


def _nncf_options(recipe: Recipe, samples: list[dict[str, Any]]) -> dict[str, Any]:
    import nncf

    suffix = "SYM" if recipe.sym else "ASYM"
    options: dict[str, Any] = {"mode": nncf.CompressWeightsMode[f"INT{recipe.bits}_{suffix}"]}
    if recipe.bits == 8:
        return options
    fallback = nncf.GroupSizeFallbackMode[recipe.group_size_fallback.upper()]
    options |= {
        "group_size": recipe.group_size,
        # NNCF takes 0 for "not given", that is 1.
        "ratio": recipe.ratio or NO_RATIO,
        "all_layers": recipe.all_layers,
        "backup_mode": nncf.BackupMode[recipe.backup_precision.upper()],
        "awq": recipe.awq,
        "scale_estimation": recipe.scale_estimation,
        "gptq": recipe.gptq,
        "advanced_parameters": nncf.AdvancedCompressionParameters(group_size_fallback_mode=fallback),
    }
    if recipe.awq or recipe.scale_estimation or recipe.gptq:
        options |= {"dataset": nncf.Dataset(samples), "subset_size": len(samples)}
    return options


def _drop_cache_precision(model: Any) -> None:
    """Remove the f16 KV cache that Optimum sets for uncompressed models, as optimum-cli does too."""
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
    formats: Counter[str] = Counter()
    for name, node in constants.items():
        if not name.startswith("self.") or name.endswith(("/zero_point", "/scale")):
            continue
        kind, shape = node.get_element_type().get_type_name(), node.get_output_shape(0)
        if kind in ("i4", "u4", "i8", "u8"):
            symmetry = "asym" if f"{name}/zero_point" in constants else "sym"
            group = f"g{shape[-1]}" if len(shape) == 3 else "per row"
            formats[f"int{kind[1:]}_{symmetry} {group}"] += 1
        else:
            formats[kind] += 1
    return dict(formats)


def _fallback_notes(recipe: Recipe, formats: dict[str, int]) -> list[str]:
    if recipe.bits != 4 or recipe.group_size < 0:
        return []
    expected = f"g{recipe.group_size}"
    other = {name: count for name, count in formats.items() if name.startswith("int4") and not name.endswith(expected)}
    # Without a backup precision, embedding and head stay as they are too.
    untouched = sum(map(recipe.in_backup, TABLES)) if recipe.backup_precision == "none" else 0
    floats = {name: count for name, count in formats.items() if not name.startswith("int")}
    if sum(floats.values()) > untouched:
        other |= floats
    if not other and any(name.startswith("int4") for name in formats):
        return []
    counts = ", ".join(f"{count} of {name}" for name, count in (other or formats).items())
    return [f"group size {recipe.group_size} does not divide every layer's input dimension: {counts}"]


@contextmanager
def _relay_progress() -> Iterator[None]:
    """Send the progress of NNCF to the parent process.

    NNCF has no callback, so rich's progress bars, which it draws, are patched while it runs. All three ways in which a
    bar moves count: a loop of less than 0.1 s only reports its beginning and its end. No upstream issue is known; this
    ends when `nncf.compress_weights` takes a progress callback.
    """
    from rich import progress

    originals = {name: getattr(progress.Progress, name) for name in ("add_task", "advance", "update")}

    def relayed(original: Callable[..., Any]) -> Callable[..., Any]:
        def run(self: progress.Progress, *args: Any, **kwargs: Any) -> Any:
            result = original(self, *args, **kwargs)
            # `add_task` returns the id that the others take first.
            task = self._tasks.get(args[0] if args and result is None else result)
            if task:
                emit(Progress(task.completed, task.total or 0, task.description))
            return result

        return run

    for name, original in originals.items():
        setattr(progress.Progress, name, relayed(original))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(progress.Progress, name, original)


@contextmanager
def _collect_warnings(recipe: Recipe, notes: list[str]) -> Iterator[None]:
    """Turn what NNCF only logs, an algorithm that did nothing, into notes for the user."""
    handler, logger = BufferingHandler(sys.maxsize), logging.getLogger("nncf")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
    if recipe.awq and any(AWQ_NO_PATTERN in record.getMessage() for record in handler.buffer):
        notes.append(
            "AWQ did nothing: NNCF knows no pattern that fits this model's MLP; the weights are plain "
            f"{recipe.weight_format}"
        )
