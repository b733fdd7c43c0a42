"""What bounds decoding: memory bandwidth and the bytes of a token."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest

from ov_afm.bench.bandwidth import read_bandwidth, weight_bytes_per_token


def test_bandwidth_is_that_of_a_plain_sum() -> None:
    buffer = np.ones(8 << 20, np.uint64)
    seconds = []
    for _ in range(10):
        begin = time.perf_counter()
        np.add.reduce(buffer)
        seconds.append(time.perf_counter() - begin)
    expected = buffer.nbytes / min(seconds)
    # Bits for bytes would be a factor of 8, milliseconds for seconds of 1000; a busy machine makes less than 4.
    assert expected / 4 < read_bandwidth(1, buffer_bytes=buffer.nbytes, seconds=0.3) < expected * 4


def test_weights_of_a_token_leave_out_the_looked_up_table(tiny_model: Path) -> None:
    size = (tiny_model / "openvino_model.bin").stat().st_size
    assert size - 512 * 67 - 2048 < weight_bytes_per_token(tiny_model) < size - 512 * 64
