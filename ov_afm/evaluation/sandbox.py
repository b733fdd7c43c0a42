"""Run a program that a model wrote, without harm to this machine.

The program runs in a separate process in an empty folder: killed after a time, with limited memory, without network (an
empty network namespace where Linux grants one), and an audit hook stops whatever reaches outside its folder: sockets,
processes, native calls, files. That protects against accidents, which is what models produce, not against an attacker:
evaluate a model you distrust in a virtual machine.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass

__all__ = ["Outcome", "run"]

TIMEOUT_S = 10.0
MEMORY_BYTES = 512 * 1024 * 1024
POLL_S = 0.02
REASON_CHARACTERS = 200

# Runs inside: reads the request, drops rights that it does not need, runs the program and reports the result. A program
# that ends by itself (`exit()`, a crash) reports nothing, which counts as a failure.
LAUNCHER = r"""
import builtins, json, os, sys
request = json.loads(sys.stdin.readline())
answer = os.dup(1)
null = os.open(os.devnull, os.O_RDWR)
for descriptor in (0, 1, 2):
    os.dup2(null, descriptor)
def tell(**fields):
    os.write(answer, (json.dumps({"nonce": request["nonce"], **fields}) + "\n").encode())
if sys.platform.startswith("linux"):
    import ctypes
    libc = ctypes.CDLL(None, use_errno=True)
    # CLONE_NEWNET, alone for root, and with CLONE_NEWUSER for others
    libc.unshare(0x40000000) == 0 or libc.unshare(0x50000000)
if os.name == "posix":
    import resource
    seconds = int(request["timeout_s"]) + 1
    for name, limit in (("CPU", seconds), ("AS", request["memory_bytes"]), ("FSIZE", 1 << 20), ("CORE", 0)):
        try:
            resource.setrlimit(getattr(resource, "RLIMIT_" + name), (limit, limit))
        except (ValueError, OSError):
            pass
here = os.path.realpath(os.getcwd()) + os.sep
prefixes = ("socket.", "subprocess.", "ctypes.", "winreg.", "shutil.", "urllib.", "ftplib.", "http.", "smtplib.")
names = {"os.system", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "os.startfile", "os.kill",
         "os.killpg", "os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.chmod", "os.chown", "os.link", "os.symlink",
         "os.truncate", "os.putenv", "os.chdir", "signal.pthread_kill", "sys.addaudithook", "pty.spawn"}
writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
def guard(event, arguments):
    if event == "open":
        path, _, flags = arguments
        if isinstance(flags, int) and flags & writing:
            if isinstance(path, int) or not os.path.realpath(os.fspath(path)).startswith(here):
                raise PermissionError("a program under test may not write outside its folder")
    elif event in names or event.startswith(prefixes):
        raise PermissionError("a program under test may not use " + event)
sys.addaudithook(guard)
scope = {"__name__": "__main__"}
try:
    exec(compile(request["program"], "program", "exec"), scope)
    exec(compile(request["tests"], "tests", "exec"), scope)
except BaseException as error:
    tell(passed=False, reason=(type(error).__name__ + ": " + str(error))[:200])
else:
    tell(passed=True, reason="")
os._exit(0)
"""


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of a program.

    Attributes:
        passed: It ran, and its tests raised nothing.
        reason: What went wrong; empty when it passed.
    """

    passed: bool
    reason: str


def run(program: str, tests: str, *, timeout_s: float = TIMEOUT_S, memory_bytes: int = MEMORY_BYTES) -> Outcome:
    """Run a Python program and then its tests in the same namespace.

    Args:
        program: Source text.
        tests: Source text that raises when the program is wrong.
        timeout_s: Wall time after which it is killed.
        memory_bytes: Address space on POSIX; resident memory elsewhere.
    """
    nonce = secrets.token_hex(8)
    limits = {"timeout_s": timeout_s, "memory_bytes": memory_bytes}
    request = json.dumps({"program": program, "tests": tests, "nonce": nonce, **limits}) + "\n"
    with tempfile.TemporaryDirectory(prefix="ov_afm-", ignore_cleanup_errors=True) as folder:
        child = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", "-c", LAUNCHER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={name: os.environ[name] for name in ("SYSTEMROOT", "LANG") if name in os.environ},
            start_new_session=True,
        )
        try:
            output, killed = _communicate(child, request.encode(), timeout_s, memory_bytes)
        finally:
            _kill(child)
    for line in output.decode("utf-8", "replace").splitlines():
        answer = _parsed(line)
        if answer.get("nonce") == nonce:
            return Outcome(bool(answer["passed"]), str(answer["reason"])[:REASON_CHARACTERS])
    return Outcome(False, killed or f"the program ended by itself (status {child.returncode})")


def _communicate(
    child: subprocess.Popen[bytes], request: bytes, timeout_s: float, memory_bytes: int
) -> tuple[bytes, str]:
    """The output of a process, and why it was killed, if it ran too long or grew too large."""
    import psutil

    end, killed = time.monotonic() + timeout_s, ""
    data: bytes | None = request
    while True:
        try:
            return child.communicate(data, timeout=POLL_S)[0], killed
        except subprocess.TimeoutExpired:
            data = None  # sent already
        resident = 0
        with contextlib.suppress(psutil.Error):
            resident = psutil.Process(child.pid).memory_info().rss
        if time.monotonic() > end:
            killed = f"not done after {timeout_s:g} s"
        elif resident > memory_bytes:
            killed = f"more than {memory_bytes / 1e6:.0f} MB of memory"
        if killed:
            _kill(child)


def _parsed(line: str) -> dict[str, object]:
    try:
        answer = json.loads(line)
    except ValueError:
        return {}
    return answer if isinstance(answer, dict) else {}


def _kill(child: subprocess.Popen[bytes]) -> None:
    """End a process and whatever it started."""
    if sys.platform != "win32":
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child.pid, signal.SIGKILL)
    elif child.poll() is None:
        child.kill()
