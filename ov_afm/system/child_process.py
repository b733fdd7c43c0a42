"""Run a function in a child process that can die without taking the program along.

Drivers crash while they are probed, converters run out of memory, native code ignores Ctrl-C. Whatever can do that
runs here. Two forms share one protocol, pickled messages with a length in front:

- `run_in_child(function, ...)` calls a function once and returns its result.
- `WorkerProcess(function, ...)` starts a function that answers messages until it is closed, such as a loaded model.

Whatever the child or its libraries print goes to a log. The child ends with its parent, because it reads from a pipe
that the parent holds open, and it takes with it what it started itself.

    answers = run_in_child(self_test.answers, model_dir, "GPU", {}, prompts)
    devices = ChildProcess(log=path, timeout_s=60).run(enumerate_devices, ["GPU"])
"""

from __future__ import annotations

import contextlib
import io
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
from typing import IO, Any, Concatenate, ParamSpec, TypeVar, cast

from .. import errors
from . import control_groups
from .telemetry import silence

__all__ = ["Channel", "ChildDied", "ChildProcess", "Exit", "Progress", "Step", "WorkerProcess", "emit", "run_in_child"]

P = ParamSpec("P")
T = TypeVar("T")
# torch would fork a pool of compiler processes when it is imported; nothing here compiles with it.
CHILD_ENV = {"PYTHONUNBUFFERED": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
# The pipe leaves descriptors 0 and 1 before anything is imported: what Python or native code prints goes to the log.
# The parent's module path replaces the child's own, which begins with the current folder and any `queue.py` in it.
MAIN = (
    "import os, sys; sys.path[:] = sys.argv[1:]; del sys.argv[1:]; pipe = os.dup(0), os.dup(1); os.dup2(2, 1); "
    "os.dup2(os.open(os.devnull, os.O_RDONLY), 0); from ov_afm.system import child_process; "
)
LENGTH = struct.Struct(">Q")
LOG_TAIL_BYTES = 4000
# A body without bytes ends the messages to a worker.
CLOSE = b""
BLOCK_BYTES = 1 << 16
KILL = 9  # SIGKILL, which Windows lacks
CLOSE_S = 2.0


class ChildDied(errors.OVAFMError):
    """The child ended without an answer: killed, crashed, or out of time.

    Attributes:
        returncode: Exit status; negative for the signal that ended it; None after a time-out.
        log_tail: The last lines that it printed.
    """

    default_code = "child-died"

    def __init__(
        self, message: str, returncode: int | None = None, log_tail: str = "", *, code: str | None = None
    ) -> None:
        """Keep how the child ended."""
        super().__init__(message, code=code)
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
class _Event:
    """Something that the child tells while it works."""

    value: Any


@dataclass(frozen=True, slots=True)
class _Result:
    """What the function returned."""

    value: Any


@dataclass(frozen=True, slots=True)
class _Failure:
    """What the function raised: an error of ov_afm's or of the operating system as it is, anything else as text."""

    error: errors.OVAFMError | OSError | None
    message: str = ""
    traceback: str = ""


class _Pipe:
    """Both directions of a pipe between two processes, for bodies of any size.

    Unbuffered: a buffered stream has a lock, which a process forked while another thread reads would wait for.

    Args:
        incoming: Stream to read from.
        outgoing: Stream to write to.
    """

    def __init__(self, incoming: IO[bytes], outgoing: IO[bytes]) -> None:
        self.incoming, self.outgoing = incoming, outgoing
        # Messages come from several threads; each must stay whole.
        self._lock = threading.Lock()

    def write(self, body: bytes) -> None:
        """Write a body.

        Raises:
            OSError: The other process has gone.
        """
        rest = memoryview(LENGTH.pack(len(body)) + body)
        with self._lock:
            while rest:
                rest = rest[self.outgoing.write(rest) :]

    def read(self) -> bytes | None:
        """The next body; None once the other process has closed the pipe, or died in the middle of a body."""
        header = self._exactly(LENGTH.size)
        return None if header is None else self._exactly(*LENGTH.unpack(header))

    def _exactly(self, size: int) -> bytes | None:
        parts = []
        while size:
            part = self.incoming.read(min(size, BLOCK_BYTES))
            if not part:
                return None
            parts.append(part)
            size -= len(part)
        return b"".join(parts)


class Channel:
    """The parent, as the function of a `WorkerProcess` meets it: iterate over its messages, and send it others."""

    def __init__(self, pipe: _Pipe) -> None:
        self._pipe = pipe
        self._inbox: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        threading.Thread(target=self._listen, daemon=True).start()

    def send(self, message: object) -> None:
        """Send a message, which must be picklable; from any thread.

        Raises:
            OSError: The parent has gone.
        """
        self._pipe.write(pickle.dumps(message))

    def __iter__(self) -> Iterator[Any]:
        """Messages of the parent until it closes the worker."""
        while body := self._inbox.get():
            yield pickle.loads(body)
        self._inbox.put(CLOSE)

    def _listen(self) -> None:
        while (body := self._pipe.read()) is not None:
            self._inbox.put(body)
            if body == CLOSE:
                return
        # The parent died, whatever this process is doing.
        os._exit(1)


_channel: Channel | None = None


def emit(event: object) -> None:
    """Send an event to the parent's `on_event`; does nothing outside a child of `ChildProcess`."""
    if _channel is not None:
        _channel.send(_Event(event))


@dataclass(frozen=True, slots=True)
class Exit:
    """How a child process ended.

    Attributes:
        status: Exit status; negative for the signal that ended it.
        out_of_memory: The kernel killed it for memory.
    """

    status: int
    out_of_memory: bool = False

    def __str__(self) -> str:
        """For people."""
        if self.out_of_memory:
            group = control_groups.memory()
            limit = f" (this control group, or container, may have {group.limit / 1e9:.2f} GB)" if group else ""
            return f"was killed by the system, because memory ran out{limit}"
        if self.status >= 0:
            # Windows has the kind of a crash there: 0xC0000005 is an access violation.
            return f"ended with status {self.status if self.status < 1 << 16 else hex(self.status)}"
        try:
            name = signal.Signals(-self.status).name
        except ValueError:
            name = f"signal {-self.status}"
        return f"was ended by {name}"


def _thread_env() -> dict[str, str]:
    """What tells torch and numpy in a child how many threads a CPU quota allows."""
    threads = control_groups.quota_threads()
    return {} if threads is None else {"OMP_NUM_THREADS": str(threads), "OPENBLAS_NUM_THREADS": str(threads)}


class _Child:
    """A child process and the parent's end of its pipe.

    Args:
        entry: Function of this module that runs in the child.
        output: Where what it prints goes; the parent's standard error if None.
        env: Environment variables to add or change.
    """

    def __init__(self, entry: Callable[[int, int], None], output: IO[bytes] | None, env: Mapping[str, str]) -> None:
        self._oom_kills = control_groups.oom_kills()
        process = self._process = subprocess.Popen(
            [sys.executable, "-c", f"{MAIN}child_process.{entry.__name__}(*pipe)", *map(str, sys.path)],
            bufsize=0,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=output,
            env={**_thread_env(), **os.environ, **CHILD_ENV, **env},
            # A Ctrl-C of the terminal is the parent's to handle.
            start_new_session=True,
            creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
        )
        assert process.stdin is not None
        assert process.stdout is not None
        self.pid = process.pid
        self.pipe = _Pipe(process.stdout, process.stdin)
        self._lock = threading.Lock()
        self._reaper = threading.Thread(target=self._reap, daemon=True)
        self._reaper.start()

    def messages(self) -> Iterator[Any]:
        """What the child sends, until its end."""
        while (body := self.pipe.read()) is not None:
            yield pickle.loads(body)

    def wait(self, timeout_s: float | None = None) -> int | None:
        """Wait for the end; returns the exit status, None if it takes longer."""
        self._reaper.join(timeout_s)
        return None if self._reaper.is_alive() else self._process.returncode

    def kill(self) -> None:
        """End it and what it started at once."""
        with self._lock:
            if self._process.returncode is None:
                self._process.kill()

    def exit(self) -> Exit:
        """How it ended, once it has."""
        status = self._process.returncode
        if status != -KILL or self._oom_kills is None:
            return Exit(status)
        return Exit(status, (control_groups.oom_kills() or 0) > self._oom_kills)

    def _reap(self) -> None:
        """Wait for the child, then end what it started and left behind, which may hold its pipe open."""
        if sys.platform == "linux":
            # The process stays a zombie until its group is ended, so that nobody else gets the group's number.
            with contextlib.suppress(ChildProcessError):
                os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
            with self._lock, contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()


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
            OSError: What the operating system refused in it, such as a full disk.
            RuntimeError: Any other exception of the function, with its traceback as text.
        """
        call = pickle.dumps((function, args, kwargs))
        with self.log.open("ab") if self.log else tempfile.TemporaryFile() as output:
            begin = output.tell()
            child = _Child(_answer, output, self.env)
            late = threading.Event()

            def end() -> None:
                late.set()
                child.kill()

            timer = threading.Timer(self.timeout_s or 0, end)
            timer.daemon = True
            if self.timeout_s:
                timer.start()
            answer: _Result | _Failure | None = None
            try:
                answer = self._converse(child, call)
            finally:
                timer.cancel()
                if answer is None or child.wait(CLOSE_S) is None:
                    child.kill()
                child.wait()
                for stream in (child.pipe.incoming, child.pipe.outgoing):
                    stream.close()
            if answer is None:
                raise self._death(function, None if late.is_set() else child.exit(), self._tail(output, begin))
        if isinstance(answer, _Failure):
            raise answer.error or RuntimeError(f"{answer.message}\n\n{answer.traceback}")
        return cast("T", answer.value)

    def _converse(self, child: _Child, call: bytes) -> _Result | _Failure | None:
        """Hand the child its call and take its events; returns its answer, None if it died without one."""
        with contextlib.suppress(OSError):
            child.pipe.write(call)
        for message in child.messages():
            if isinstance(message, _Result | _Failure):
                return message
            if self.on_event:
                self.on_event(message.value)
        return None

    def _tail(self, output: IO[bytes], begin: int) -> str:
        """The last lines that the child printed."""
        with self.log.open("rb") if self.log else contextlib.nullcontext(output) as stream:
            stream.seek(max(begin, stream.seek(0, os.SEEK_END) - LOG_TAIL_BYTES))
            return stream.read().decode("utf-8", "replace").strip()

    def _death(self, function: Callable[..., Any], exit: Exit | None, tail: str) -> errors.OVAFMError:
        step = function.__name__.strip("_").replace("_", " ")
        if exit is None:
            reason = f"no answer within {self.timeout_s:g} s"
        else:
            reason = f"the process {exit}{' and no answer' if exit.status >= 0 else ''}"
        death = ChildDied(
            f"{step}: {reason}",
            None if exit is None else exit.status,
            tail,
            code="out-of-memory" if exit is not None and exit.out_of_memory else None,
        )
        if self.died is None:
            return death
        code = death.code if death.code != ChildDied.default_code else None
        error = self.died(f"{death}; its messages are in {self.log}" if self.log else str(death), code=code)
        error.__cause__ = death
        return error


def run_in_child(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call a function in a child process with no options; see `ChildProcess.run`."""
    return ChildProcess().run(function, *args, **kwargs)


class WorkerProcess:
    """A child process that answers messages until it is closed.

    The function runs in the child with a `Channel` as its first argument and ends the process when it returns. The
    callbacks are called in a thread of their own.

    Args:
        function: What runs in the child.
        *args: Its further arguments.
        on_message: Takes each message of the child. An exception in it ends the child.
        on_exit: Takes how the process ended, once, when the process has ended and its last message was taken.
        log: File to which all that the child prints is appended; the parent's standard error if None.
        **kwargs: Keyword arguments of the function.
    """

    def __init__(
        self,
        function: Callable[Concatenate[Channel, ...], None],
        *args: Any,
        on_message: Callable[[Any], object],
        on_exit: Callable[[Exit], object],
        log: Path | None = None,
        **kwargs: Any,
    ) -> None:
        # A child that does not read must not stop the thread that sends.
        self._outgoing: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._outgoing.put(pickle.dumps((function, args, kwargs)))
        with log.open("ab") if log else contextlib.nullcontext() as output:
            self._child = _Child(_work, output, {})
        self._on_message, self._on_exit = on_message, on_exit
        for target in (self._read, self._write):
            threading.Thread(target=target, daemon=True).start()

    @property
    def pid(self) -> int:
        """Process id."""
        return self._child.pid

    def send(self, message: object) -> None:
        """Hand a picklable message to the child; returns at once, and loses it if the child has gone."""
        self._outgoing.put(pickle.dumps(message))

    def close(self, timeout_s: float = CLOSE_S) -> None:
        """End the child's messages, after which its function returns; kill it if it does not end in time."""
        self._outgoing.put(CLOSE)
        if self._child.wait(timeout_s) is None:
            self.kill()

    def kill(self) -> None:
        """End the process at once."""
        self._child.kill()
        self._child.wait()

    def _write(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            body = None
            while body != CLOSE:
                body = self._outgoing.get()
                self._child.pipe.write(body)
        self._child.pipe.outgoing.close()

    def _read(self) -> None:
        try:
            for message in self._child.messages():
                self._on_message(message)
        except BaseException:
            self._child.kill()
            raise
        finally:
            self._child.wait()
            self._child.pipe.incoming.close()
            self._outgoing.put(CLOSE)
            self._on_exit(self._child.exit())


# -- In the child process


class _Log(io.FileIO):
    """What the child prints; where the log's disk is full, that is lost, and the work goes on."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError:
            return memoryview(data).nbytes


def _connect(incoming: int, outgoing: int) -> Channel:
    silence()
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        log = cast("io.BufferedWriter", _Log(descriptor, "w", closefd=False))
        setattr(sys, name, io.TextIOWrapper(log, encoding="utf-8", errors="backslashreplace", write_through=True))
    return Channel(_Pipe(os.fdopen(incoming, "rb", buffering=0), os.fdopen(outgoing, "wb", buffering=0)))


def _answer(incoming: int, outgoing: int) -> None:
    """Take one call, make it, and answer."""
    global _channel
    status = 1
    try:
        channel = _channel = _connect(incoming, outgoing)
        try:
            function, args, kwargs = next(iter(channel))
            channel.send(_Result(function(*args, **kwargs)))
            status = 0
        except BaseException as error:
            with contextlib.suppress(OSError):
                traceback.print_exc()
            channel.send(_Failure(_portable(error), f"{type(error).__name__}: {error}", traceback.format_exc()))
    finally:
        _leave(status)


def _portable(error: BaseException) -> errors.OVAFMError | OSError | None:
    """An error of ov_afm's or of the operating system, if the parent can read it."""
    with contextlib.suppress(Exception):
        by_system = isinstance(error, OSError) and error.errno is not None and type(error).__module__ == "builtins"
        if isinstance(error, errors.OVAFMError) or (isinstance(error, OSError) and by_system):
            pickle.loads(pickle.dumps(error))
            return error
    return None


def _work(incoming: int, outgoing: int) -> None:
    """Run a worker's function until it returns."""
    status = 1
    try:
        channel = _connect(incoming, outgoing)
        function, args, kwargs = next(iter(channel))
        function(channel, *args, **kwargs)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        _leave(status)


def _leave(status: int) -> None:
    """End the process; native libraries may hang or crash while they are unloaded, and the answer is already out."""
    with contextlib.suppress(OSError):
        sys.stderr.flush()
    os._exit(status)
