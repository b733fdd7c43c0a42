"""Quantized matrices in an IR that NNCF compressed: to be read, and to be given other codes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .quantizer import Quantizer

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[np.float32]

__all__ = ["Stored", "put", "stored_matrices"]

FORMAT = re.compile(r"([iu])(4|8)$")


@dataclass(slots=True)
class Stored:
    """One quantized matrix.

    Attributes:
        quantizer: Its format.
        codes: The Constant of its codes (rows, columns) or (rows, groups, size).
        scale: The Constant of its scales.
        zero: The Constant of its zero points; None if symmetric.
    """

    quantizer: Quantizer
    codes: Any
    scale: Any
    zero: Any | None

    def value(self) -> Array:
        """The weights (rows, columns) that it stands for."""
        codes = _numbers(self.codes)
        if self.zero is not None:
            codes -= _numbers(self.zero)
        values: Array = codes * self.scale.get_data().astype(np.float32)
        return values.reshape(len(values), -1)

    def write(self, codes: Array, scale: Array, zero: Array) -> None:
        """Replace the content; shapes as of `feedback.Rounded`."""
        _replace(self.codes, codes)
        _replace(self.scale, scale)
        if self.zero is not None:
            _replace(self.zero, zero)


def stored_matrices(model: Any) -> dict[str, Stored]:
    """The quantized matrices of an IR, by the name of the constant that they replaced."""
    constants = {node.get_friendly_name(): node for node in model.get_ops() if node.get_type_name() == "Constant"}
    found = {}
    for name, node in constants.items():
        kind = FORMAT.match(node.get_element_type().get_type_name())
        scale = constants.get(f"{name}/scale")
        if kind is None or scale is None:
            continue
        shape = node.get_output_shape(0)
        group = int(shape[2]) if len(shape) == 3 else -1
        zero = constants.get(f"{name}/zero_point")
        found[name] = Stored(Quantizer(int(kind[2]), zero is None, group), node, scale, zero)
    return found


def put(model: Any, name: str, values: Array) -> None:
    """Replace a Constant of floating point by one of f32, for all of its readers."""
    from openvino import opset13 as ops

    for node in model.get_ops():
        if node.get_type_name() == "Constant" and node.get_friendly_name() == name:
            _take_place(node, ops.constant(np.ascontiguousarray(values)))


def _numbers(constant: Any) -> Array:
    kind = constant.get_element_type().get_type_name()
    if kind not in ("i4", "u4"):
        whole: Array = constant.get_data().astype(np.float32)
        return whole
    shape = list(constant.get_output_shape(0))
    packed = constant.data.reshape(-1).view(np.uint8)
    halves = np.stack([packed & 15, packed >> 4], axis=-1).reshape(-1)[: int(np.prod(shape))].astype(np.float32)
    if kind == "i4":
        halves[halves > 7] -= 16
    return halves.reshape(shape)


def _replace(constant: Any, values: Array) -> None:
    """Put values of the same type and shape in a constant's place, for all of its readers."""
    import openvino
    from openvino import opset13 as ops

    kind, shape = constant.get_element_type(), constant.get_output_shape(0)
    if kind.get_type_name() in ("i4", "u4"):
        whole = values.reshape(-1).astype(np.int8).view(np.uint8) & 15
        packed = np.append(whole, np.zeros(len(whole) % 2, dtype=np.uint8)).reshape(-1, 2)
        tensor = openvino.Tensor(packed[:, 0] | packed[:, 1] << 4, shape, kind)
        made = ops.constant(tensor, shared_memory=False)
    else:
        made = ops.constant(np.ascontiguousarray(values.reshape(shape)).astype(kind.to_dtype()))
    _take_place(constant, made)


def _take_place(constant: Any, made: Any) -> None:
    made.set_friendly_name(constant.get_friendly_name())
    for reader in list(constant.output(0).get_target_inputs()):
        reader.replace_source_output(made.output(0))
