"""Functions that tests run in child processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ov_afm import errors
from ov_afm.system import child_process
from ov_afm.system.child_process import Channel, Progress, Step, emit


@dataclass(frozen=True)
class Place:
    """A message of the tests' own type."""

    path: Path
    count: int


class UnreadableError(errors.OVAFMError):
    """An error that pickles and does not come back: its class wants more than its message."""

    def __init__(self, message: str, detail: str) -> None:
        super().__init__(f"{message}: {detail}")


def echo(*args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return args, kwargs


def eat(size: int) -> None:
    """Take memory, and touch all of it."""
    bytearray(b"x") * size


def crash(signum: int) -> None:
    print("last words", flush=True)
    os.kill(os.getpid(), signum)


def leave(status: int) -> None:
    os._exit(status)


def hang(pid_file: Path) -> None:
    pid_file.write_text(str(os.getpid()))
    time.sleep(600)


def die_in_the_middle_of_an_event(before: int = 0) -> None:
    for number in range(before):
        emit(Step(str(number)))
    _send_half_a_message(child_process._channel)


def _send_half_a_message(channel: Channel | None) -> None:
    assert channel is not None
    channel._pipe.outgoing.write(child_process.LENGTH.pack(1000) + b"half of it")
    os.kill(os.getpid(), signal.SIGKILL)


def _start_helper(pid_file: Path, channel: Channel | None) -> None:
    """A process that holds the pipe and outlives the child, as a fork of a library does."""
    assert channel is not None
    os.set_inheritable(channel._pipe.outgoing.fileno(), True)
    helper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], close_fds=False)
    pid_file.write_text(str(helper.pid))


def leave_a_grandchild_on_the_pipe(pid_file: Path, crash: bool) -> str:
    _start_helper(pid_file, child_process._channel)
    if crash:
        os.kill(os.getpid(), signal.SIGKILL)
    return "done"


def refuse(kind: str) -> None:
    raise getattr(errors, kind)("the recipe does not fit; choose another", code="recipe-unfit")


def refuse_unreadably() -> None:
    raise UnreadableError("no", "such thing")


def have_a_bug() -> None:
    raise ZeroDivisionError("a bug")


def exit_as_a_command() -> None:
    sys.exit(2)


def return_what_cannot_be_pickled() -> Any:
    return lambda: None


def count_to(steps: int) -> int:
    for step in range(steps):
        emit(Progress(step, steps, "counting"))
        print("noise on stdout")
        os.write(1, b"noise of native code\n")
    return steps


def emit_from_threads(threads: int, events: int) -> None:
    def work(name: int) -> None:
        for number in range(events):
            emit((name, number, "x" * 3000))

    running = [threading.Thread(target=work, args=(name,)) for name in range(threads)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()


def environment(name: str) -> str | None:
    return os.environ.get(name)


# -- Workers


def repeat(channel: Channel, prefix: str = "") -> None:
    """Send every message back, until there are no more."""
    for message in channel:
        channel.send(f"{prefix}{message}" if prefix else message)
    channel.send("bye")


def print_and_end(channel: Channel) -> None:
    print("a word for the log")


def ignore_everything(channel: Channel, pid_file: Path) -> None:
    hang(pid_file)


def die_in_the_middle_of_a_message(channel: Channel) -> None:
    channel.send("whole")
    _send_half_a_message(channel)


def die_beside_a_grandchild(channel: Channel, pid_file: Path) -> None:
    _start_helper(pid_file, channel)
    os.kill(os.getpid(), signal.SIGKILL)


def worker_with_a_bug(channel: Channel) -> None:
    have_a_bug()
