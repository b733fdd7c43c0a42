"""A child process may crash, hang, talk nonsense or be orphaned; its parent says so in one line and goes on."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from ov_afm import errors
from ov_afm.system import child_process

posix = pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")


@pytest.fixture(autouse=True)
def importable_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1] / "support"))


def wait_until_gone(pid: int, within_s: float = 10) -> None:
    end = time.monotonic() + within_s
    with contextlib.suppress(psutil.NoSuchProcess):
        while psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < end, f"process {pid} is still there"
            time.sleep(0.05)


def wait_for_text(path: Path, within_s: float = 10) -> str:
    end = time.monotonic() + within_s
    while not (path.exists() and path.read_text()):
        assert time.monotonic() < end, f"{path.name} was not written"
        time.sleep(0.05)
    return path.read_text()


def test_result_comes_back_as_json() -> None:
    values = {"text": "你好 \n \ud7ff", "number": 0, "nothing": None, "list": [1.5, True]}
    assert child_process.run("supervised:echo", values) == values


def test_events_arrive_in_order_and_printing_goes_to_the_log(tmp_path: Path) -> None:
    seen: list[dict[str, Any]] = []
    log = tmp_path / "child.log"
    assert child_process.run("supervised:count_to", {"steps": 3}, log=log, on_event=seen.append) == 3
    assert seen == [{"event": "step", "number": number} for number in range(3)]
    assert sorted(log.read_text().split("\n")) == ["", *["noise of native code"] * 3, *["noise on stdout"] * 3]


def test_events_of_several_threads_stay_whole() -> None:
    seen: list[dict[str, Any]] = []
    child_process.run("supervised:emit_from_threads", {"threads": 8, "events": 50}, on_event=seen.append)
    for thread in range(8):
        assert [event["number"] for event in seen if event["thread"] == thread] == list(range(50))


@posix
def test_crash_names_the_signal_and_keeps_the_last_words() -> None:
    with pytest.raises(child_process.ChildDied, match=r"^crash: the process was ended by SIGSEGV$") as caught:
        child_process.run("supervised:crash", {"signum": signal.SIGSEGV})
    assert caught.value.returncode == -signal.SIGSEGV
    assert caught.value.log_tail == "last words"


@posix
def test_kill_hints_at_memory_and_names_the_log(tmp_path: Path) -> None:
    log = tmp_path / "child.log"
    with pytest.raises(errors.ExportError) as caught:
        child_process.run("supervised:crash", {"signum": signal.SIGKILL}, log=log, died=errors.ExportError)
    assert str(caught.value) == (f"crash: the process was ended by SIGKILL (out of memory?); its messages are in {log}")
    assert isinstance(caught.value.__cause__, child_process.ChildDied)


def test_exit_without_an_answer_is_told() -> None:
    with pytest.raises(child_process.ChildDied, match=r"^leave: the process ended with status 7 and no answer$"):
        child_process.run("supervised:leave", {"status": 7})


def test_hanging_child_is_killed_at_its_time_limit(tmp_path: Path) -> None:
    start = time.monotonic()
    pid_file = tmp_path / "pid"
    with pytest.raises(child_process.ChildDied, match=r"^hang: no answer within 5 s$") as caught:
        child_process.run("supervised:hang", {"pid_file": str(pid_file)}, timeout_s=5)
    assert time.monotonic() - start < 20
    assert caught.value.returncode is None
    wait_until_gone(int(pid_file.read_text()))


@posix
def test_half_an_event_is_a_death_not_a_bug() -> None:
    with pytest.raises(child_process.ChildDied, match="ended by SIGKILL"):
        child_process.run("supervised:die_in_the_middle_of_an_event", on_event=lambda event: None)


@pytest.mark.parametrize("kind", ["ConfigError", "CompressionError", "DeviceError", "OVAFMError"])
def test_own_errors_keep_their_class_and_message(kind: str) -> None:
    with pytest.raises(errors.OVAFMError) as caught:
        child_process.run("supervised:refuse", {"kind": kind}, died=errors.ExportError)
    assert type(caught.value) is getattr(errors, kind)
    assert str(caught.value) == "the recipe does not fit; choose another"


def test_bug_in_the_child_keeps_its_traceback() -> None:
    with pytest.raises(RuntimeError, match=r"ZeroDivisionError: a bug") as caught:
        child_process.run("supervised:have_a_bug")
    assert not isinstance(caught.value, errors.OVAFMError)
    assert "in have_a_bug" in str(caught.value)


def test_environment_reaches_the_child_only() -> None:
    name = "OV_AFM_TEST_VARIABLE"
    assert child_process.run("supervised:environment", {"name": name}, env={name: "there"}) == "there"
    assert name not in os.environ


@posix
@pytest.mark.parametrize("crash", [False, True], ids=["after-an-answer", "after-a-crash"])
def test_grandchild_that_holds_the_pipe_does_not_hang_the_parent(tmp_path: Path, crash: bool) -> None:
    start = time.monotonic()
    pid_file = tmp_path / "pid"
    arguments = {"pid_file": str(pid_file), "crash": crash}
    if crash:
        with pytest.raises(child_process.ChildDied, match="SIGKILL"):
            child_process.run("supervised:leave_a_grandchild_on_the_pipe", arguments)
    else:
        assert child_process.run("supervised:leave_a_grandchild_on_the_pipe", arguments) == "done"
    assert time.monotonic() - start < 10
    wait_until_gone(int(pid_file.read_text()))


@posix
@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM], ids=["SIGKILL", "SIGTERM"])
def test_child_dies_with_its_parent(tmp_path: Path, signum: int) -> None:
    pid_file = tmp_path / "pid"
    program = f"from ov_afm import supervise; supervise.run('supervised:hang', {{'pid_file': {str(pid_file)!r}}})"
    parent = subprocess.Popen([sys.executable, "-c", program])
    child = int(wait_for_text(pid_file))
    parent.send_signal(signum)
    parent.wait(10)
    wait_until_gone(child)


@posix
def test_interrupted_parent_leaves_no_child(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    program = f"from ov_afm import supervise; supervise.run('supervised:hang', {{'pid_file': {str(pid_file)!r}}})"
    parent = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True)
    child = int(wait_for_text(pid_file))
    parent.send_signal(signal.SIGINT)
    _, messages = parent.communicate(timeout=10)
    assert messages.strip().endswith("KeyboardInterrupt")
    wait_until_gone(child)


def test_emit_outside_a_child_does_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    child_process.emit("step", name="alone")
    assert capfd.readouterr() == ("", "")
