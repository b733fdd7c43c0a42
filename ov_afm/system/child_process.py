"""Run a function in a child process that can die without taking the program along.

Drivers crash while they are probed, converters run out of memory, native code ignores Ctrl-C. Whatever can do that
runs here. Two forms share one protocol, pickled messages on the child's standard input and output:

- `run_in_child(function, ...)` calls a function once and returns its result.
- `WorkerProcess(function, ...)` starts a function that answers messages until it is closed, such as a loaded model.

Whatever the child or its libraries print goes to a log. The child ends with its parent, because it watches the pipe
that the parent holds open.

    report = run_in_child(self_test.answers, model_dir, device="GPU")
    report = ChildProcess(log=path, timeout_s=60).run(devices.enumerate_devices)
"""

from __future__ import annotations

import contextlib
import os
import pickle
import queue
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Concatenate, ParamSpec, TypeVar

from .. import errors
from .telemetry import silence

__all__ = ["Channel", "ChildDied", "ChildProcess", "Progress", "Step", "WorkerProcess", "emit", "run_in_child"]

P = ParamSpec("P")
T = TypeVar("T")
# torch would fork a pool of compiler processes when it is imported; nothing here compiles with it.
CHILD_ENV = {"PYTHONUNBUFFERED": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
MAIN = "from ov_afm.system import child_process; child_process._main()"
LENGTH = struct.Struct(">Q")
LOG_TAIL_BYTES = 4000
CLOSE_S = 2.0


class ChildDied(errors.OVAFMError):
    """The child ended without an answer: killed, crashed, or out of time.

    Attributes:
        returncode: Exit status; negative for the signal that ended it; None after a time-out.
        log_tail: The last lines that it printed.
    """

    default_code = "child-died"

    def __init__(self, message: str, returncode: int | None = None, log_tail: str = "") -> None:
        """Keep what is known of the death."""
        super().__init__(message)
        self.returncode = returncode
        self.log_tail = log_tail


@dataclass(frozen=True, slots=True)
class Step:
    """A child begins a step of its work.

    Attributes:
        name: The step, as the child calls it.
    """

    name: str


@dataclass(frozen=True, slots=True)
class Progress:
    """How far the current step of a child is.

    Attributes:
        done: Units done.
        total: Units in all; 0 where that is not known.
        name: The step, where the child names it.
    """

    done: float
    total: float
    name: str = ""


@dataclass(frozen=True, slots=True)
class _Call:
    """What the parent asks of a new child."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    worker: bool


@dataclass(frozen=True, slots=True)
class _Event:
    """Something that the child tells while it works."""

    value: Any


@dataclass(frozen=True, slots=True)
class _Result:
    """What the function returned."""

    value: Any


@dataclass(frozen=True, slots=True)
class _Failure:
    """What the function raised: an error of ov_afm's as it is, anything else as text."""

    error: errors.OVAFMError | None
    message: str = ""
    traceback: str = ""


class Channel:
    """Both directions of a pipe to the other process; messages are pickled objects with a length in front.

    Args:
        incoming: Stream to read from.
        outgoing: Stream to write to.
    """

    def __init__(self, incoming: IO[bytes], outgoing: IO[bytes]) -> None:
        self._incoming, self._outgoing = incoming, outgoing
        # Messages come from several threads; each must stay whole.
        self._lock = threading.Lock()

    @property
    def descriptor(self) -> int:
        """The file descriptor that is read from."""
        return self._incoming.fileno()

    def send(self, message: object) -> None:
        """Write a message.

        Raises:
            OSError: The other process has gone.
        """
        body = pickle.dumps(message)
        with self._lock:
            self._outgoing.write(LENGTH.pack(len(body)) + body)
            self._outgoing.flush()

    def __iter__(self) -> Iterator[Any]:
        """Messages until the other process closes the pipe, or dies in the middle of one."""
        while len(header := self._incoming.read(LENGTH.size)) == LENGTH.size:
            (size,) = LENGTH.unpack(header)
            if len(body := self._incoming.read(size)) < size:
                return
            yield pickle.loads(body)


_channel: Channel | None = None


def emit(event: object) -> None:
    """Send an event to the parent's `on_event`; does nothing outside a child."""
    if _channel is not None:
        _channel.send(_Event(event))


def _spawn(call: _Call, output: IO[bytes], env: Mapping[str, str]) -> tuple[subprocess.Popen[bytes], Channel]:
    """Start a child and hand it its call."""
    process = subprocess.Popen(
        [sys.executable, "-c", MAIN],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=output,
        env={**os.environ, **CHILD_ENV, **env},
        # A Ctrl-C of the terminal is the parent's to handle.
        start_new_session=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    channel = Channel(process.stdout, process.stdin)
    with contextlib.suppress(BrokenPipeError):
        channel.send(call)
    return process, channel


def _reap(process: subprocess.Popen[bytes]) -> None:
    """Wait for a child, then end what it started and left behind, which would hold its pipe open."""
    process.wait()
    if sys.platform != "win32":
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)


def describe_exit(returncode: int) -> str:
    """How a process ended, for people."""
    if returncode >= 0:
        return f"ended with status {returncode}"
    name = signal.Signals(-returncode).name
    return f"was ended by {name}{' (out of memory?)' if name == 'SIGKILL' else ''}"


@dataclass(frozen=True, slots=True)
class ChildProcess:
    """How to run a function in a child process.

    Attributes:
        log: File to which all that the child prints is appended; a temporary one if None.
        on_event: Called for each `emit` of the child, in the calling thread.
        timeout_s: Seconds after which the child is killed.
        env: Environment variables to add or change.
        died: Raise this instead of `ChildDied`, with the log's name in the message.
    """

    log: Path | None = None
    on_event: Callable[[Any], None] | None = None
    timeout_s: float | None = None
    env: Mapping[str, str] = field(default_factory=dict)
    died: type[errors.OVAFMError] | None = None

    def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call a function of a module; arguments, events and result must be picklable.

        Returns:
            What the function returned.

        Raises:
            ChildDied: The child crashed, was killed or ran out of time.
            OVAFMError: Whatever the function raised from ov_afm's tree.
            RuntimeError: Any other exception of the function, with its traceback as text.
        """
        with self.log.open("ab") if self.log else tempfile.TemporaryFile() as output:
            answer, process, late = self._converse(_Call(function, args, kwargs, worker=False), output)
            if answer is None:
                raise self._death(function, process.returncode, _tail(output, self.log), late=late)
        if isinstance(answer, _Failure):
            raise answer.error or RuntimeError(f"{answer.message}\n\n{answer.traceback}")
        result: T = answer.value
        return result

    def _converse(
        self, call: _Call, output: IO[bytes]
    ) -> tuple[_Result | _Failure | None, subprocess.Popen[bytes], bool]:
        """Run the child to its end; returns its answer, the process, and whether it ran out of time."""
        process, channel = _spawn(call, output, self.env)
        late = threading.Event()

        def end() -> None:
            late.set()
            process.kill()

        timer = threading.Timer(self.timeout_s, end) if self.timeout_s else None
        if timer:
            timer.daemon = True
            timer.start()
        reaper = threading.Thread(target=_reap, args=(process,), daemon=True)
        reaper.start()
        answer: _Result | _Failure | None = None
        try:
            for message in channel:
                if isinstance(message, _Event):
                    if self.on_event:
                        self.on_event(message.value)
                else:
                    answer = message
                    break
        finally:
            if timer:
                timer.cancel()
            if answer is None:
                process.kill()
            reaper.join()
            for pipe in (process.stdin, process.stdout):
                if pipe:
                    with contextlib.suppress(BrokenPipeError):
                        pipe.close()
        return answer, process, late.is_set()

    def _death(self, function: Callable[..., Any], returncode: int, tail: str, *, late: bool) -> errors.OVAFMError:
        step = function.__name__.strip("_").replace("_", " ")
        if late:
            death = ChildDied(f"{step}: no answer within {self.timeout_s:g} s", None, tail)
        else:
            how = describe_exit(returncode)
            unanswered = " and no answer" if returncode >= 0 else ""
            death = ChildDied(f"{step}: the process {how}{unanswered}", returncode, tail)
        if self.died is None:
            return death
        error = self.died(f"{death}; its messages are in {self.log}" if self.log else str(death))
        error.__cause__ = death
        return error


def run_in_child(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call a function in a child process with no options; see `ChildProcess.run`."""
    return ChildProcess().run(function, *args, **kwargs)


def _tail(output: IO[bytes], log: Path | None) -> str:
    if log:
        return log.read_bytes()[-LOG_TAIL_BYTES:].decode("utf-8", "replace").strip()
    output.seek(0)
    return output.read()[-LOG_TAIL_BYTES:].decode("utf-8", "replace").strip()


class WorkerProcess:
    """A child process that answers messages until it is closed.

    The function runs in the child with a `Channel` as its first argument and ends the process when it returns. The
    callbacks are called in a thread of their own.

    Args:
        function: What runs in the child.
        *args: Its further arguments.
        on_message: Takes each message of the child.
        on_exit: Takes the exit status, once, when the process has ended and its last message was taken.
        log: File to which all that the child prints is appended; the parent's standard error if None.
        **kwargs: Keyword arguments of the function.
    """

    def __init__(
        self,
        function: Callable[Concatenate[Channel, ...], None],
        *args: Any,
        on_message: Callable[[Any], None],
        on_exit: Callable[[int], None],
        log: Path | None = None,
        **kwargs: Any,
    ) -> None:
        call = _Call(function, args, kwargs, worker=True)
        with log.open("ab") if log else contextlib.nullcontext(sys.stderr.buffer) as output:
            self._process, self._channel = _spawn(call, output, {})
        self._on_message, self._on_exit = on_message, on_exit
        # A child that does not read must not stop the thread that sends.
        self._outgoing: queue.SimpleQueue[object | None] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        threading.Thread(target=self._write, daemon=True).start()
        threading.Thread(target=_reap, args=(self._process,), daemon=True).start()

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    def send(self, message: object) -> None:
        """Hand a message to the child; returns at once, and loses it if the child has gone."""
        self._outgoing.put(message)

    def close(self, timeout_s: float = CLOSE_S) -> None:
        """Close the pipe, which ends the child; kill it if it does not end in time."""
        self._outgoing.put(None)
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.kill()

    def kill(self) -> None:
        """End the process at once."""
        self._process.kill()
        self._process.wait()

    def _write(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            while (message := self._outgoing.get()) is not None:
                self._channel.send(message)
        with contextlib.suppress(OSError):
            assert self._process.stdin is not None
            self._process.stdin.close()

    def _read(self) -> None:
        for message in self._channel:
            self._on_message(message)
        status = self._process.wait()
        self._outgoing.put(None)
        self._on_exit(status)


# -- In the child process


def _watch_parent(descriptor: int) -> None:
    # The parent never writes again: the read returns when the parent is gone. Not through `sys.stdin`, whose
    # lock would be held for good: a process forked from here (telemetry does) closes it and would wait forever.
    os.read(descriptor, 1)
    os._exit(1)


def _main() -> None:
    """Take the call from standard input, make it, and answer."""
    global _channel
    silence()
    # The pipes stay ours: native code that writes to descriptor 1 writes to the log, and a process forked from
    # here closes a `sys.stdin` that no thread is reading.
    _channel = Channel(os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb"))
    os.dup2(2, 1)
    with Path(os.devnull).open("rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    status, worker = 0, False
    try:
        call = next(iter(_channel))
        worker = call.worker
        if worker:
            call.function(_channel, *call.args, **call.kwargs)
        else:
            threading.Thread(target=_watch_parent, args=(_channel.descriptor,), daemon=True).start()
            _channel.send(_Result(call.function(*call.args, **call.kwargs)))
    except Exception as error:
        traceback.print_exc()
        status = 1
        if not worker:
            known = error if isinstance(error, errors.OVAFMError) else None
            _channel.send(_Failure(known, f"{type(error).__name__}: {error}", traceback.format_exc()))
    # Native libraries may hang or crash while they are unloaded; the answer is already out.
    sys.stderr.flush()
    os._exit(status)
