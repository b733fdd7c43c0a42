"""The ceiling of decoding: how fast memory can be read, and how much of it one token needs.

To decode a token every weight is read once, and the keys and values of all tokens before it. So no
dense engine can be faster than read bandwidth divided by those bytes; what share of that a run
reaches says how much an engine leaves on the table. Only skipping weights goes past it.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

__all__ = ["kv_bytes_per_token", "read_bandwidth", "weight_bytes_per_token"]

BUFFER_BYTES = 512 << 20
SECONDS = 1.0
# What lies between a stored table and the Gather that looks rows up in it.
_DECOMPRESSION = {"Convert", "Subtract", "Multiply", "Reshape"}


def read_bandwidth(threads: int, *, buffer_bytes: int = BUFFER_BYTES, seconds: float = SECONDS) -> float:
    """Bytes that this machine reads from memory each second; the best pass of several.

    Each thread sums a part of a buffer far larger than the caches, with numpy, which releases the
    interpreter's lock meanwhile.

    Args:
        threads: Threads that read at once.
        buffer_bytes: Size of the buffer.
        seconds: How long to go on.
    """
    import numpy as np

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

    model = openvino.Core().read_model(model_dir / "openvino_model.xml")
    operations = model.get_ordered_ops()
    total = sum(_size(op) for op in operations if _constant(op))
    looked_up: dict[str, int] = {}
    for op in operations:
        if op.get_type_name() == "Gather":
            looked_up |= _tables(op.input_value(0).get_node())
    return int(total - sum(looked_up.values()))


def _constant(op: Any) -> bool:
    return bool(op.get_type_name() == "Constant")


def _size(op: Any) -> int:
    elements = 1
    for length in op.get_output_shape(0):
        elements *= int(length)
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
    found: dict[str, int] = {}
    for value in node.input_values():
        found |= _tables(value.get_node())
    return found


def kv_bytes_per_token(geometry: dict[str, Any], context_tokens: int, element_bytes: float) -> int:
    """Bytes of KV cache that decoding one token reads.

    Args:
        geometry: The manifest's geometry.
        context_tokens: Tokens before it.
        element_bytes: Bytes that a key or value takes in the cache, scales included.
    """
    row = 2 * geometry["layers"] * geometry["kv_heads"] * geometry["head_dim"]
    return int(row * element_bytes * context_tokens)
