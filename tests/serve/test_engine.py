"""The owner of a request may leave at any moment; its slot must become free again."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ov_afm.serve.engine import MAX_DEATHS, Engine, Stream
from ov_afm.serve.errors import EngineTimeout
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
        engine = _engine(request_timeout_s=0.05)
        async with _slot(engine) as stream:
            with pytest.raises(EngineTimeout, match="longer than this server allows"):
                await stream.get()
            with pytest.raises(EngineTimeout, match="no slot came free"):
                await _hold(engine)
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


class DyingProcess:
    """Stands in for the engine's process: it loads the model, or not, and ends."""

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
