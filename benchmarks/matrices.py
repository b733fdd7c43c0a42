"""The weight matrices of a model directory as its IR really stores them, whatever a manifest says or does not say."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ov_afm.errors import ConfigError
from ov_afm.kernels.graph import read_model
from ov_afm.system.console import human_bytes

PLACE = re.compile(r"layers\.\d+\.(?:self_attn|mlp)\.\w+_proj|embed_tokens|lm_head")
# Operations between a stored matrix and the one that uses it.
BETWEEN = {"Convert", "Subtract", "Multiply", "Reshape", "Transpose"}


@dataclass(frozen=True)
class Matrix:
    """One matrix.

    Attributes:
        name: What transformers calls it, such as `model.layers.0.mlp.up_proj.weight`.
        shape: Outputs and inputs.
        bits: Of one stored value, scales left out.
        kind: The format for people, such as `INT4 g128`.
        stored_bytes: Size of values, scales and zero points.
    """

    name: str
    shape: tuple[int, int]
    bits: int
    kind: str
    stored_bytes: int

    @property
    def size(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)


def read_matrices(xml: Path) -> list[Matrix]:
    """Every matrix of a decoder once: where embedding and head share one, it is the embedding's.

    Args:
        xml: The IR.

    Raises:
        ConfigError: A matrix has a name that is not one of a decoder.
    """
    matrices: dict[str, Matrix] = {}
    for node in read_model(xml).get_ordered_ops():
        kind = node.get_type_name()
        if kind not in ("MatMul", "Gather"):
            continue
        constants = _constants(node.input_value(1 if kind == "MatMul" else 0).get_node())
        values = max(constants, key=_elements, default=None)
        if values is None or values.get_friendly_name() in matrices or min(_rows_and_columns(values)) < 2:
            continue
        place = PLACE.search(node.get_friendly_name()) or PLACE.search(values.get_friendly_name())
        if place is not None:
            matrices[values.get_friendly_name()] = _matrix(place[0], values, constants)
        elif kind == "MatMul":
            raise ConfigError(f"{xml} has a matrix {node.get_friendly_name()}, which no known decoder has")
    return list(matrices.values())


def bits_per_weight(matrices: Sequence[Matrix]) -> float:
    """Stored bits of each weight, scales and zero points included."""
    return 8 * sum(each.stored_bytes for each in matrices) / sum(each.size for each in matrices)


def stored_as(matrices: Sequence[Matrix], file: Path) -> str:
    """Formats, size and bits a weight of a model's file, so that nobody compares what is not alike."""
    size = human_bytes(file.stat().st_size)
    return f"{kinds(matrices)}, {size}, {bits_per_weight(matrices):.2f} bits a weight"


def kinds(matrices: Sequence[Matrix]) -> str:
    """Their formats, the one with most weights first: `INT4 g128 + INT8 per row`."""
    weights: dict[str, int] = {}
    for each in matrices:
        weights[each.kind] = weights.get(each.kind, 0) + each.size
    return " + ".join(sorted(weights, key=lambda kind: -weights[kind]))


def _matrix(place: str, values: Any, constants: Sequence[Any]) -> Matrix:
    shape = list(values.get_output_shape(0))
    bits = int(values.get_output_element_type(0).bitwidth)
    scales = f"g{shape[2]}" if len(shape) == 3 and shape[1] > 1 else "per row"
    kind = f"INT{bits} {scales}" if bits <= 8 else f"F{bits}"
    stored = sum(-(-_elements(each) * int(each.get_output_element_type(0).bitwidth) // 8) for each in constants)
    name = f"{place}.weight" if place == "lm_head" else f"model.{place}.weight"
    return Matrix(name, _rows_and_columns(values), bits, kind, stored)


def _constants(node: Any) -> list[Any]:
    if node.get_type_name() == "Constant":
        return [node]
    if node.get_type_name() not in BETWEEN:
        return []
    found: dict[str, Any] = {}
    # Other second inputs are shapes.
    for value in node.input_values()[: 2 if node.get_type_name() in ("Multiply", "Subtract") else 1]:
        found |= {each.get_friendly_name(): each for each in _constants(value.get_node())}
    return list(found.values())


def _elements(constant: Any) -> int:
    return math.prod(map(int, constant.get_output_shape(0)))


def _rows_and_columns(constant: Any) -> tuple[int, int]:
    shape = [int(each) for each in constant.get_output_shape(0)] or [1]
    return shape[0], math.prod(shape[1:])
