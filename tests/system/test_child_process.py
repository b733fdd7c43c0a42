"""A child process may crash, hang, send half a message or be orphaned; its parent gets one error and stays usable."""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from support import supervised

from ov_afm import errors
from ov_afm.system.child_process import (
    ChildDied,
    ChildProcess,
    Exit,
    Progress,
    Step,
    WorkerProcess,
    emit,
    run_in_child,
)

posix = pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")


def wait_until_gone(pid: int, within_s: float = 10) -> None:
    end = time.monotonic() + within_s
    with contextlib.suppress(psutil.NoSuchProcess):
        while psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < end, f"process {pid} is still running"
            time.sleep(0.05)


def wait_for_text(path: Path, within_s: float = 20) -> str:
    end = time.monotonic() + within_s
    while not (path.exists() and path.read_text()):
        assert time.monotonic() < end, f"{path.name} was not written"
        time.sleep(0.05)
    return path.read_text()


def test_arguments_and_result_keep_their_types() -> None:
    values = (Path("a"), supervised.Place(Path("b"), 3), "你好 \n", None, 1.5)
    args, kwargs = run_in_child(supervised.echo, *values, error=errors.ConfigError("x", code="y"))
    assert args == values
    assert (type(kwargs["error"]), kwargs["error"].code) == (errors.ConfigError, "y")


def test_arguments_and_results_larger_than_a_pipe() -> None:
    data = os.urandom(5_000_000)
    assert run_in_child(supervised.echo, data) == ((data,), {})


def test_events_arrive_in_order_and_printing_goes_to_the_log(tmp_path: Path) -> None:
    seen: list[Any] = []
    log = tmp_path / "child.log"
    assert ChildProcess(log=log, on_event=seen.append).run(supervised.count_to, 3) == 3
    assert seen == [Progress(number, 3, "counting") for number in range(3)]
    assert sorted(log.read_text().split("\n")) == ["", *["noise of native code"] * 3, *["noise on stdout"] * 3]


def test_events_of_several_threads_stay_whole() -> None:
    seen: list[Any] = []
    ChildProcess(on_event=seen.append).run(supervised.emit_from_threads, threads=8, events=50)
    for thread in range(8):
        assert [number for name, number, _ in seen if name == thread] == list(range(50))


def test_modules_of_the_current_folder_do_not_replace_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "queue.py").write_text("raise SystemExit('the wrong queue')")
    (tmp_path / "numpy.py").write_text("raise SystemExit('the wrong numpy')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    assert run_in_child(supervised.echo, 1) == ((1,), {})


@posix
def test_crash_names_the_signal_and_keeps_what_was_printed(tmp_path: Path) -> None:
    log = tmp_path / "child.log"
    log.write_text("of an earlier child\n")
    for child in (ChildProcess(), ChildProcess(log=log)):
        with pytest.raises(ChildDied) as caught:
            child.run(supervised.crash, signal.SIGSEGV)
        assert str(caught.value) == "crash: the process was ended by SIGSEGV"
        assert caught.value.code == "child-died"
        assert caught.value.returncode == -signal.SIGSEGV
        assert caught.value.log_tail == "last words"


@posix
def test_kill_by_somebody_is_not_called_out_of_memory_and_names_the_log(tmp_path: Path) -> None:
    log = tmp_path / "child.log"
    with pytest.raises(errors.ExportError) as caught:
        ChildProcess(log=log, died=errors.ExportError).run(supervised.crash, signal.SIGKILL)
    assert str(caught.value) == f"crash: the process was ended by SIGKILL; its messages are in {log}"
    assert isinstance(caught.value.__cause__, ChildDied)


@pytest.mark.parametrize(
    ("status", "words"),
    [(7, "status 7"), (0xC0000005, "status 0xc0000005"), (-9, "SIGKILL"), (-40, "signal 40")],
    ids=["status", "windows-crash", "signal", "realtime-signal"],
)
def test_exit_is_described(status: int, words: str) -> None:
    assert words in str(Exit(status))


def test_exit_without_an_answer() -> None:
    with pytest.raises(ChildDied, match=r"^leave: the process ended with status 7 and no answer$") as caught:
        run_in_child(supervised.leave, 7)
    assert caught.value.returncode == 7


@pytest.mark.slow
def test_hanging_child_is_killed_at_its_time_limit(tmp_path: Path) -> None:
    start = time.monotonic()
    pid_file = tmp_path / "pid"
    with pytest.raises(ChildDied, match=r"^hang: no answer within 5 s$") as caught:
        ChildProcess(timeout_s=5).run(supervised.hang, pid_file)
    assert time.monotonic() - start < 20
    assert caught.value.returncode is None
    wait_until_gone(int(pid_file.read_text()))


@posix
def test_half_an_event_is_a_death_after_the_whole_ones() -> None:
    seen: list[Any] = []
    with pytest.raises(ChildDied, match="ended by SIGKILL"):
        ChildProcess(on_event=seen.append).run(supervised.die_in_the_middle_of_an_event, 2)
    assert seen == [Step("0"), Step("1")]


def test_failing_callback_ends_the_child() -> None:
    def fail(event: object) -> None:
        raise KeyError(event)

    before = {child.pid for child in psutil.Process().children()}
    with pytest.raises(KeyError):
        ChildProcess(on_event=fail).run(supervised.count_to, 3)
    assert {child.pid for child in psutil.Process().children()} <= before


@pytest.mark.parametrize("kind", ["ConfigError", "CompressionError", "DeviceError", "OVAFMError"])
def test_own_errors_keep_class_message_and_code(kind: str) -> None:
    with pytest.raises(errors.OVAFMError) as caught:
        ChildProcess(died=errors.ExportError).run(supervised.refuse, kind)
    assert type(caught.value) is getattr(errors, kind)
    assert str(caught.value) == "the recipe does not fit; choose another"
    assert caught.value.code == "recipe-unfit"


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (supervised.have_a_bug, ["ZeroDivisionError: a bug", "in have_a_bug"]),
        (supervised.refuse_unreadably, ["UnreadableError: no: such thing"]),
        (supervised.exit_as_a_command, ["SystemExit: 2"]),
        (supervised.return_what_cannot_be_pickled, ["pickle"]),
    ],
    ids=["bug", "error-that-does-not-pickle", "exit", "result-that-does-not-pickle"],
)
def test_any_other_exception_keeps_its_traceback(function: Callable[[], Any], words: list[str]) -> None:
    with pytest.raises(RuntimeError) as caught:
        run_in_child(function)
    assert not isinstance(caught.value, errors.OVAFMError)
    assert all(word in str(caught.value) for word in words)


