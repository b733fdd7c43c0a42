"""Work beside the main thread."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["in_background"]


@contextmanager
def in_background(work: Any) -> Iterator[Any]:
    """Run `work(on_bytes)` in a thread; yields a function that waits for its result.

    Leaving the block early stops the work at its next block of bytes.
    """
    stop = threading.Event()
    outcome: dict[str, Any] = {}

    def check(_: int) -> None:
        if stop.is_set():
            raise InterruptedError

    def run() -> None:
        try:
            outcome["result"] = work(check)
        except BaseException as error:
            outcome["error"] = error

    def wait() -> Any:
        thread.join()
        if "error" in outcome:
            raise outcome["error"]
        return outcome["result"]

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield wait
    finally:
        stop.set()
        thread.join()
