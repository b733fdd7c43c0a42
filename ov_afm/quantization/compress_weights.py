"""IR → compressed IR: what NNCF is told, and what it did.

Where NNCF would skip an algorithm or change a layer's format in silence, this module says so: what was asked and
what was done are both in the manifest. It runs in a child process; arguments and results are JSON values.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CompressionError
from ..presets import TABLES, Recipe
from ..system.child_process import Progress, emit
from . import calibration

if TYPE_CHECKING:
    from .decoder_weights import Layer, Matrix

__all__ = ["compress_ir", "describe_weights"]

# Less than the share of one matrix.
NO_RATIO = 1e-9
AWQ_NO_PATTERN = "No matching patterns were found for applying AWQ"


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
        CompressionError: The weights are compressed already, the model lacks a kind of matrices that the recipe names,
            or NNCF refuses the recipe for this model.
    """
    import nncf
    import openvino

    from .decoder_layer import embedding
    from .decoder_weights import find_layers, find_matrices

    model = openvino.Core().read_model(ir)
    present = _weight_formats(model)
    if any(name.startswith(("int", "uint", "nf4")) for name in present):
        raise CompressionError(
            f"the weights are compressed already ({', '.join(present)}); start from an fp16 or fp32 export"
        )
    matrices = find_matrices(model) if settings.kinds else []
    _check_kinds(settings, matrices)
    notes: list[str] = []
    done: dict[str, Any] = {}
    samples: list[dict[str, Any]] = []
    if settings.needs_data and settings.dataset is not None:
        samples, done["calibration"] = _samples(settings, settings.dataset, model, ir, tokenizer)
    fitted = settings.rounding == "fitted"
    layers = find_layers(model) if fitted or settings.equalise != "none" else []
    table = embedding(model) if layers else None
    ids = [sample["input_ids"][0].tolist() for sample in samples]
    if settings.equalise != "none":
        done["equalisation"] = _equalise(settings, layers, table, ids, tokenizer, notes)
    for layer in layers:
        # Fitted codes take the place of NNCF's, so that the rescaled matrices need never all be in memory.
        for weight in layer.norms() if fitted else (*layer.norms(), *layer.matrices()):
            weight.write()
    if settings.bits > 8:
        openvino.save_model(model, out / "openvino_model.xml", compress_to_fp16=settings.bits == 16)
        return {"notes": notes, **done}
    with _relay_progress(), _collect_warnings(settings, notes):
        try:
            for options in _passes(settings, samples, matrices):
                model = nncf.compress_weights(model, **options)
        except (nncf.InvalidGroupSizeError, nncf.ValidationError, nncf.ParameterNotSupportedError) as error:
            raise CompressionError(
                f"NNCF cannot apply recipe {settings.name}: {' '.join(str(error).split())}"
            ) from error
    if fitted:
        done["fitted_matrices"] = _fit(layers, table, model, ids, tokenizer)
    _drop_cache_precision(model)
    formats = _weight_formats(model)
    notes += _fallback_notes(settings, formats)
    openvino.save_model(model, out / "openvino_model.xml", compress_to_fp16=False)
    return {"layers": formats, "notes": notes, **done}


