"""Work beside the main thread, and bars for the steps of a child process."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from . import console

__all__ = ["StepBars", "in_background"]


class StepBars:
    """Draws a bar for each step that a child reports, with bytes where it reports them.

    Args:
        progress: Where to draw.
        names: What people read for each step.
    """

    def __init__(self, progress: console.Progress, names: Mapping[str, str]) -> None:
        self.progress, self.names, self.stack = progress, names, ExitStack()
        self.advance: Any = None

    def __enter__(self) -> StepBars:
        """Begin with no bar."""
        return self

    def __exit__(self, *exc: Any) -> None:
        """End the last bar."""
        self.stack.close()

    def __call__(self, event: dict[str, Any]) -> None:
        """Take an event: `step` with its name, or `bytes` with `done` and `total`."""
        if event["event"] == "step":
            self.stack.close()
            unit = "B" if event["name"] == "converting" else ""
            self.advance = self.stack.enter_context(self.progress.step(self.names[event["name"]], unit=unit))
        elif event.get("total"):
            self.advance(to=event["done"], total=event["total"])


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
