"""Where Gradio is changed behind its back, and what would make each change unnecessary.

Found necessary up to Gradio 6.31. `tests/chat/test_gradio_patches.py` fails when one of them has nothing to change any
more.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["SILENCE_ABORTS", "no_stubs", "poll_less"]

QUEUE_POLL_S = 0.02
# A page that is being left aborts its own connections, and Gradio reports each as an error on the console, where it
# would hide real ones. No upstream issue is known; ends when Gradio's client ignores `AbortError` after `pagehide`.
SILENCE_ABORTS = """() => {
  const report = console.error;
  let left = false;
  console.error = (...parts) => { left ||= parts[0]?.name === 'AbortError'; if (!left) report(...parts); };
}"""


@contextmanager
def no_stubs() -> Iterator[None]:
    """Keep `import gradio` from writing type stubs into its own folder, which is half the time that it takes.

    Gradio leaves out classes whose source file is not known. Ends when it ships its stubs and does not make them at
    import; https://github.com/gradio-app/gradio/issues/13781 and /7791 are about them and about the time of importing.
    """
    getfile = inspect.getfile

    def unknown_for_gradio(subject: Any) -> str:
        if isinstance(subject, type) and subject.__module__.startswith("gradio."):
            raise OSError
        return getfile(subject)

    inspect.getfile = unknown_for_gradio  # type: ignore[assignment]
    try:
        yield
    finally:
        inspect.getfile = getfile


def poll_less(blocks: Any) -> None:
    """Make a page's queue look for work 50 times a second instead of 1,000 times, which takes 9% of a core.

    Ends when the queue waits for work instead of polling, or has a parameter for it; no upstream issue is known.
    """
    blocks._queue.sleep_when_free = QUEUE_POLL_S
