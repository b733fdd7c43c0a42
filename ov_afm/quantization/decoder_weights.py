"""The weights of a decoder in an uncompressed IR: to read them, rescale them and put them back."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import CompressionError
from .quantizer import Array

__all__ = ["Decoder", "Layer", "Matrix", "Weight", "constant_as_f32", "find_layers", "find_matrices"]

MATRIX = re.compile(r"layers\.(\d+)\.(?:self_attn|mlp)\.(q|k|v|o|up|gate|down)_proj/")
# The table itself, not its scales or zero points.
EMBEDDING = re.compile(r"embed_tokens\.[a-z_]+$|embed_tokens$")


class Weight:
    """A constant of the graph, with scales of its rows and columns.

    The rescaled values take memory only from when they are read or written until `forget`: all matrices of AFM-4.5B
    would be 16 GB.

    Attributes:
        key: Name of the constant, which NNCF gives to what it puts in its place.
        name: Name in the checkpoint.
        rescaled: Whether the values differ from the constant's.
    """

    def __init__(self, reader: Any) -> None:
        """Take the input of a node that a Constant feeds, directly or through a Convert."""
        self.reader = reader
        node = reader.get_source_output().get_node()
        self.constant = node if node.get_type_name() == "Constant" else node.input_value(0).get_node()
        self.key = str(self.constant.get_friendly_name())
        self.name = self.key.removeprefix("self.").removesuffix("._openvino_orig_weight")
        self.rescaled = False
        self._rows: Array = np.ones(1, np.float32)
        self._columns: Array = np.ones(1, np.float32)
        self._value: Array | None = None

    @property
    def shape(self) -> list[int]:
        """Extents of the constant."""
        return list(self.constant.get_output_shape(0))

    @property
    def value(self) -> Array:
        """The values, rescaled; kept until `forget`."""
        if self._value is None:
            self._value = constant_as_f32(self.constant)
            if self.rescaled:
                self._value *= self._rows
                self._value *= self._columns
        return self._value

    def scale_rows(self, scales: Array) -> None:
        """Multiply each row by its own scale."""
        self._rows = self._rows * scales.astype(np.float32)[:, None]
        self.rescaled, self._value = True, None

    def scale_columns(self, scales: Array) -> None:
        """Multiply each column by its own scale."""
        self._columns = self._columns * scales.astype(np.float32)
        self.rescaled, self._value = True, None

    def forget(self) -> None:
        """Free the values; what was rescaled is remembered."""
        self._value = None

    def write(self) -> None:
        """Put the rescaled values into the graph, as f32, and free them."""
        if self.rescaled:
            from openvino import opset13 as ops

            # Only this reader: equal constants may be shared by several nodes.
            self.constant = ops.constant(np.ascontiguousarray(self.value), name=self.key)
            self.reader.replace_source_output(self.constant.output(0))
            self.rescaled, self._rows, self._columns = False, np.ones(1, np.float32), np.ones(1, np.float32)
        self.forget()


@dataclass(slots=True)
class Layer:
    """Weights of one decoder layer."""

    index: int
    head_dim: int
    attention_norm: Weight
    mlp_norm: Weight
    q: Weight
    k: Weight
    v: Weight
    o: Weight
    up: Weight
    gate: Weight | None
    down: Weight

    @property
    def relu2(self) -> bool:
        """Whether the MLP is relu(up)² without a gate."""
        return self.gate is None

    @property
    def mlp_readers(self) -> list[Weight]:
        """Matrices that read the MLP's input."""
        return [self.up] if self.gate is None else [self.gate, self.up]

    @property
    def elements(self) -> int:
        """Weights of all matrices."""
        return sum(int(np.prod(matrix.shape)) for matrix in self.matrices())

    def matrices(self) -> Iterator[Weight]:
        """All matrices."""
        yield from (self.q, self.k, self.v, self.o, *self.mlp_readers, self.down)

    def norms(self) -> Iterator[Weight]:
        """The weights of both RMSNorms."""
        yield from (self.attention_norm, self.mlp_norm)

    def write(self, *, matrices: bool = True) -> None:
        """Put the rescaled values of the norms, and of the matrices unless they are left out, into the graph."""
        for weight in (*self.norms(), *(self.matrices() if matrices else ())):
            weight.write()

    def forget(self) -> None:
        """Free the values of all weights."""
        for weight in (*self.matrices(), *self.norms()):
            weight.forget()


@dataclass(frozen=True, slots=True)
class Decoder:
    """What calibration text runs through: the decoder of an uncompressed IR.

    Attributes:
        layers: Its layers, from the first to the last.
        embedding: The Constant of the token embedding (vocabulary, hidden).
        folder: Where the model's `config.json` is.
    """

    layers: list[Layer]
    embedding: Any
    folder: Path

    @classmethod
    def of(cls, model: Any, folder: Path) -> Decoder:
        """The decoder of an `openvino.Model`.

        Raises:
            CompressionError: The model has no such parts where `ov-afm export` puts them.
        """
        return cls(find_layers(model), _find_embedding(model), folder)


