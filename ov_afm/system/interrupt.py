"""Work in threads, and Ctrl-C during native work.

Python delivers an interrupt only between its own instructions, and loading a model is one instruction that lasts half
a minute. So long native calls run in a thread while the main thread waits in short steps; and a command that is
interrupted meanwhile exits without unloading, because native libraries crash when they are torn down under a running
thread.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from typing import TypeVar

__all__ = ["in_background", "leave_at_once", "wait_for"]

T = TypeVar("T")
STEP_S = 0.1


def _start(function: Callable[[], T]) -> Future[T]:
    """Call a function in a daemon thread, which no exit of the program waits for."""
    future: Future[T] = Future()

    def work() -> None:
        try:
            future.set_result(function())
        except BaseException as error:  # noqa: BLE001 - raised where the result is read
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return future


def wait_for(function: Callable[[], T]) -> T:
    """Call a function in a thread and wait so that Ctrl-C is noticed; its exceptions are raised here.

    After a Ctrl-C the thread continues until the function returns.
    """
    future = _start(function)
    while not future.done():
        wait([future], STEP_S)
    return future.result()


@contextmanager
def in_background(work: Callable[[Callable[[int], None]], T]) -> Iterator[Callable[[], T]]:
    """Run `work(on_bytes)` in a thread; yields a function that waits for its result.

    Leaving the block early stops the work at its next block of bytes.
    """
    stop = threading.Event()

    def on_bytes(_: int) -> None:
        if stop.is_set():
            raise InterruptedError

    future = _start(lambda: work(on_bytes))
    try:
        yield future.result
    finally:
        stop.set()
        wait([future])


@contextmanager
def leave_at_once() -> Iterator[None]:
    """Make Ctrl-C inside the block end the process with status 130 and one line, whatever native code is doing."""
    try:
        yield
    except KeyboardInterrupt:
        with suppress(OSError):
            sys.stdout.flush()
            print("\nov-afm: interrupted", file=sys.stderr, flush=True)
        os._exit(130)
