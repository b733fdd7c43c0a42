"""Find ReLU² MLPs, projections and their compressed weights in an OpenVINO model, by structure.

An MLP is `MatMul → Relu → square → MatMul`, a projection any other MatMul with weights; the weights are what NNCF
leaves behind:
`Constant → Convert [→ Subtract zero point] → Multiply scale [→ Reshape] [→ Convert] → MatMul`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import ExtensionError, last_line
from ..model_dir.manifest import MODEL_XML
from .layout import CHANNEL_WISE, Quantized, Unsupported, unpack_int4

__all__ = ["Mlp", "find_head", "find_mlps", "find_projections", "name_of", "read_mlps", "read_model", "read_weights"]

CODES = {"i4": (4, True), "u4": (4, False), "i8": (8, True), "u8": (8, False)}


@dataclass(frozen=True)
class Mlp:
    """One MLP of a graph.

    Attributes:
        name: What people see, `layer 3`, or the name of the node where the name has no layer.
        x: Output that feeds the MLP.
        up: The first MatMul.
        down: The last MatMul.
    """

    name: str
    x: Any
    up: Any
    down: Any


def read_model(path: Path, *extensions: Path) -> Any:
    """Read an IR, with the libraries of its own operations."""
    import openvino

    core = openvino.Core()
    for library in extensions:
        core.add_extension(str(library))
    try:
        return core.read_model(path)
    except RuntimeError as error:
        raise ExtensionError(f"{path} cannot be read: {last_line(error)}") from error


def _nodes(model: Any, kind: str) -> list[Any]:
    """The operations of one type, each after those that feed it."""
    return [node for node in model.get_ordered_ops() if node.get_type_name() == kind]


def read_mlps(model_dir: Path, consequence: str) -> tuple[Any, list[Mlp], dict[str, str]]:
    """The plain model of a model directory, and what `find_mlps` finds in it.

    Raises:
        ExtensionError: The model cannot be read, or has no MLP; the message says what follows from that.
    """
    model = read_model(model_dir / MODEL_XML)
    mlps, refused = find_mlps(model)
    if not mlps:
        reason = f": {next(iter(refused.values()))}" if refused else ""
        raise ExtensionError(f"{model_dir} has no ReLU² MLP, so {consequence}{reason}", code="kernels-no-relu2")
    return model, mlps, refused


def find_mlps(model: Any) -> tuple[list[Mlp], dict[str, str]]:
    """The MLPs of a model, and for each Relu that looked like one but is not, its name and the reason."""
    mlps: list[Mlp] = []
    refused: dict[str, str] = {}
    for node in _nodes(model, "Relu"):
        name = name_of(node)
        try:
            mlps.append(_match(node, name))
        except Unsupported as error:
            refused[name] = str(error)
    return mlps, refused


def find_projections(model: Any, mlps: Sequence[Mlp]) -> list[list[Any]]:
    """The MatMuls with compressed weights between the MLPs; those that share their input are together."""
    inside = {matmul.get_friendly_name() for mlp in mlps for matmul in (mlp.up, mlp.down)}
    groups: dict[tuple[str, int], list[Any]] = {}
    for node in _nodes(model, "MatMul"):
        if node.get_friendly_name() not in inside and _is_compressed(node) and not _is_result(node):
            source = node.input_value(0)
            groups.setdefault((source.get_node().get_friendly_name(), source.get_index()), []).append(node)
    return list(groups.values())


def find_head(model: Any) -> Any | None:
    """The MatMul with compressed weights that gives the logits; None if there is none, or if it shares its weights."""
    for node in _nodes(model, "MatMul"):
        if _is_result(node) and _is_compressed(node):
            weights = _skip(node.input_value(1).get_node(), ("Convert", "Reshape"))
            return node if len(weights.output(0).get_target_inputs()) == 1 else None
    return None


def _is_result(node: Any) -> bool:
    return any(target.get_node().get_type_name() == "Result" for target in node.output(0).get_target_inputs())


def _is_compressed(matmul: Any) -> bool:
    attributes = matmul.get_attributes()
    weights = _skip(matmul.input_value(1).get_node(), ("Convert", "Reshape"))
    fits = attributes["transpose_b"] and not attributes["transpose_a"]
    return bool(fits and weights.get_type_name() == "Multiply")


def name_of(node: Any) -> str:
    """What people see of a node: its layer, or its own name if that has none."""
    layer = re.search(r"layers\.(\d+)\.", node.get_friendly_name())
    return f"layer {layer[1]}" if layer else str(node.get_friendly_name())


def _match(relu: Any, name: str) -> Mlp:
    up = relu.input_value(0).get_node()
    _require(up.get_type_name() == "MatMul", f"Relu follows {up.get_type_name()}, not MatMul")
    square = _only_consumer(relu)
    _require(_is_square(square), f"Relu is followed by {square.get_type_name()}, which is no square")
    down = _only_consumer(square)
    _require(down.get_type_name() == "MatMul", f"the square is followed by {down.get_type_name()}, not MatMul")
    _require(down.input_value(0).get_node() == square, "the square is not the left side of MatMul")
    _require(_only_consumer(up) == relu, "the neurons are used by something else too")
    for matmul in (up, down):
        attributes = matmul.get_attributes()
        _require(attributes["transpose_b"] and not attributes["transpose_a"], "weights are not (outputs, inputs)")
    return Mlp(name, up.input_value(0), up, down)


def _require(condition: bool, reason: str) -> None:
    if not condition:
        raise Unsupported(reason)


def _only_consumer(node: Any) -> Any:
    consumers = {target.get_node() for target in node.output(0).get_target_inputs()}
    _require(len(consumers) == 1, f"{node.get_type_name()} feeds {len(consumers)} operations")
    return consumers.pop()


def _is_square(node: Any) -> bool:
    if node.get_type_name() == "Multiply":
        return bool(node.input_value(0) == node.input_value(1))
    if node.get_type_name() != "Power":
        return False
    exponent = node.input_value(1).get_node()
    return exponent.get_type_name() == "Constant" and bool(np.all(exponent.data == 2))


def read_weights(matmul: Any) -> Quantized:
    """The quantized weights of a MatMul.

    Raises:
        Unsupported: They are not compressed to 4 or 8 bits, or not in a way that the kernels know.
    """
    multiply = _skip(matmul.input_value(1).get_node(), ("Convert", "Reshape"))
    _require(multiply.get_type_name() == "Multiply", "the weights are not compressed to int4 or int8")
    scale = _skip(multiply.input_value(1).get_node(), ("Convert",))
    quantized = multiply.input_value(0).get_node()
    zero = None
    if quantized.get_type_name() == "Subtract":
        zero = _skip(quantized.input_value(1).get_node(), ("Convert",))
        quantized = quantized.input_value(0).get_node()
    constant = _skip(quantized, ("Convert",))
    for node in filter(None, (constant, scale, zero)):
        _require(node.get_type_name() == "Constant", f"the weights contain {node.get_type_name()}, not a constant")
    kind = constant.get_element_type().get_type_name()
    _require(kind in CODES, f"the weights are stored as {kind}; int4 and int8 are supported")
    bits, signed = CODES[kind]
    shape = list(constant.get_output_shape(0))
    _require(len(shape) in (2, 3), f"the weights have shape {shape}")
    codes = _codes(constant, bits, signed, (shape[0], int(np.prod(shape[1:]))))
    group = shape[2] if len(shape) == 3 and shape[1] > 1 else CHANNEL_WISE
    grouped = (shape[0], 1 if group == CHANNEL_WISE else shape[1])
    return Quantized(codes, _scales(scale, grouped), _zeros(zero, bits, signed, grouped), bits, group)


def _skip(node: Any, kinds: tuple[str, ...]) -> Any:
    while node.get_type_name() in kinds:
        node = node.input_value(0).get_node()
    return node


def _codes(constant: Any, bits: int, signed: bool, shape: tuple[int, ...]) -> npt.NDArray[np.uint8]:
    raw: npt.NDArray[np.uint8] = constant.data.reshape(-1).view(np.uint8)
    if bits == 8:
        return (raw ^ np.uint8(0x80) if signed else raw).reshape(shape)
    codes = unpack_int4(raw, shape)
    # Flipping the sign bit turns two's complement into code = value + 8.
    return codes ^ np.uint8(8) if signed else codes


def _scales(node: Any, shape: tuple[int, int]) -> npt.NDArray[np.float16]:
    exact = np.asarray(node.data)
    with np.errstate(over="ignore"):
        scales = exact.astype(np.float16)
    _require(bool(np.array_equal(scales.astype(exact.dtype), exact)), "the scales do not fit float16 exactly")
    _require(scales.size in (1, shape[0] * shape[1]), f"there are {scales.size} scales for {shape} groups")
    return np.broadcast_to(scales.reshape(shape) if scales.size > 1 else scales.reshape(1, 1), shape)


def _zeros(node: Any, bits: int, signed: bool, shape: tuple[int, int]) -> npt.NDArray[np.uint8] | None:
    if node is None:
        return None if signed else np.zeros(shape, np.uint8)
    kind = node.get_element_type().get_type_name()
    if kind in ("u4", "i4"):
        values = _codes(node, 4, False, tuple(node.get_output_shape(0))).astype(np.int64)
        values = np.where(values > 7, values - 16, values) if kind == "i4" else values
    else:
        data = np.asarray(node.data)
        values = data.astype(np.int64)
        _require(bool(np.array_equal(values, data)), "the zero points are not whole numbers")
    values = values + (1 << bits - 1 if signed else 0)
    _require(bool(((values >= 0) & (values < 1 << bits)).all()), "a zero point is outside the codes")
    _require(values.size in (1, shape[0] * shape[1]), f"there are {values.size} zero points for {shape} groups")
    zeros = values.astype(np.uint8)
    return np.broadcast_to(zeros.reshape(shape) if zeros.size > 1 else zeros.reshape(1, 1), shape)
