"""Rewrite a model's ReLU² MLPs into one operation each, for the native kernels.

What was quantized stays quantized the same way: after saving, every code, scale and zero point is read back and
compared with the plain model's. The rewritten model lies in `relu2/` inside the model directory and is a model
directory itself; the plain model stays where it was, for GPU, NPU, OpenVINO Model Server and machines without the
library.
"""

from __future__ import annotations

import logging
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .. import console, manifest
from ..errors import ConfigError, ExtensionError
from ..staging import staging
from . import extension, reference
from .aligned import align_constants
from .graph import Mlp, Unsupported, find_mlps, read_model, read_weights
from .reference import Quantized
from .select import FOLDER, MODEL

__all__ = ["FOLDER", "Result", "transform"]

WEIGHTS = "openvino_model.bin"
OPERATION = "ReLU2FFN"
BITS = {"auto": 0, "int8": 8, "int16": 16}

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Result:
    """What `transform` did.

    Attributes:
        path: Folder of the rewritten model.
        replaced: Names of the MLPs that became one operation.
        refused: Name of an MLP that did not → why.
    """

    path: Path
    replaced: list[str]
    refused: dict[str, str]


def transform(model_dir: Path, *, activations: str = "auto", threshold: float = 0.0, on_layer: Any = None) -> Result:
    """Write the model for the kernels into `MODEL_DIR/relu2`, verify it, and note it in the manifest.

    Args:
        model_dir: A model directory with int4 or int8 weights.
        activations: Width that activations are quantized to inside an MLP: `int8`, `int16`, or `auto`, which is int8
            for 8 tokens and more on CPUs with VNNI (as stock OpenVINO does there) and int16 otherwise. Squares of
            few active neurons are int16 always.
        threshold: Skip neurons whose activation is at or below it; 0 is exact.
        on_layer: Called with 1 after each MLP.

    Raises:
        ExtensionError: There is no native library, no MLP could be replaced, or verification failed.
        ConfigError: An option is out of range.
        SourceError: `model_dir` is no whole model directory.
    """
    if activations not in BITS:
        msg = f"activations {activations!r} are unknown; choose one of {', '.join(BITS)}"
        raise ConfigError(msg)
    if not 0.0 <= threshold < float("inf"):
        msg = f"threshold must be 0 (exact) or more, found {threshold}"
        raise ConfigError(msg)
    record = manifest.verify(model_dir)
    library = extension.load()
    model = read_model(model_dir / MODEL)
    mlps, refused = find_mlps(model)
    if not mlps:
        reasons = f": {next(iter(refused.values()))}" if refused else ""
        msg = f"{model_dir} has no ReLU² MLP, so the kernels cannot help it{reasons}"
        raise ExtensionError(msg)
    replaced = []
    create = _factory(library, {"threshold": threshold, "activation_bits": BITS[activations]})
    for mlp in mlps:
        try:
            _replace(mlp, read_weights(mlp.up), read_weights(mlp.down), create)
            replaced.append(mlp.name)
        except Unsupported as error:
            refused[mlp.name] = str(error)
        if on_layer:
            on_layer(1)
    if not replaced:
        msg = f"no MLP of {model_dir} can use the kernels: {next(iter(refused.values()))}"
        raise ExtensionError(msg)
    path = model_dir / FOLDER
    with staging(path, replace=True) as work:
        _save(model, model_dir, work)
        del model
        verify(model_dir, work, library)
    _note(model_dir, record, Result(path, replaced, refused), activations, threshold)
    return Result(path, replaced, refused)


def _factory(library: Path, options: dict[str, Any]) -> Any:
    from openvino.utils.node_factory import NodeFactory

    factory = NodeFactory()
    factory.add_extension(str(library))

    def create(x: Any, up: Quantized, down: Quantized) -> Any:
        import openvino

        fields = {"hidden": up.codes.shape[1], "neurons": up.codes.shape[0], **options}
        for side, weights in (("up", up), ("down", down)):
            fields[f"{side}_bits"] = weights.bits
            fields[f"{side}_group"] = weights.group
            fields[f"{side}_asymmetric"] = weights.zeros is not None
        packed = (reference.pack_up(up), reference.pack_down(down))
        constants = [openvino.op.Constant(array, shared_memory=False).output(0) for array in packed]
        return factory.create(OPERATION, [x, *constants], fields)

    return create


