"""The ceiling of decoding: how fast memory can be read, and how much of it one token needs.

To decode a token every weight is read once, and the keys and values of all tokens before it. So no
dense engine can be faster than read bandwidth divided by those bytes; the share of it that a run
reaches shows how much speed is left to gain. Only an engine that skips weights can exceed it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..model_dir.manifest import MODEL_XML

__all__ = ["Ceiling", "measure_ceiling", "read_bandwidth", "weight_bytes_per_token"]

BUFFER_BYTES = 512 << 20
SECONDS = 1.0
# Operations that lie between a stored table and the Gather that looks rows up in it.
_DECOMPRESSION = {"Convert", "Subtract", "Multiply", "Reshape"}


@dataclass(frozen=True, slots=True)
class Ceiling:
    """What bounds decoding on this machine.

    Attributes:
        bandwidth: Bytes that memory gives each second.
        threads: Threads that read.
        weight_bytes: Name of each model to the bytes of weights that it reads for a token.
    """

    bandwidth: float
    threads: int
    weight_bytes: Mapping[str, int]


def measure_ceiling(threads: int, models: Mapping[str, Path]) -> Ceiling:
    """Measure memory and models; run it in a child process, so that the buffer is freed with it.

    Args:
        threads: Threads that read at once.
        models: Name to model directory.
    """
    weight_bytes = {name: weight_bytes_per_token(folder) for name, folder in models.items()}
    return Ceiling(read_bandwidth(threads), threads, weight_bytes)


def read_bandwidth(threads: int, *, buffer_bytes: int = BUFFER_BYTES, seconds: float = SECONDS) -> float:
    """Bytes that this machine reads from memory each second; the best pass of several.

    Each thread sums a part of a buffer far larger than the caches, with numpy, which releases the
    interpreter's lock meanwhile.

    Args:
        threads: Threads that read at once.
        buffer_bytes: Size of the buffer.
        seconds: How long to repeat it.
    """
    buffer = np.ones(buffer_bytes // 8, np.uint64)
    parts = np.array_split(buffer, threads)
    best = 0.0
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(np.add.reduce, parts))
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            begin = time.perf_counter()
            list(pool.map(np.add.reduce, parts))
            best = max(best, buffer.nbytes / (time.perf_counter() - begin))
    return best


def weight_bytes_per_token(model_dir: Path) -> int:
    """Bytes of weights that decoding one token reads.

    All constants of the model but the embedding table, of which one row is looked up; where the head
    shares that table it is read in full.

    Args:
        model_dir: A model directory.
    """
    import openvino

    operations = openvino.Core().read_model(model_dir / MODEL_XML).get_ordered_ops()
    total = sum(_size(op) for op in operations if _constant(op))
    looked_up: dict[str, int] = {}
    for op in operations:
        if op.get_type_name() == "Gather":
            looked_up |= _tables(op.input_value(0).get_node())
    return total - sum(looked_up.values())


def _constant(op: Any) -> bool:
    return bool(op.get_type_name() == "Constant")


def _size(op: Any) -> int:
    elements = math.prod(map(int, op.get_output_shape(0)))
    # 4-bit elements are packed two a byte.
    return -(-elements * int(op.get_output_element_type(0).bitwidth) // 8)


def _tables(node: Any) -> dict[str, int]:
    """Constants that only the lookup above `node` reads: name to bytes."""
    if len(node.output(0).get_target_inputs()) != 1:
        return {}
    if _constant(node):
        return {node.get_friendly_name(): _size(node)}
    if node.get_type_name() not in _DECOMPRESSION:
        return {}
    tables: dict[str, int] = {}
    for value in node.input_values():
        tables |= _tables(value.get_node())
    return tables
