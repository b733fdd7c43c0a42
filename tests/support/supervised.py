"""Functions that tests run in a supervised child."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from ov_afm import errors
from ov_afm.system import child_process


def echo(**values: Any) -> dict[str, Any]:
    return values


def crash(signum: int) -> None:
    print("last words", flush=True)
    os.kill(os.getpid(), signum)


def leave(status: int) -> None:
    os._exit(status)


def hang(pid_file: str | None = None) -> None:
    if pid_file:
        Path(pid_file).write_text(str(os.getpid()))
    time.sleep(600)


def die_in_the_middle_of_an_event() -> None:
    assert child_process._channel is not None
    child_process._channel.write('{"event": "prog')
    child_process._channel.flush()
    os.kill(os.getpid(), signal.SIGKILL)


def leave_a_grandchild_on_the_pipe(pid_file: str, crash: bool) -> str:
    """A helper process that inherits every descriptor and outlives its parent."""
    assert child_process._channel is not None
    channel = child_process._channel.fileno()
    os.set_inheritable(channel, True)
    helper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], close_fds=False)
    Path(pid_file).write_text(str(helper.pid))
    if crash:
        os.kill(os.getpid(), signal.SIGKILL)
    return "done"


def refuse(kind: str) -> None:
    raise getattr(errors, kind)("the recipe does not fit; choose another")


def have_a_bug() -> None:
    raise ZeroDivisionError("a bug")


def count_to(steps: int) -> int:
    for step in range(steps):
        child_process.emit("step", number=step)
        print("noise on stdout")
        os.write(1, b"noise of native code\n")
    return steps


def emit_from_threads(threads: int, events: int) -> None:
    def work(name: int) -> None:
        for number in range(events):
            child_process.emit("tick", thread=name, number=number, filler="x" * 3000)

    running = [threading.Thread(target=work, args=(name,)) for name in range(threads)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()


def environment(name: str) -> str | None:
    return os.environ.get(name)