def _replace(mlp: Mlp, up: Quantized, down: Quantized, create: Any) -> None:
    if up.codes.shape != down.codes.shape[::-1]:
        msg = f"up is {up.codes.shape}, down is {down.codes.shape}"
        raise Unsupported(msg)
    node = create(mlp.x, up, down)
    node.set_friendly_name(mlp.down.get_friendly_name())
    for consumer in list(mlp.down.output(0).get_target_inputs()):
        consumer.replace_source_output(node.output(0))


def _save(model: Any, model_dir: Path, work: Path) -> None:
    import openvino

    model.validate_nodes_and_infer_types()
    openvino.save_model(model, work / MODEL, compress_to_fp16=False)
    align_constants(work / MODEL, work / WEIGHTS)
    for source in sorted(model_dir.iterdir()):
        kept = source.is_file() and not source.name.startswith(".")
        if kept and source.name not in (MODEL, WEIGHTS, manifest.FILE_NAME, "README.md"):
            shutil.copyfile(source, work / source.name)


def verify(plain: Path, packed: Path, library: Path) -> None:
    """Compare every code, scale and zero point of a rewritten model with the plain model's.

    Raises:
        ExtensionError: An MLP differs (named), or there are more or fewer than the rewritten model says.
    """
    plain_mlps = {mlp.down.get_friendly_name(): mlp for mlp in find_mlps(read_model(plain / MODEL))[0]}
    for node in read_model(packed / MODEL, library).get_ordered_ops():
        if node.get_type_name() != OPERATION:
            continue
        mlp = plain_mlps.get(node.get_friendly_name())
        if mlp is None:
            msg = f"{packed} has {node.get_friendly_name()}, {plain} has not; run ov-afm kernels again"
            raise ExtensionError(msg)
        data = [np.asarray(node.input_value(i).get_node().data) for i in (1, 2)]
        up, down = read_weights(mlp.up), read_weights(mlp.down)
        if not (up.same(reference.unpack_up(data[0], up)) and down.same(reference.unpack_down(data[1], down))):
            msg = f"packed weights of {mlp.name} are not those of {plain}; run ov-afm kernels again"
            raise ExtensionError(msg)


def _note(
    model_dir: Path, record: manifest.Manifest | None, result: Result, activations: str, threshold: float
) -> None:
    if record is None:
        return
    record.sparsity["kernels"] = {
        "folder": FOLDER,
        "operation": OPERATION,
        "openvino": extension.runtime_version(),
        "replaced": result.replaced,
        "refused": result.refused,
        "activations": activations,
        "threshold": threshold,
    }
    prefix = f"{FOLDER}/"
    record.files = {name: entry for name, entry in record.files.items() if not name.startswith(prefix)}
    record.files |= {prefix + name: entry for name, entry in manifest.scan(result.path).items()}
    manifest.write(model_dir, record)


@console.command
def main(argv: Sequence[str] | None = None) -> int:
    """Write the model for the kernels beside the plain one."""
    parser = console.parser("kernels", "Rewrite a model's ReLU² MLPs for the native CPU kernels.")
    parser.add_argument("model_dir", type=Path, help="model directory with int4 or int8 weights")
    parser.add_argument("--activations", choices=sorted(BITS), default="auto", help="width of quantized activations")
    parser.add_argument("--threshold", type=float, default=0.0, help="skip neurons at or below it; 0 is exact")
    parser.add_argument("--portable", action="store_true", help=f"remove {FOLDER}/: only the plain model remains")
    args = parser.parse_args(argv)
    if args.portable:
        remove(args.model_dir)
        return 0
    with console.Progress() as progress, progress.step("packing MLPs") as advance:
        result = transform(args.model_dir, activations=args.activations, threshold=args.threshold, on_layer=advance)
    for name, reason in result.refused.items():
        console.note(f"{name} stays as it is: {reason}")
    print(f"{result.path}: {len(result.replaced)} MLPs for the kernels, weights verified bit for bit")
    return 0


def remove(model_dir: Path) -> None:
    """Delete the model for the kernels; the plain one remains.

    Raises:
        SourceError: `model_dir` is no whole model directory.
    """
    record = manifest.read(model_dir)
    if record is not None:
        record.sparsity.pop("kernels", None)
        record.files = {name: entry for name, entry in record.files.items() if not name.startswith(f"{FOLDER}/")}
        manifest.write(model_dir, record)
    shutil.rmtree(model_dir / FOLDER, ignore_errors=True)


if __name__ == "__main__":
    from ov_afm.sparsity.transform import main as run

    sys.exit(run())
