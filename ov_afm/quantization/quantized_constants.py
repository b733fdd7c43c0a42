"""Quantized matrices in an IR that NNCF compressed: to read them, and to give them other codes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..kernels.layout import unpack_int4
from .quantizer import Array, Quantizer

__all__ = ["QuantizedMatrix", "find_quantized", "replace_float"]

FORMAT = re.compile(r"([iu])(4|8)$")


@dataclass(slots=True)
class QuantizedMatrix:
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
        """The weights (rows, columns) that it represents."""
        codes = _numbers(self.codes)
        if self.zero is not None:
            codes -= _numbers(self.zero)
        values: Array = codes * self.scale.get_data().astype(np.float32)
        return values.reshape(len(values), -1)

    def write(self, codes: Array, scale: Array, zero: Array) -> None:
        """Replace the content; shapes as of `gptq.Rounded`."""
        _rewrite(self.codes, codes)
        _rewrite(self.scale, scale)
        if self.zero is not None:
            _rewrite(self.zero, zero)


def find_quantized(model: Any) -> dict[str, QuantizedMatrix]:
    """The quantized matrices of an IR, by the name of the constant that they replaced."""
    constants = {node.get_friendly_name(): node for node in model.get_ops() if node.get_type_name() == "Constant"}
    matrices = {}
    for name, node in constants.items():
        kind = FORMAT.match(node.get_element_type().get_type_name())
        scale = constants.get(f"{name}/scale")
        if kind is None or scale is None:
            continue
        shape = node.get_output_shape(0)
        group = int(shape[2]) if len(shape) == 3 else -1
        zero = constants.get(f"{name}/zero_point")
        matrices[name] = QuantizedMatrix(Quantizer(int(kind[2]), zero is None, group), node, scale, zero)
    return matrices


def replace_float(model: Any, name: str, values: Array) -> None:
    """Replace a Constant of floating point by one of f32, for all of its readers."""
    from openvino import opset13 as ops

    for node in model.get_ops():
        if node.get_type_name() == "Constant" and node.get_friendly_name() == name:
            _take_place(node, ops.constant(np.ascontiguousarray(values)))


def _numbers(constant: Any) -> Array:
    """The whole numbers that a Constant holds, as f32."""
    kind = constant.get_element_type().get_type_name()
    if kind not in ("i4", "u4"):
        values: Array = constant.get_data().astype(np.float32)
        return values
    values = unpack_int4(constant.data.reshape(-1).view(np.uint8), constant.get_output_shape(0)).astype(np.float32)
    if kind == "i4":
        values[values > 7] -= 16
    return values


def _rewrite(constant: Any, values: Array) -> None:
    """Put values in a Constant's place, of its type and shape, for all of its readers."""
    import openvino
    from openvino import opset13 as ops

    kind, shape = constant.get_element_type(), constant.get_output_shape(0)
    if kind.get_type_name() in ("i4", "u4"):
        nibbles = values.reshape(-1).astype(np.int8).view(np.uint8) & 15
        pairs = np.append(nibbles, np.zeros(len(nibbles) % 2, dtype=np.uint8)).reshape(-1, 2)
        tensor = openvino.Tensor(pairs[:, 0] | pairs[:, 1] << 4, shape, kind)
        replacement = ops.constant(tensor, shared_memory=False)
    else:
        replacement = ops.constant(np.ascontiguousarray(values.reshape(shape)).astype(kind.to_dtype()))
    _take_place(constant, replacement)


def _take_place(constant: Any, replacement: Any) -> None:
    replacement.set_friendly_name(constant.get_friendly_name())
    for reader in list(constant.output(0).get_target_inputs()):
        reader.replace_source_output(replacement.output(0))
