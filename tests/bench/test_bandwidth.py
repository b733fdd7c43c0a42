"""What bounds decoding: memory bandwidth and the bytes of a token."""

from __future__ import annotations

import itertools
import time
from pathlib import Path

import numpy as np
import pytest

from ov_afm.bench.bandwidth import read_bandwidth, weight_bytes_per_token


def test_bandwidth_is_that_of_a_plain_sum() -> None:
    buffer, best_s = np.ones(8 << 20, np.uint64), 1.0
    end = time.perf_counter() + 0.5
    while time.perf_counter() < end:
        begin = time.perf_counter()
        np.add.reduce(buffer)
        best_s = min(best_s, time.perf_counter() - begin)
    expected = buffer.nbytes / best_s
    # A busy machine may make a factor of several; a pass that does not read the buffer would make one of thousands.
    assert expected / 16 < read_bandwidth(1, buffer_bytes=buffer.nbytes, seconds=0.5) < expected * 16


def test_bandwidth_is_the_whole_buffer_by_the_time_of_a_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = itertools.count()
    monkeypatch.setattr(time, "perf_counter", lambda: next(ticks) / 8)
    # Each pass takes one tick of an eighth of a second, however many threads share it.
    assert read_bandwidth(2, buffer_bytes=1 << 20, seconds=1.0) == 8 << 20


def test_weights_of_a_token_leave_out_the_looked_up_table(tiny_model: Path) -> None:
    size = (tiny_model / "openvino_model.bin").stat().st_size
    assert size - 512 * 67 - 2048 < weight_bytes_per_token(tiny_model) < size - 512 * 64
