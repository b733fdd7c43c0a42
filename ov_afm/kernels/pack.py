"""Rewrite a model's ReLU² MLPs into one operation each, and its projections too, for the native kernels.

What was quantized stays quantized the same way: after saving, every code, scale and zero point is read back and
compared with the plain model's. The rewritten model lies in `relu2/` inside the model directory and is a model
directory itself; the plain model stays where it was, for GPU, NPU, OpenVINO Model Server and machines without the
library.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ConfigError, ExtensionError
from ..model_dir import manifest
from ..model_dir.manifest import MODEL_BIN, MODEL_XML
from ..model_dir.model_directory import PACKED_FOLDER, ModelDirectory
from ..model_dir.outputs import check_packed
from ..system.atomic import staging
from . import extension, layout
from .graph import Mlp, find_head, find_mlps, find_projections, name_of, read_mlps, read_model, read_weights
from .ir_alignment import align_constants
from .layout import Quantized, Unsupported
from .profile import limits
from .select import NOTES

__all__ = ["BITS", "Result", "remove", "transform", "verify"]

OPERATION = "ReLU2FFN"
LINEAR = "PackedLinear"
HEAD = "PackedHead"
# Between the names of the projections that became one operation.
SEPARATOR = ";"
# Width of quantized activations, as `activations` of `transform` names it.
BITS = {"auto": 0, "int8": 8, "int16": 16}

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Result:
    """What `transform` did.

    Attributes:
        path: Folder of the rewritten model.
        replaced: Names of the MLPs that became one operation.
        projections: How many other matrices are packed.
        active: Share of neurons that `drop_energy` leaves active on its text; None without it.
        refused: Name of an MLP that did not → why.
    """

    path: Path
    replaced: list[str]
    refused: dict[str, str]
    projections: int = 0
    active: float | None = None


def transform(
    model_dir: Path,
    *,
    activations: str = "auto",
    threshold: float = 0.0,
    drop_energy: float = 0.0,
    text: Path | None = None,
    projections: bool = True,
    on_layer: Callable[[int], Any] | None = None,
) -> Result:
    """Write the model for the kernels into `MODEL_DIR/relu2`, verify it, and note it in the manifest.

    Args:
        model_dir: A model directory with int4 or int8 weights.
        activations: Width that activations are quantized to inside an MLP: `int8`, `int16`, or `auto`, which is int8
            in groups of 32 for 2 tokens and more on CPUs with VNNI (as stock OpenVINO does there) and int16 otherwise.
        threshold: Skip neurons whose activation is at or below it; 0 is exact.
        drop_energy: Give each layer a threshold of its own instead: the largest that gives up at most this share of
            its energy; see `profile.limits`.
        text: UTF-8 text that `drop_energy` is measured on.
        projections: Pack the projections of attention and the head too.
        on_layer: Called with 1 after each MLP.

    Raises:
        ExtensionError: There is no native library, no MLP could be replaced, or verification failed.
        ConfigError: An option is out of range.
        SourceError: `model_dir` is no whole model directory.
    """
    _check_options(activations, threshold, drop_energy, text)
    directory = ModelDirectory.open(model_dir, packed=False)
    check_packed(model_dir)
    library = extension.load()
    model, mlps, refused = read_mlps(model_dir, "the kernels cannot help it")
    limited = limits(model_dir, drop_energy, text) if text and drop_energy else []
    thresholds = [each.threshold for each in limited] or [threshold] * len(mlps)
    create = _factory(library, activation_bits=BITS[activations])
    packed = _pack_projections(model, mlps, create) if projections else 0
    replaced = []
    for mlp, limit in zip(mlps, thresholds, strict=True):
        try:
            _replace(mlp, read_weights(mlp.up), read_weights(mlp.down), create, limit)
            replaced.append(mlp.name)
        except Unsupported as error:
            refused[mlp.name] = str(error)
        if on_layer:
            on_layer(1)
    if not replaced:
        raise ExtensionError(
            f"no MLP of {model_dir} can use the kernels: {next(iter(refused.values()))}", code="kernels-unsupported"
        )
    model.set_rt_info(str(extension.INTERFACE), [NOTES, "layout"])
    if weights_sha256 := _weights_sha256(directory.manifest):
        model.set_rt_info(weights_sha256, [NOTES, "weights"])
    with staging(directory.packed, replace=True, check=lambda _: check_packed(model_dir)) as work:
        _save(model, model_dir, work)
        del model
        verify(model_dir, work, library)
        # Killed between here and the end, the manifest lists no files that are not there.
        _forget(directory)
    active = round(sum(each.active for each in limited) / len(limited), 4) if limited else None
    result = Result(directory.packed, replaced, refused, packed, active)
    if directory.manifest is not None:
        options = {"activations": activations, "threshold": threshold, "drop_energy": drop_energy}
        _note(model_dir, directory.manifest, result, options)
    return result


def _check_options(activations: str, threshold: float, drop_energy: float, text: Path | None) -> None:
    if activations not in BITS:
        raise ConfigError(f"activations {activations!r} are unknown; choose one of {', '.join(BITS)}")
    if not 0.0 <= threshold < float("inf"):
        raise ConfigError(f"threshold must be 0 (exact) or more, found {threshold}")
    if threshold and drop_energy:
        raise ConfigError("a threshold for all layers and a share of energy for each exclude each other; give one")
    if drop_energy and text is None:
        raise ConfigError("drop_energy needs a text to measure the energy on")


def _factory(library: Path, **common: Any) -> Any:
    """A function that makes one of our operations: `create(name, x, packed weights, further attributes)`."""
    import openvino
    from openvino.utils.node_factory import NodeFactory

    factory = NodeFactory()
    factory.add_extension(str(library))

    def create(name: str, x: Any, packed: Sequence[Any], fields: dict[str, Any]) -> Any:
        constants = [openvino.op.Constant(array, shared_memory=False).output(0) for array in packed]
        # The head takes its weights twice; op.h says why.
        return factory.create(name, [x, *constants * (2 if name == HEAD else 1)], {**fields, **common})

    return create


def _replace(mlp: Mlp, up: Quantized, down: Quantized, create: Any, threshold: float) -> None:
    if up.codes.shape != down.codes.shape[::-1]:
        raise Unsupported(f"up is {up.codes.shape}, down is {down.codes.shape}")
    fields = {"hidden": up.codes.shape[1], "neurons": up.codes.shape[0], "threshold": threshold}
    for side, weights in (("up", up), ("down", down)):
        fields |= {f"{side}_{name}": value for name, value in _format(weights).items()}
    node = create(OPERATION, mlp.x, (layout.pack_up(up), layout.pack_down(down)), fields)
    node.set_friendly_name(mlp.down.get_friendly_name())
    _take_over(node.output(0), mlp.down)


def _format(weights: Quantized) -> dict[str, Any]:
    return {"bits": weights.bits, "group": weights.group, "asymmetric": weights.zeros is not None}


def _take_over(output: Any, old: Any) -> None:
    for consumer in list(old.output(0).get_target_inputs()):
        consumer.replace_source_output(output)


def _pack(operation: str, matmuls: Sequence[Any], create: Any) -> int:
    """Replace MatMuls that share their input, those of one format by one operation; returns how many."""
    formats: dict[str, list[tuple[Any, Quantized]]] = {}
    for matmul in matmuls:
        try:
            weights = read_weights(matmul)
        except Unsupported as error:
            logger.info("%s stays as it is: %s", matmul.get_friendly_name(), error)
            continue
        formats.setdefault(str(_format(weights)), []).append((matmul, weights))
    for members in formats.values():
        first = members[0][1]
        fields = {"inputs": first.codes.shape[1], "outputs": [weights.codes.shape[0] for _, weights in members]}
        packed = [layout.pack_up(weights) for _, weights in members]
        node = create(operation, members[0][0].input_value(0), packed, {**fields, **_format(first)})
        node.set_friendly_name(SEPARATOR.join(matmul.get_friendly_name() for matmul, _ in members))
        for index, (matmul, _) in enumerate(members):
            _take_over(node.output(index), matmul)
    return sum(map(len, formats.values()))


def _pack_projections(model: Any, mlps: Sequence[Mlp], create: Any) -> int:
    """Replace the projections and the head; returns how many matrices."""
    head = find_head(model)
    packed = sum(_pack(LINEAR, group, create) for group in find_projections(model, mlps))
    return packed if head is None else packed + _pack(HEAD, [head], create)


def _save(model: Any, model_dir: Path, work: Path) -> None:
    import openvino

    model.validate_nodes_and_infer_types()
    openvino.save_model(model, work / MODEL_XML, compress_to_fp16=False)
    align_constants(work / MODEL_XML, work / MODEL_BIN)
    for source in sorted(model_dir.iterdir()):
        kept = source.is_file() and not source.name.startswith(".")
        if kept and source.name not in (MODEL_XML, MODEL_BIN, manifest.FILE_NAME, "README.md"):
            shutil.copyfile(source, work / source.name)


def verify(plain: Path, packed: Path, library: Path) -> None:
    """Compare every code, scale and zero point of a rewritten model with the plain model's.

    Raises:
        ExtensionError: An MLP differs (named), or there are more or fewer than the rewritten model says.
    """
    model = read_model(plain / MODEL_XML)
    matmuls = {node.get_friendly_name(): node for node in model.get_ops() if node.get_type_name() == "MatMul"}
    ups = {mlp.down.get_friendly_name(): mlp.up.get_friendly_name() for mlp in find_mlps(model)[0]}
    for node in read_model(packed / MODEL_XML, library).get_ordered_ops():
        if node.get_type_name() == OPERATION:
            name = node.get_friendly_name()
            names, unpack = [ups.get(name, name), name], [layout.unpack_up, layout.unpack_down]
        elif node.get_type_name() in (LINEAR, HEAD):
            names = node.get_friendly_name().split(SEPARATOR)
            unpack = [layout.unpack_up] * len(names)
        else:
            continue
        for index, (name, inverse) in enumerate(zip(names, unpack, strict=True), 1):
            if name not in matmuls:
                raise ExtensionError(
                    f"{packed} has {name}, {plain} has not; run ov-afm kernels again", code="kernels-differ"
                )
            weights = read_weights(matmuls[name])
            if not weights.same(inverse(np.asarray(node.input_value(index).get_node().data), weights)):
                raise ExtensionError(
                    f"packed weights of {name_of(matmuls[name])} are not those of {plain}; run ov-afm kernels again",
                    code="kernels-differ",
                )


def _note(model_dir: Path, record: manifest.Manifest, result: Result, options: dict[str, Any]) -> None:
    """Add the packed model and its files to the manifest."""
    record.sparsity["kernels"] = {
        "folder": PACKED_FOLDER,
        "operation": OPERATION,
        "openvino": extension.runtime_version(),
        **{name: value for name, value in asdict(result).items() if name != "path" and value is not None},
        **options,
    }
    packed = {f"{PACKED_FOLDER}/{name}": entry for name, entry in manifest.scan(result.path).items()}
    record.files = {**_plain_files(record), **packed}
    manifest.write(model_dir, record)


def _weights_sha256(record: manifest.Manifest | None) -> str | None:
    """Digest of the plain model's weights, where it is recorded."""
    return record.files.get(MODEL_BIN, {}).get("sha256") if record else None


