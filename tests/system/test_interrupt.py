"""Work in threads: results, exceptions and an early end."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from ov_afm.system.interrupt import in_background, wait_for


def test_result_and_exception_come_back() -> None:
    assert wait_for(lambda: threading.current_thread() is threading.main_thread()) is False
    with pytest.raises(ZeroDivisionError):
        wait_for(lambda: 1 // 0)
    with pytest.raises(TimeoutError, match="its own"):
        wait_for(lambda: (_ for _ in ()).throw(TimeoutError("its own")))


def test_background_work_runs_beside_the_block() -> None:
    go = threading.Event()

    def work(on_bytes: Callable[[int], None]) -> int:
        assert go.wait(10)
        on_bytes(1)
        return 3

    with in_background(work) as result:
        go.set()
        assert result() == 3


def test_leaving_early_stops_the_work_at_its_next_block() -> None:
    blocks: list[int] = []

    def work(on_bytes: Callable[[int], None]) -> None:
        for number in range(10_000):
            on_bytes(1)
            blocks.append(number)
            time.sleep(0.01)

    with pytest.raises(KeyError), in_background(work):
        raise KeyError
    count = len(blocks)
    assert count < 1000
    time.sleep(0.1)
    assert len(blocks) == count
