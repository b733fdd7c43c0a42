"""The owner of a request may leave at any moment; its slot must become free again."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ov_afm.serve.engine import MAX_DEATHS, Engine, Stream
from ov_afm.serve.errors import EngineTimeout
from ov_afm.serve.liveness import IDLE_S, SILENT_S, Liveness
from ov_afm.serve.messages import EngineSpec, Generate, ModelInfo, Piece, Text
from ov_afm.system.child_process import Exit

PIECE = Piece(7, "a", 1)
TURNS = range(5)


async def _turns(count: int) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


@pytest.mark.parametrize("turns", TURNS)
def test_a_cancellation_is_not_lost_when_a_piece_arrives_at_the_same_moment(turns: int) -> None:
    async def leave() -> None:
        stream = Stream([7])
        reading = asyncio.create_task(_read_on(stream))
        await asyncio.sleep(0)
        stream.put(PIECE)
        await _turns(turns)
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(reading, 1)

    asyncio.run(leave())


async def _read_on(stream: Stream) -> None:
    while True:
        await stream.get()


@pytest.mark.parametrize("turns", TURNS)
def test_leaving_the_queue_as_a_slot_becomes_free_gives_the_slot_back(turns: int) -> None:
    async def leave() -> None:
        engine = _engine()
        async with _slot(engine):
            second = asyncio.create_task(_hold(engine))
            await _turns(3)
            assert engine.waiting == 1
        await _turns(turns)
        second.cancel()
        await asyncio.wait([second], timeout=1)
        assert second.cancelled()
        assert (engine.running, engine.waiting) == (0, 0)

    asyncio.run(leave())


def test_the_time_limit_counts_waiting_and_running() -> None:
    async def wait() -> None:
        engine = _engine(request_timeout_s=0.2)
        async with _slot(engine) as stream:
            engine.request_timeout_s = 0.05
            with pytest.raises(EngineTimeout, match="no slot came free"):
                await _hold(engine)
            with pytest.raises(EngineTimeout, match="longer than this server allows"):
                await stream.get()
        assert (engine.running, engine.waiting) == (0, 0)

    begin = time.monotonic()
    asyncio.run(wait())
    assert time.monotonic() - begin < 5


def _engine(request_timeout_s: float = 60) -> Engine:
    """One slot and no process behind it."""
    engine = Engine(EngineSpec(Path("none"), max_running=1), request_timeout_s=request_timeout_s)
    engine.state = "ready"
    return engine


def _slot(engine: Engine) -> contextlib.AbstractAsyncContextManager[Stream]:
    return engine.open([Generate(Text("Hello"))])


async def _hold(engine: Engine) -> None:
    async with _slot(engine):
        await asyncio.sleep(60)


def test_slot_is_free_when_time_is_up_or_the_engine_is_done_although_nobody_reads() -> None:
    async def wait() -> None:
        engine = _engine(request_timeout_s=0.05)
        async with _slot(engine) as unread:
            await asyncio.sleep(0.2)
            assert engine.running == 0
            async with _slot(engine) as complete:
                (number,) = complete.open
                engine._finish(complete, number)
                assert engine.running == 0
                async with _slot(engine):
                    assert engine.running == 1
            assert engine.running == 0
            with pytest.raises(EngineTimeout):
                await unread.get()
        assert engine.running == 0

    asyncio.run(wait())


def _stuck_after(child: subprocess.Popen[bytes], seconds: int, step_s: float = 600) -> tuple[int, str]:
    """Ticks until a process counts as stuck, and why; no more than so many."""
    liveness = Liveness(child.pid, step_s)
    for count in range(1, seconds + 1):
        if why := liveness.tick():
            return count, why
        time.sleep(0.03)
    return 0, ""


@pytest.fixture
def child(request: pytest.FixtureRequest) -> Iterator[subprocess.Popen[bytes]]:
    """A process that runs a line of Python."""
    running = subprocess.Popen([sys.executable, "-c", f"print(flush=True); {request.param}"], stdout=subprocess.PIPE)
    assert running.stdout
    running.stdout.readline()
    yield running
    running.kill()
    running.wait()
    running.stdout.close()


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="no SIGSTOP")
@pytest.mark.parametrize("child", ["import time; time.sleep(60)"], indirect=True)
def test_stopped_process_is_stuck_after_seconds_of_silence(child: subprocess.Popen[bytes]) -> None:
    child.send_signal(signal.SIGSTOP)
    assert _stuck_after(child, 20) == (SILENT_S, f"it was stopped, and did not answer for {SILENT_S} s")


@pytest.mark.parametrize("child", ["import time; time.sleep(60)"], indirect=True)
def test_process_that_uses_no_processor_in_a_step_is_stuck(child: subprocess.Popen[bytes]) -> None:
    count, why = _stuck_after(child, 100)
    assert (count, why) == (SILENT_S + IDLE_S, f"it did nothing for {IDLE_S} s")


@pytest.mark.parametrize("child", ["exec('while True: pass')"], indirect=True)
def test_process_that_works_in_silence_has_the_time_that_a_step_may_take(child: subprocess.Popen[bytes]) -> None:
    assert _stuck_after(child, 80, step_s=90) == (0, "")
    assert _stuck_after(child, 80, step_s=70) == (71, "one step took more than 70 s")


class DyingProcess:
    """Stands in for the engine's process: it loads the model, or not, and ends."""

    pid = 0
    started = 0
    loads = True

    def __init__(self, *_: object, on_message: Callable[..., None], on_exit: Callable[[Exit], None]) -> None:
        DyingProcess.started += 1
        if self.loads:
            on_message([ModelInfo("CPU", 100, template_knows_tools=False)])
        on_exit(Exit(-9, out_of_memory=True))


@pytest.mark.parametrize("loads", [True, False], ids=["after loading", "while loading"])
def test_engine_that_keeps_dying_is_given_up_with_the_reason(monkeypatch: pytest.MonkeyPatch, loads: bool) -> None:
    monkeypatch.setattr("ov_afm.serve.engine.WorkerProcess", DyingProcess)
    monkeypatch.setattr("ov_afm.serve.engine.FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr(DyingProcess, "started", 0)
    monkeypatch.setattr(DyingProcess, "loads", loads)

    async def run() -> Engine:
        engine = Engine(EngineSpec(Path("none")))
        given_up = asyncio.Event()
        engine.on_unusable = given_up.set
        engine.start()
        await asyncio.wait_for(given_up.wait(), 5)
        await engine.stop()
        return engine

    engine = asyncio.run(run())
    assert DyingProcess.started == MAX_DEATHS
    assert engine.restarts == MAX_DEATHS - 1
    assert engine.problem is not None
    assert engine.problem.startswith(
        "the engine ended 5 times and is given up; the last time it was killed by the system, because memory ran out"
    )


def test_deaths_far_apart_are_not_counted_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ov_afm.serve.engine.WorkerProcess", DyingProcess)
    monkeypatch.setattr("ov_afm.serve.engine.FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr("ov_afm.serve.engine.DEATHS_WITHIN_S", 0.0)
    monkeypatch.setattr(DyingProcess, "started", 0)

    async def run() -> None:
        engine = Engine(EngineSpec(Path("none")))
        engine.start()
        while DyingProcess.started < 3 * MAX_DEATHS:
            await asyncio.sleep(0.01)
        assert engine.problem is None
        await engine.stop()

    asyncio.run(asyncio.wait_for(run(), 10))
