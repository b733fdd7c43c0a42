"""Ctrl-C during native work.

Python delivers an interrupt only between its own instructions, and loading a model is one
instruction that lasts half a minute. So long native calls run in a thread while the main thread
waits in short steps; and a command that is interrupted meanwhile leaves without unloading, because
native libraries crash when they are torn down under a running thread.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

__all__ = ["leave_at_once", "wait_for"]

T = TypeVar("T")
STEP_S = 0.1


def wait_for(function: Callable[[], T]) -> T:
    """Call a function in a thread and wait so that Ctrl-C is heard; its exceptions are raised here.

    After a Ctrl-C the thread goes on by itself until it is done.
    """
    result: list[T] = []
    failure: list[BaseException] = []

    def work() -> None:
        try:
            result.append(function())
        except BaseException as error:  # noqa: BLE001 - handed on below
            failure.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(STEP_S)
    if failure:
        raise failure[0]
    return result[0]


@contextmanager
def leave_at_once() -> Iterator[None]:
    """Make Ctrl-C inside the block end the process with status 130 and one line, whatever native code is doing."""
    try:
        yield
    except KeyboardInterrupt:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            print("\nov-afm: interrupted", file=sys.stderr, flush=True)
        os._exit(130)
