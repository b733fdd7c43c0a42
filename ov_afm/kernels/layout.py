"""Packed weights in numpy: the specification that the native kernels are tested against.

A quantized weight is `(code - zero) * scale` with an unsigned code. Packing moves codes, scales and zero points to
where the kernels want them and changes none: `unpack_*` gives back exactly what `pack_*` was given.
The layouts are drawn in `csrc/layout.h`; both files change together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import ExtensionError

__all__ = [
    "CHANNEL_WISE",
    "GROUPS",
    "Quantized",
    "Unsupported",
    "pack_down",
    "pack_up",
    "unpack_down",
    "unpack_int4",
    "unpack_up",
]

Bytes = npt.NDArray[np.uint8]

CHANNEL_WISE = -1
GROUPS = (32, 64, 128, CHANNEL_WISE)
BLOCK = 16  # neurons of one UP record
INPUT_STEP = 32  # UP inputs are padded to this
OUTPUT_STEP = 128  # DOWN outputs are padded to this
PIECE = 64  # bytes that kernels handle together
MAX_GROUP = 128  # neurons of one DOWN record


class Unsupported(ExtensionError):
    """An MLP or a matrix that the kernels do not take; the message is the reason."""


@dataclass(frozen=True)
class Quantized:
    """A quantized matrix.

    Attributes:
        codes: Unsigned codes (outputs, inputs), below 16 or 256.
        scales: float16 (outputs, groups).
        zeros: uint8 (outputs, groups); None for symmetric weights, whose zero is 8 or 128.
        bits: 4 or 8.
        group: Inputs that share a scale: 32, 64, 128, or -1 for one scale a row.
    """

    codes: Bytes
    scales: npt.NDArray[np.float16]
    zeros: Bytes | None
    bits: int
    group: int

    def __post_init__(self) -> None:
        """Refuse what no layout holds.

        Raises:
            Unsupported: The group size is not supported, or does not divide the inputs.
        """
        if self.group not in GROUPS:
            raise Unsupported(f"kernels take group sizes 32, 64, 128 and -1 (channel-wise), found {self.group}")
        if self.group != CHANNEL_WISE and self.codes.shape[1] % self.group:
            raise Unsupported(f"group size {self.group} does not divide {self.codes.shape[1]} inputs")

    @property
    def symmetric_zero(self) -> int:
        """The zero point of symmetric weights of this width."""
        return 8 if self.bits == 4 else 128

    @property
    def constants(self) -> list[npt.NDArray[Any]]:
        """The scales and, of asymmetric weights, the zero points."""
        return [self.scales] if self.zeros is None else [self.scales, self.zeros]

    def same(self, other: Quantized) -> bool:
        """Whether every code, scale and zero point is bit for bit the same."""
        return (
            (self.bits, self.group) == (other.bits, other.group)
            and np.array_equal(self.codes, other.codes)
            and np.array_equal(self.scales.view(np.uint16), other.scales.view(np.uint16))
            and (self.zeros is None) == (other.zeros is None)
            and (self.zeros is None or other.zeros is None or np.array_equal(self.zeros, other.zeros))
        )


def unpack_int4(raw: Bytes, shape: Sequence[int]) -> Bytes:
    """Nibbles (shape), 0 to 15, of a constant of OpenVINO's 4-bit types; a byte holds the first one in its low half."""
    nibbles = np.empty((raw.size, 2), np.uint8)
    np.bitwise_and(raw, 15, out=nibbles[:, 0])
    np.right_shift(raw, 4, out=nibbles[:, 1])
    return nibbles.reshape(-1)[: math.prod(shape)].reshape(tuple(shape))