def test_call_that_cannot_be_pickled_starts_nothing() -> None:
    before = threading.active_count()
    with pytest.raises(Exception, match="pickle"):
        run_in_child(supervised.echo, lambda: None)
    assert threading.active_count() == before


def test_environment_reaches_the_child_only() -> None:
    name = "OV_AFM_TEST_VARIABLE"
    assert ChildProcess(env={name: "set"}).run(supervised.environment, name) == "set"
    assert name not in os.environ


@posix
@pytest.mark.parametrize("crash", [False, True], ids=["after-an-answer", "after-a-crash"])
def test_grandchild_that_holds_the_pipe_does_not_hang_the_parent(tmp_path: Path, crash: bool) -> None:
    start = time.monotonic()
    pid_file = tmp_path / "pid"
    with pytest.raises(ChildDied, match="SIGKILL") if crash else contextlib.nullcontext():
        assert run_in_child(supervised.leave_a_grandchild_on_the_pipe, pid_file, crash) == "done"
    assert time.monotonic() - start < 10
    wait_until_gone(int(pid_file.read_text()))


def test_many_children_leave_no_thread_and_no_descriptor() -> None:
    run_in_child(supervised.echo)
    threads, descriptors = threading.active_count(), psutil.Process().num_fds() if sys.platform != "win32" else 0
    for _ in range(3):
        run_in_child(supervised.echo)
    assert threading.active_count() == threads
    if sys.platform != "win32":
        assert psutil.Process().num_fds() <= descriptors


RUN_HANGING = "child_process.run_in_child(supervised.hang, path)"
WORK_HANGING = """w = child_process.WorkerProcess(
    supervised.ignore_everything, path, on_message=print, on_exit=print); time.sleep(600)"""


def start_parent(call: str, pid_file: Path) -> subprocess.Popen[str]:
    program = (
        "import pathlib, time; from ov_afm.system import child_process; from support import supervised; "
        f"path = pathlib.Path({str(pid_file)!r}); {call}"
    )
    return subprocess.Popen(
        [sys.executable, "-c", program],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )


@posix
@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM], ids=["SIGKILL", "SIGTERM"])
@pytest.mark.parametrize("call", [RUN_HANGING, WORK_HANGING], ids=["call", "worker"])
def test_child_dies_with_its_parent(tmp_path: Path, signum: int, call: str) -> None:
    pid_file = tmp_path / "pid"
    parent = start_parent(call, pid_file)
    child = int(wait_for_text(pid_file))
    parent.send_signal(signum)
    parent.wait(10)
    wait_until_gone(child)