def _plain_files(record: manifest.Manifest) -> dict[str, dict[str, Any]]:
    return {name: entry for name, entry in record.files.items() if not name.startswith(f"{PACKED_FOLDER}/")}


def remove(model_dir: Path) -> bool:
    """Delete the model for the kernels; the plain one remains.

    Returns:
        Whether there was one, or the manifest listed one.

    Raises:
        SourceError: `model_dir` is no whole model directory.
        ConfigError: Something else lies in `relu2/`, too.
    """
    directory = ModelDirectory.open(model_dir, packed=False)
    check_packed(model_dir)
    listed = _forget(directory)
    existed = directory.packed.exists()
    if existed:
        # Out of its name in one step, so that nobody loads half of it; what a kill leaves, packing again clears.
        removed = directory.packed.with_name(f".{PACKED_FOLDER}.{os.getpid()}.ov-afm.partial")
        directory.packed.rename(removed)
        shutil.rmtree(removed)
    return existed or listed


def _forget(directory: ModelDirectory) -> bool:
    """Take the packed model out of the manifest; returns whether it was in it."""
    record = directory.manifest
    if record is None:
        return False
    plain = _plain_files(record)
    listed = record.sparsity.pop("kernels", None) is not None or plain != record.files
    if listed:
        record.files = plain
        manifest.write(directory.path, record)
    return listed
