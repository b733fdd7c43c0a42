"""Programs cannot reach out of their sandbox."""

from __future__ import annotations

import time

import pytest

from ov_afm.evaluation import sandbox


def test_right_program_passes_and_wrong_one_does_not() -> None:
    assert sandbox.run("def f(x):\n    return x + 1", "assert f(1) == 2").passed
    wrong = sandbox.run("def f(x):\n    return x", "assert f(1) == 2, 'one more'")
    assert not wrong.passed
    assert wrong.reason == "AssertionError: one more"


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("import socket\nsocket.create_connection(('192.0.2.1', 80))", "socket"),
        ("import urllib.request\nurllib.request.urlopen('http://192.0.2.1')", "may not use urllib.Request"),
        ("import subprocess\nsubprocess.run(['echo'])", "may not use subprocess.Popen"),
        ("import os\nos.system('echo')", "may not use os.system"),
        ("import os\nos.kill(os.getppid(), 9)", "may not use os.kill"),
        ("import os\nos.remove('x')", "may not use os.remove"),
        ("open('../x', 'w')", "may not write outside its folder"),
        ("import ctypes\nctypes.CDLL(None)", "may not use ctypes.dlopen"),
        ("def f(:", "SyntaxError"),
        ("raise SystemExit", "SystemExit"),
        ("import os\nos._exit(0)", "the program ended by itself (status 0)"),
    ],
)
def test_program_that_reaches_out_or_ends_early_fails(program: str, reason: str) -> None:
    outcome = sandbox.run(program, "")
    assert not outcome.passed
    assert reason in outcome.reason


def test_program_that_never_ends_is_killed() -> None:
    begun = time.monotonic()
    outcome = sandbox.run("while True:\n    pass", "", timeout_s=0.5)
    assert outcome.reason == "not done after 0.5 s"
    assert time.monotonic() - begun < 5


def test_program_that_takes_all_memory_fails() -> None:
    outcome = sandbox.run("x = []\nwhile True:\n    x.append(bytearray(10_000_000))", "", memory_bytes=200_000_000)
    assert not outcome.passed
    assert outcome.reason in ("MemoryError: ", "more than 200 MB of memory")


def test_program_cannot_claim_to_have_passed() -> None:
    claim = 'import os\nos.write(1, b\'{"passed": true, "reason": ""}\\n\')\nos._exit(0)'
    assert not sandbox.run(claim, "assert False").passed


def test_program_may_use_files_of_its_own_and_print() -> None:
    program = "open('a', 'w').write('x')\nprint('y' * 100_000)"
    assert sandbox.run(program, "assert open('a').read() == 'x'").passed