@posix
def test_interrupted_parent_leaves_no_child(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    parent = start_parent(RUN_HANGING, pid_file)
    child = int(wait_for_text(pid_file))
    parent.send_signal(signal.SIGINT)
    _, messages = parent.communicate(timeout=10)
    assert messages.strip().endswith("KeyboardInterrupt")
    wait_until_gone(child)


def test_emit_outside_a_child_does_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    emit(Step("alone"))
    assert capfd.readouterr() == ("", "")


# -- Workers


class Worker:
    """A worker whose messages and exit status are kept."""

    def __init__(self, function: Callable[..., None], *args: Any, **options: Any) -> None:
        self.messages: queue.Queue[Any] = queue.Queue()
        self.exits: queue.Queue[Exit] = queue.Queue()
        options.setdefault("on_message", self.messages.put)
        self.process = WorkerProcess(function, *args, on_exit=self.exits.put, **options)

    def received(self) -> list[Any]:
        """Messages that were taken until now."""
        return [self.messages.get_nowait() for _ in range(self.messages.qsize())]


@pytest.fixture
def start() -> Iterator[Callable[..., Worker]]:
    workers: list[Worker] = []

    def begin(function: Callable[..., None], *args: Any, **options: Any) -> Worker:
        workers.append(Worker(function, *args, **options))
        return workers[-1]

    yield begin
    for worker in workers:
        worker.process.kill()


Start = Callable[..., Worker]


def test_worker_answers_in_order_until_it_is_closed(start: Start) -> None:
    worker = start(supervised.repeat)
    big = os.urandom(3_000_000)
    sent = [*range(500), supervised.Place(Path("a"), 1), big, *range(10)]
    for message in sent:
        worker.process.send(message)
    worker.process.close(timeout_s=20)
    assert worker.exits.get(timeout=5).status == 0
    assert worker.received() == [*sent, "bye"]


def test_message_is_what_it_was_when_it_was_sent(start: Start) -> None:
    worker = start(supervised.repeat)
    message = [1]
    worker.process.send(message)
    message.append(2)
    assert worker.messages.get(timeout=20) == [1]


def test_workers_arguments_and_log(start: Start, tmp_path: Path) -> None:
    worker = start(supervised.repeat, prefix="> ")
    worker.process.send("a")
    assert worker.messages.get(timeout=20) == "> a"
    log = tmp_path / "log"
    assert start(supervised.print_and_end, log=log).exits.get(timeout=20).status == 0
    assert log.read_text() == "a word for the log\n"


def test_worker_that_does_not_read_does_not_stop_its_sender(start: Start, tmp_path: Path) -> None:
    worker = start(supervised.ignore_everything, tmp_path / "pid")
    wait_for_text(tmp_path / "pid")
    begin = time.monotonic()
    for _ in range(20):
        worker.process.send(b"x" * 1_000_000)
    assert time.monotonic() - begin < 5
    worker.process.close(timeout_s=0.5)
    assert time.monotonic() - begin < 10
    assert worker.exits.get(timeout=5).status != 0
    wait_until_gone(worker.process.pid)


@posix
def test_worker_killed_in_the_middle_of_a_message(start: Start) -> None:
    worker = start(supervised.die_in_the_middle_of_a_message)
    assert worker.exits.get(timeout=20).status == -signal.SIGKILL
    assert worker.received() == ["whole"]
    worker.process.send("into the void")
    worker.process.close()
    assert worker.exits.empty()


@posix
def test_grandchild_that_holds_the_pipe_does_not_hide_the_workers_end(start: Start, tmp_path: Path) -> None:
    worker = start(supervised.die_beside_a_grandchild, tmp_path / "pid")
    assert worker.exits.get(timeout=20).status == -signal.SIGKILL
    wait_until_gone(int((tmp_path / "pid").read_text()))


def test_worker_with_a_bug_ends_and_leaves_a_traceback(start: Start, tmp_path: Path) -> None:
    worker = start(supervised.worker_with_a_bug, log=tmp_path / "log")
    assert worker.exits.get(timeout=20).status == 1
    assert "ZeroDivisionError: a bug" in (tmp_path / "log").read_text()


def test_failing_callback_ends_the_worker(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    unhandled: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", lambda args: unhandled.append(args.exc_type))

    def fail(message: object) -> None:
        raise KeyError(message)

    worker = start(supervised.repeat, on_message=fail)
    worker.process.send("a")
    assert worker.exits.get(timeout=20).status != 0
    end = time.monotonic() + 10
    while not unhandled and time.monotonic() < end:
        time.sleep(0.01)
    assert unhandled == [KeyError]