def pack_up(weights: Quantized) -> Bytes:
    """Records of 16 neurons: codes, scales, zero points, padding to 64 bytes. Returns bytes (size,)."""
    inputs, groups = _round_up(weights.codes.shape[1], INPUT_STEP), weights.scales.shape[1]
    outputs = _round_up(weights.codes.shape[0], BLOCK)
    blocks = outputs // BLOCK
    codes = _pad(weights.codes, outputs, inputs, weights.symmetric_zero)
    quads = codes.reshape(blocks, BLOCK, inputs // 4, 4)
    if weights.bits == 4:
        quads = quads[:, :, 0::2] | quads[:, :, 1::2] << 4
    body = quads.transpose(0, 2, 1, 3).reshape(blocks, -1)

    def by_group(values: npt.NDArray[Any]) -> Bytes:
        padded = _pad(values, outputs, groups, 0).reshape(blocks, BLOCK, groups)
        return np.ascontiguousarray(padded.transpose(0, 2, 1)).reshape(blocks, -1).view(np.uint8)

    records = np.concatenate([body, *map(by_group, weights.constants)], axis=1)
    return _pad(records, blocks, _round_up(records.shape[1], PIECE), 0).reshape(-1)


def unpack_up(packed: Bytes, like: Quantized) -> Quantized:
    """The inverse of `pack_up`; only shapes, bits, group and symmetry of `like` are used."""
    (rows, columns), groups = like.codes.shape, like.scales.shape[1]
    inputs, blocks = _round_up(columns, INPUT_STEP), _round_up(rows, BLOCK) // BLOCK
    records = packed.reshape(blocks, -1)
    at = BLOCK * inputs * like.bits // 8
    quads = records[:, :at].reshape(blocks, -1, BLOCK, 4)
    if like.bits == 4:
        quads = np.stack([quads & 15, quads >> 4], axis=2).reshape(blocks, -1, BLOCK, 4)
    codes = quads.transpose(0, 2, 1, 3).reshape(blocks * BLOCK, inputs)[:rows, :columns]

    def rows_of(raw: Bytes, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        values = np.ascontiguousarray(raw).view(dtype).reshape(blocks, groups, BLOCK)
        by_row: npt.NDArray[Any] = values.transpose(0, 2, 1).reshape(-1, groups)[:rows]
        return by_row

    end = at + groups * BLOCK * 2
    zeros = None if like.zeros is None else rows_of(records[:, end : end + groups * BLOCK], np.uint8)
    return replace(like, codes=codes, scales=rows_of(records[:, at:end], np.float16), zeros=zeros)


def pack_down(weights: Quantized) -> Bytes:
    """Records of one group of neurons: a row of outputs for each, scales, zero points. Returns bytes (size,)."""
    outputs, neurons, group = _down_shape(weights)
    rows = _pad(weights.codes, outputs, neurons, weights.symmetric_zero).T
    order = _column_order(outputs, weights.bits)
    body = rows[:, order[0]] | rows[:, order[1]] << 4 if weights.bits == 4 else rows[:, order[0]]
    records = neurons // group
    constants = [_down_constants(values, outputs, records) for values in weights.constants]
    return np.concatenate([body.reshape(records, -1), *constants], axis=1).reshape(-1)


def _down_shape(weights: Quantized) -> tuple[int, int, int]:
    group = MAX_GROUP if weights.group == CHANNEL_WISE else weights.group
    return _round_up(weights.codes.shape[0], OUTPUT_STEP), _round_up(weights.codes.shape[1], group), group


def _down_constants(values: npt.NDArray[Any], outputs: int, records: int) -> Bytes:
    # Channel-wise constants are repeated in every record, so that kernels know one layout only.
    padded = _pad(values, outputs, values.shape[1], 0).T
    return np.ascontiguousarray(np.broadcast_to(padded, (records, outputs))).view(np.uint8)


def unpack_down(packed: Bytes, like: Quantized) -> Quantized:
    """The inverse of `pack_down`; only shapes, bits, group and symmetry of `like` are used."""
    outputs, neurons, group = _down_shape(like)
    true_outputs, true_neurons = like.codes.shape
    records = packed.reshape(neurons // group, -1)
    at = group * outputs * like.bits // 8
    body = records[:, :at].reshape(neurons, -1)
    order = _column_order(outputs, like.bits)
    rows = np.empty((neurons, outputs), np.uint8)
    for part, columns in enumerate(order):
        rows[:, columns] = body >> 4 * part & (1 << like.bits) - 1
    kept = 1 if like.group == CHANNEL_WISE else neurons // group
    end = at + outputs * 2
    scales = np.ascontiguousarray(records[:kept, at:end]).view(np.float16).T[:true_outputs]
    zeros = None if like.zeros is None else records[:kept, end:].T[:true_outputs]
    return replace(like, codes=rows.T[:true_outputs, :true_neurons], scales=scales, zeros=zeros)


def _column_order(outputs: int, bits: int) -> list[npt.NDArray[np.intp]]:
    """Which output every byte of a row holds; for 4 bits in its low and in its high nibble."""
    part, z, d = np.meshgrid(np.arange(4), np.arange(4), np.arange(4), indexing="ij")
    step = PIECE * 8 // bits
    starts = np.arange(0, outputs, step)[:, None]
    low = (starts + (step // 4 * z + 4 * part + d).ravel()).ravel()
    return [low] if bits == 8 else [low, low + 16]


def _round_up(n: int, step: int) -> int:
    return -(-n // step) * step


def _pad(values: npt.NDArray[Any], rows: int, columns: int, fill: int) -> npt.NDArray[Any]:
    shape = (rows - values.shape[0], columns - values.shape[1])
    return np.pad(values, ((0, shape[0]), (0, shape[1])), constant_values=fill) if any(shape) else values
