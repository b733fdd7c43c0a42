"""Run one function in a child process that can die without taking the program along.

Drivers crash while they are probed, converters run out of memory, native code ignores Ctrl-C.
Whatever can do that runs here: the child gets a function's name and JSON arguments on its standard
input, and answers in JSON lines on a pipe of its own. What it or its libraries print goes to a log.
The child dies with its parent, because it watches the pipe that the parent holds open.

    value = supervise.run("ov_afm.runtime.devices:_enumerate", log=path, timeout_s=60)
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

from .. import errors
from .telemetry import silence

__all__ = ["ChildDied", "emit", "run"]

Event = dict[str, Any]
# torch would fork a pool of compiler processes when it is imported; nothing here compiles with it.
CHILD_ENV = {"PYTHONUNBUFFERED": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
_channel: IO[str] | None = None
# Events come from several threads; a line must stay one line.
_channel_lock = threading.Lock()


class ChildDied(errors.OVAFMError):
    """The child ended without an answer: killed, crashed, or out of time.

    Attributes:
        returncode: Exit status; negative for the signal that ended it; None after a time-out.
        log_tail: The last lines that it printed.
    """

    def __init__(self, message: str, returncode: int | None, log_tail: str) -> None:
        """Keep what is known of the death."""
        super().__init__(message)
        self.returncode = returncode
        self.log_tail = log_tail


def emit(event: str, **fields: Any) -> None:
    """Send an event to the parent's `on_event`; does nothing outside a child."""
    if _channel is not None:
        _send(_channel, {"event": event, **fields})


def _send(channel: IO[str], message: Event) -> None:
    with _channel_lock:
        channel.write(json.dumps(message) + "\n")
        channel.flush()


def run(
    target: str,
    arguments: Mapping[str, Any] | None = None,
    *,
    log: Path | None = None,
    on_event: Callable[[Event], None] | None = None,
    timeout_s: float | None = None,
    env: Mapping[str, str] | None = None,
    died: type[errors.OVAFMError] | None = None,
) -> Any:
    """Call `module:function` with keyword arguments in a child process.

    Args:
        target: `module:function`; arguments and result must be JSON values.
        arguments: Keyword arguments.
        log: File to which all that the child prints is appended; a temporary one if None.
        on_event: Called for each `emit` of the child, in this thread.
        timeout_s: Seconds after which the child is killed.
        env: Environment variables to add or change.
        died: Raise this instead of `ChildDied`, with the log's name in the message.

    Returns:
        What the function returned.

    Raises:
        ChildDied: The child crashed, was killed or ran out of time.
        OVAFMError: Whatever the function raised from ov_afm's tree, as the same class.
        RuntimeError: Any other exception of the function, with its traceback as text.
    """
    with contextlib.ExitStack() as stack:
        output: IO[bytes] = (
            stack.enter_context(log.open("ab")) if log else stack.enter_context(tempfile.TemporaryFile())
        )
        child = subprocess.Popen(
            [sys.executable, "-m", "ov_afm.system.child_process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=output,
            env={**os.environ, **CHILD_ENV, **(env or {})},
            encoding="utf-8",
            # A Ctrl-C of the terminal is the parent's to handle; it kills the child.
            start_new_session=True,
        )
        late = threading.Event()

        def end() -> None:
            late.set()
            child.kill()

        timer = threading.Timer(timeout_s, end) if timeout_s else None
        if timer:
            timer.daemon = True
            timer.start()
        # A grandchild that outlives the child would hold our pipe open for ever.
        reaper = threading.Thread(target=_reap, args=(child,), daemon=True)
        reaper.start()
        answer: Event | None = None
        try:
            assert child.stdin is not None
            assert child.stdout is not None
            with contextlib.suppress(BrokenPipeError):
                child.stdin.write(json.dumps({"target": target, "arguments": dict(arguments or {})}) + "\n")
                child.stdin.flush()
            for line in child.stdout:
                if not line.endswith("\n"):
                    break  # the child died while it wrote
                message = json.loads(line)
                if "event" in message:
                    if on_event:
                        on_event(message)
                else:
                    answer = message
                    break
        finally:
            if timer:
                timer.cancel()
            if answer is None:
                child.kill()
            reaper.join()
            for pipe in (child.stdin, child.stdout):
                if pipe:
                    with contextlib.suppress(BrokenPipeError):
                        pipe.close()
        if answer is None:
            death = _death(target, child.returncode, timeout_s if late.is_set() else None, _tail(output, log))
            if died is None:
                raise death
            raise died(f"{death}; its messages are in {log}" if log else str(death)) from death
        if "error" in answer:
            raise _revive(answer["error"])
        return answer["result"]


def _reap(child: subprocess.Popen[str]) -> None:
    """Wait for a child, then end whatever it started and left behind."""
    child.wait()
    if sys.platform != "win32":
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child.pid, signal.SIGKILL)


def _tail(output: IO[bytes], log: Path | None) -> str:
    if log:
        data = log.read_bytes()[-4000:]
    else:
        output.seek(0)
        data = output.read()[-4000:]
    return data.decode("utf-8", "replace").strip()


def _death(target: str, returncode: int, timeout_s: float | None, tail: str) -> ChildDied:
    step = target.partition(":")[2].strip("_").replace("_", " ")
    if timeout_s:
        return ChildDied(f"{step}: no answer within {timeout_s:g} s", None, tail)
    if returncode < 0:
        name = signal.Signals(-returncode).name
        hint = " (out of memory?)" if name == "SIGKILL" else ""
        return ChildDied(f"{step}: the process was ended by {name}{hint}", returncode, tail)
    return ChildDied(f"{step}: the process ended with status {returncode} and no answer", returncode, tail)


def _revive(error: Event) -> Exception:
    kind = getattr(errors, error["kind"], None)
    if isinstance(kind, type) and issubclass(kind, errors.OVAFMError):
        return kind(error["message"])
    return RuntimeError(f"{error['message']}\n\n{error['traceback']}")


def _watch_parent(descriptor: int) -> None:
    # The parent never writes again: the read returns when the parent is gone. Not through `sys.stdin`, whose
    # lock would be held for good: a process forked from here (telemetry does) closes it and would wait forever.
    os.read(descriptor, 1)
    os._exit(1)


def _main() -> None:
    global _channel
    silence()
    request = json.loads(sys.stdin.readline())
    # The pipe stays ours; whatever native code writes to descriptor 1 goes to the log.
    _channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    threading.Thread(target=_watch_parent, args=(sys.stdin.fileno(),), daemon=True).start()
    module, _, name = request["target"].partition(":")
    answer: Event
    try:
        answer = {"result": getattr(importlib.import_module(module), name)(**request["arguments"])}
    except Exception as error:
        traceback.print_exc()
        kind = type(error).__name__ if isinstance(error, errors.OVAFMError) else "RuntimeError"
        message = str(error) if isinstance(error, errors.OVAFMError) else f"{type(error).__name__}: {error}"
        answer = {"error": {"kind": kind, "message": message, "traceback": traceback.format_exc()}}
    _send(_channel, answer)
    # Native libraries may hang or crash while they are unloaded; the answer is already out.
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    # `-m` made this module `__main__`; targets import it as `ov_afm.system.child_process`, which must be the same.
    from . import child_process

    child_process._main()