@dataclass(frozen=True, slots=True)
class Matrix:
    """A weight and what reads it.

    Attributes:
        kind: One of `presets.KINDS`.
        reader: Name of the MatMul or Gather.
        key: Name of the constant; a tied embedding has two readers.
    """

    kind: str
    reader: str
    key: str


def find_matrices(model: Any) -> list[Matrix]:
    """The matrices of an IR that Optimum exported, uncompressed: those of its decoder layers, embedding and head."""
    matrices = []
    for node in model.get_ordered_ops():
        name, type_name = node.get_friendly_name(), node.get_type_name()
        match = MATRIX.search(name)
        if type_name == "Gather" and "embed_tokens/" in name:
            matrices.append(Matrix("embedding", name, Weight(node.input(0)).key))
        elif type_name == "MatMul" and "lm_head/" in name:
            matrices.append(Matrix("head", name, Weight(node.input(1)).key))
        elif type_name == "MatMul" and match:
            kind = match[2] if match[2] in ("up", "gate", "down") else "attention"
            matrices.append(Matrix(kind, name, Weight(node.input(1)).key))
    return matrices


def _find_embedding(model: Any) -> Any:
    for node in model.get_ops():
        constant = node.get_type_name() == "Constant" and len(node.get_output_shape(0)) == 2
        if constant and EMBEDDING.search(node.get_friendly_name()):
            return node
    raise CompressionError(
        "the model's token embedding was not found; calibration knows models that `ov-afm export` makes"
    )


def find_layers(model: Any) -> list[Layer]:
    """The decoder layers of an IR that Optimum exported, from the first to the last.

    Raises:
        CompressionError: There is none, or one lacks a part.
    """
    matmuls: dict[int, dict[str, Any]] = {}
    for node in model.get_ordered_ops():
        match = MATRIX.search(node.get_friendly_name())
        if match and node.get_type_name() == "MatMul":
            matmuls.setdefault(int(match[1]), {})[match[2]] = node
    if not matmuls:
        raise CompressionError(
            "no decoder layers were found in the model; equalisation knows models that `ov-afm export` makes",
            code="layers-missing",
        )
    return [_layer(index, matmuls[index]) for index in sorted(matmuls)]


def _layer(index: int, matmuls: dict[str, Any]) -> Layer:
    missing = [name for name in ("q", "k", "v", "o", "up", "down") if name not in matmuls]
    if missing:
        raise CompressionError(
            f"layer {index} has no {missing[0]}_proj in the model; equalisation knows Arcee and Llama decoders",
            code="layer-unknown",
        )
    weights = {name: Weight(node.input(1)) for name, node in matmuls.items()}
    return Layer(
        index=index,
        head_dim=_head_dim(matmuls["v"]),
        attention_norm=_norm(matmuls["q"].input_value(0), index),
        mlp_norm=_norm(matmuls["up"].input_value(0), index),
        gate=weights.pop("gate", None),
        **weights,
    )


def _norm(output: Any, index: int) -> Weight:
    """The weight of the RMSNorm that makes an output; a weight of ones is added where it was folded away."""
    from openvino import opset13 as ops

    node = output.get_node()
    if node.get_type_name() != "Multiply":
        raise CompressionError(
            f"the norm of layer {index} is not where Optimum puts it ({node.get_type_name()} found)",
            code="layer-unknown",
        )
    for port in range(2):
        inner = node.input_value(port).get_node()
        if inner.get_type_name() == "Convert":
            inner = inner.input_value(0).get_node()
        if inner.get_type_name() == "Constant":
            return Weight(node.input(port))
    width = output.get_partial_shape()[2].get_length()
    readers = list(output.get_target_inputs())
    scaled = ops.multiply(output, ops.constant(np.ones((1, 1, width), dtype=np.float32)))
    for reader in readers:
        reader.replace_source_output(scaled.output(0))
    return Weight(scaled.input(1))


def _head_dim(v: Any) -> int:
    """Width of a value head: the last extent of the reshape that follows `v_proj`."""
    for target in v.output(0).get_target_inputs():
        shape = target.get_node().get_output_partial_shape(0)
        if target.get_node().get_type_name() == "Reshape" and shape.rank.get_length() == 4:
            return int(shape[3].get_length())
    return 0


def constant_as_f32(constant: Any) -> Array:
    """The values of a Constant of floating point."""
    data = constant.data
    if constant.get_element_type().get_type_name() == "bf16":
        # bf16 is the upper half of f32.
        bits = np.ascontiguousarray(data).view(np.uint16).astype(np.uint32) << 16
        widened: Array = bits.view(np.float32).reshape(constant.get_output_shape(0))
        return widened
    return np.array(data, dtype=np.float32)