def _samples(
    settings: Recipe, dataset: str, model: Any, ir: Path, tokenizer: Path
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Calibration inputs for the model, and what the manifest says of them."""
    from transformers import AutoTokenizer

    ids, found = calibration.prepare(dataset, AutoTokenizer.from_pretrained(tokenizer), settings.num_samples, ir=ir)
    names = {name for port in model.inputs for name in port.get_names()}
    return [calibration.model_inputs(sample, names) for sample in ids], found


def _equalise(
    settings: Recipe, layers: Sequence[Layer], table: Any, ids: list[list[int]], folder: Path, notes: list[str]
) -> dict[str, Any]:
    from .equalization import FP16_LIMIT, equalise
    from .quantizer import Quantizer

    rounding = settings.equalise == "full" and settings.bits <= 8
    quantizer = Quantizer(settings.bits, settings.sym, settings.group_size) if rounding else None
    backup = Quantizer(8, settings.backup_precision == "int8_sym")
    kinds = {kind: backup for kind, stored in settings.kinds if stored == "int8"} if rounding else {}

    def show(done: int, total: int) -> None:
        emit(Progress(done, total, "equalising"))

    found = equalise(layers, table, ids, quantizer, folder, kinds=kinds, on_layer=show)
    if found.peak_up > FP16_LIMIT:
        notes.append(
            f"up_proj reaches {found.peak_up:.0f}, whose square overflows fp16; {found.guarded} neurons were rescaled "
            "so that it does not"
        )
    return found.recorded()


def _fit(layers: Sequence[Layer], table: Any, model: Any, ids: list[list[int]], folder: Path) -> int:
    from .reconstruction import fit

    def show(done: int, total: int) -> None:
        emit(Progress(done, total, "rounding"))

    return fit(layers, table, model, ids, folder, on_layer=show)


def _check_kinds(settings: Recipe, matrices: Sequence[Matrix]) -> None:
    """Refuse kinds that the model lacks, or that are one matrix with another format.

    Raises:
        CompressionError: Says which.
    """
    formats = dict(settings.kinds)
    present = {matrix.kind for matrix in matrices}
    lacking = [kind for kind in formats if kind not in present]
    if lacking:
        raise CompressionError(
            f"the model has no matrices of kind {', '.join(lacking)}; it has {', '.join(sorted(present)) or 'none'}"
        )
    tied = len({matrix.key for matrix in matrices if matrix.kind in TABLES}) == 1
    given = [formats.get(kind) for kind in TABLES]
    if tied and given[0] != given[1]:
        found = ", ".join(f"{kind}={formats[kind]}" for kind in TABLES if kind in formats)
        both = given[0] or given[1]
        raise CompressionError(
            f"embedding and head are one matrix in this model, found {found}; "
            f"give both the same: --kind embedding={both},head={both}"
        )


def _passes(settings: Recipe, samples: list[dict[str, Any]], matrices: Sequence[Matrix]) -> Iterator[dict[str, Any]]:
    """What NNCF is told, one pass after the other: the recipe's rule, then the kinds with a format of their own.

    The rule comes first: NNCF takes the last MatMul that is not compressed yet for the head. What a pass leaves out or
    finds compressed stays as it is.
    """
    import nncf

    formats = dict(settings.kinds)

    def only(wanted: Callable[[str], bool]) -> dict[str, Any]:
        left_out = [matrix.reader for matrix in matrices if not wanted(matrix.kind)]
        return {"ignored_scope": nncf.IgnoredScope(names=left_out)}

    options = _nncf_options(settings, samples)
    if not formats:
        yield options
        return
    if any(matrix.kind not in formats for matrix in matrices):
        yield options | only(lambda kind: kind not in formats)
    if "int4" in formats.values():
        # No pattern of AWQ has a table in it.
        awq = settings.awq and any(stored == "int4" and kind not in TABLES for kind, stored in settings.kinds)
        yield options | {"ratio": 1.0, "all_layers": True, "awq": awq} | only(lambda kind: formats.get(kind) == "int4")
    if "int8" in formats.values():
        mode = nncf.CompressWeightsMode[settings.backup_precision.upper()]
        yield {"mode": mode} | only(lambda kind: formats.get(kind) == "int8")


def _nncf_options(settings: Recipe, samples: list[dict[str, Any]]) -> dict[str, Any]:
    import nncf

    suffix = "SYM" if settings.sym else "ASYM"
    options: dict[str, Any] = {"mode": nncf.CompressWeightsMode[f"INT{settings.bits}_{suffix}"]}
    if settings.bits == 8:
        return options
    fallback = nncf.GroupSizeFallbackMode[settings.group_size_fallback.upper()]
    options |= {
        "group_size": settings.group_size,
        # NNCF takes 0 for "not given", that is 1.
        "ratio": settings.ratio or NO_RATIO,
        "all_layers": settings.all_layers,
        "backup_mode": nncf.BackupMode[settings.backup_precision.upper()],
        "awq": settings.awq,
        "scale_estimation": settings.scale_estimation,
        "gptq": settings.gptq,
        "advanced_parameters": nncf.AdvancedCompressionParameters(group_size_fallback_mode=fallback),
    }
    if settings.awq or settings.scale_estimation or settings.gptq:
        options |= {"dataset": nncf.Dataset(samples), "subset_size": len(samples)}
    return options


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
    left = sum(map(settings.in_backup, TABLES)) if settings.backup_precision == "none" else 0
    floats = {name: count for name, count in formats.items() if not name.startswith("int")}
    if sum(floats.values()) > left:
        other |= floats
    if not other and any(name.startswith("int4") for name in formats):
        return []
    found = ", ".join(f"{count} of {name}" for name, count in (other or formats).items())
    return [f"group size {settings.group_size} does not divide every layer's input dimension: {found}"]


@contextmanager
def _relay_progress() -> Iterator[None]:
    """Send the progress of NNCF to the parent process.

    NNCF has no callback, so rich's progress bars, which it draws, are patched while it runs. All three ways in which a
    bar moves count: a loop of less than 0.1 s only reports its beginning and its end.
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
def _collect_warnings(settings: Recipe, notes: list[str]) -> Iterator[None]:
    """Turn what NNCF only logs, an algorithm that did nothing, into notes for the user."""

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            note = (
                "AWQ did nothing: NNCF knows no pattern that fits this model's MLP; the weights are plain "
                f"{settings.weight_format}"
            )
            if settings.awq and AWQ_NO_PATTERN in record.getMessage() and note not in notes:
                notes.append(note)

    handler, logger = Collector(), logging.getLogger("nncf")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
