"""Packed weights: reversible, and byte for byte those that csrc/test_kernels.cpp packs by its own code."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support.weights import random_weights

from ov_afm.errors import ExtensionError
from ov_afm.kernels import layout
from ov_afm.kernels.layout import CHANNEL_WISE, Quantized

PACKED = Path(__file__).parent / "data" / "packed_layout.bin"


def matrix(outputs: int, inputs: int, bits: int, asymmetric: bool, group: int = 32) -> Quantized:
    """The matrix of the C++ test, which has the same formulas."""
    o, i = np.arange(outputs)[:, None], np.arange(inputs)[None]
    g = np.arange(inputs // group)[None]
    scales = np.asarray(0x1C00 + (3 * o + 5 * g) % 512, np.uint16).view(np.float16)
    zeros = np.asarray((o + 2 * g + 1) % (1 << bits), np.uint8) if asymmetric else None
    return Quantized(np.asarray((7 * o + 13 * i + o * i) % (1 << bits), np.uint8), scales, zeros, bits, group)


def test_packed_bytes_are_those_of_the_file_that_the_cpp_test_reads_too() -> None:
    parts = [
        layout.pack_up(matrix(16, 64, bits=4, asymmetric=False)),
        layout.pack_up(matrix(32, 32, bits=8, asymmetric=True)),
        layout.pack_down(matrix(128, 32, bits=4, asymmetric=True)),
        layout.pack_down(matrix(128, 32, bits=8, asymmetric=False)),
    ]
    assert b"".join(part.tobytes() for part in parts) == PACKED.read_bytes()


def test_a_byte_of_a_record_is_where_the_drawing_says() -> None:
    """`csrc/layout.h`: of int4, the low nibble of byte b of a neuron is input 8i + b, the high one 8i + 4 + b."""
    weights = matrix(16, 64, bits=4, asymmetric=False)
    packed = layout.pack_up(weights)
    neuron, i, b = 5, 3, 2
    byte = packed[64 * i + 4 * neuron + b]
    assert (byte & 15, byte >> 4) == (weights.codes[neuron, 8 * i + b], weights.codes[neuron, 8 * i + 4 + b])


@pytest.mark.parametrize("asym", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", layout.GROUPS)
def test_packing_changes_no_bit(bits: int, group: int, asym: bool) -> None:
    rng = np.random.default_rng(0)
    inputs = 200 if group == CHANNEL_WISE else 3 * group
    w = random_weights(rng, 70, inputs, bits, group, asym)
    assert w.same(layout.unpack_up(layout.pack_up(w), w))
    assert w.same(layout.unpack_down(layout.pack_down(w), w))
    assert not w.same(layout.unpack_up(layout.pack_up(w) ^ 1, w))


@pytest.mark.parametrize("group", [16, 48, 0])
def test_a_group_size_that_no_kernel_takes_is_refused(group: int) -> None:
    with pytest.raises(ExtensionError, match=f"found {group}"):
        Quantized(np.zeros((16, 96), np.uint8), np.ones((16, 6), np.float16), None, 4, group)


def test_a_group_size_that_does_not_divide_the_inputs_is_refused() -> None:
    with pytest.raises(ExtensionError, match="group size 64 does not divide 96 inputs"):
        Quantized(np.zeros((16, 96), np.uint8), np.ones((16, 2), np.float16), None, 4, 64)


def test_nibbles_come_low_half_first_and_an_odd_count_is_cut() -> None:
    raw = np.array([0x21, 0x43, 0xF5], np.uint8)
    assert layout.unpack_int4(raw, (5,)).tolist() == [1, 2, 3, 4, 5]
    assert layout.unpack_int4(raw, (2, 3)).tolist() == [[1, 2, 3], [4, 5, 15]]
