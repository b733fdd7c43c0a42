"""The engine as the server sees it: a process that may die and comes back, and a bounded line before it.

A request takes a place in the line, then a slot, then its pieces arrive in order. Whatever happens
to the request's owner, leaving the `with` block gives slot and cache back. When the process dies,
every request that it had ends with `EngineLost` and a new process is started, at once the first
time and then with growing pauses.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import itertools
import json
import logging
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any, Literal

from ..errors import DeviceError, GenerationError
from ..system import child_process
from .batching import EngineSpec

__all__ = ["Engine", "EngineBusy", "EngineLost", "EngineTimeout", "Refusal", "Stream"]

logger = logging.getLogger(__name__)

Message = dict[str, Any]
State = Literal["stopped", "loading", "ready", "dead"]
# A line carries what one step gave to all requests, or the tokens of a long text.
LONGEST_LINE = 1 << 28
FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 30.0
# Comes among a stream's pieces when its time is up. Not `asyncio.wait_for`: before Python 3.12 it loses a
# cancellation that arrives together with a piece, and with it the news that the client has left.
LATE: Message = {}


class EngineLost(GenerationError):
    """The engine's process ended while it worked on the request, or is not there."""


class EngineBusy(GenerationError):
    """The line is full."""


class EngineTimeout(GenerationError):
    """The request took longer than a request may."""


class Refusal(GenerationError):
    """The engine will not run the request as it is.

    Attributes:
        param: The request's field that is to blame.
        code: OpenAI's word for the reason.
    """

    def __init__(self, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param, self.code = param, code


class Stream:
    """The pieces of one request's answers, as they come.

    Attributes:
        prompt_tokens: Tokens of the prompt, once the first piece is there.
        open: The engine's ids of the answers that are not complete, with their index.
    """

    def __init__(self, ids: Sequence[int]) -> None:
        self.open = {each: index for index, each in enumerate(ids)}
        self.prompt_tokens = 0
        self._messages: asyncio.Queue[Message] = asyncio.Queue()

    def put(self, message: Message) -> None:
        """Take a message of the engine."""
        self._messages.put_nowait(message)

    async def get(self) -> Message:
        """The next piece: `index`, `text`, `tokens`, perhaps `logprobs`, and `end` in an answer's last one.

        Raises:
            Refusal: The request cannot be run as it is.
            EngineLost: The engine died.
            EngineTimeout: Time is up.
        """
        message = await self._messages.get()
        if message is LATE:
            raise EngineTimeout("the request took longer than this server allows; ask for fewer tokens")
        if "lost" in message:
            self.open.clear()
            raise EngineLost(message["lost"])
        message["index"] = self.open[message["id"]]
        if message.keys() & {"end", "result", "refused", "failed"}:
            del self.open[message["id"]]
        if refused := message.get("refused"):
            raise Refusal(refused["message"], refused["param"], refused["code"])
        if "failed" in message:
            raise EngineLost(message["failed"])
        if message.get("end") == "cache":
            raise EngineLost("the KV cache is full; try again later or with a shorter prompt")
        self.prompt_tokens = message.get("prompt_tokens", self.prompt_tokens)
        return message


class Engine:
    """One model's engine process.

    Args:
        spec: What the process loads.
        max_queue: Requests that may wait for a slot; more are turned away.
        request_timeout_s: Longest time for a request, waiting included.

    Attributes:
        state: `stopped`, `loading`, `ready` or `dead`.
        info: What the process said of the model; empty until it is ready.
        restarts: How often the process was started again after it died.
        running: Requests with a slot.
        waiting: Requests in the line.
        cache_usage: Share of the KV cache in use.
        last_used: When the last request ended or the model was there, by the monotonic clock.
        problem: Why the model can never be served; None while that is not known.
        on_ready: Called when the process has loaded the model.
        on_unusable: Called when it turned out that it never will.
    """

    def __init__(self, spec: EngineSpec, *, max_queue: int = 64, request_timeout_s: float = 600) -> None:
        self.spec = spec
        self.max_queue, self.request_timeout_s = max_queue, request_timeout_s
        self.state: State = "stopped"
        self.info: Message = {}
        self.problem: str | None = None
        self.restarts = self.running = self.waiting = 0
        self.cache_usage = 0.0
        self.last_used = time.monotonic()
        self.on_ready: Callable[[], object] = lambda: None
        self.on_unusable: Callable[[], object] = lambda: None
        self._ids = itertools.count(1)
        self._streams: dict[int, Stream] = {}
        self._line: collections.deque[asyncio.Future[None]] = collections.deque()
        self._process: asyncio.subprocess.Process | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._ready = asyncio.Event()

    @property
    def pid(self) -> int | None:
        """Process id of the engine."""
        return self._process.pid if self._process else None

    def start(self) -> None:
        """Begin to load; returns at once."""
        if self._keeper is None or self._keeper.done():
            self.state, self.problem = "loading", None
            self._keeper = asyncio.create_task(self._keep())

    async def ready(self) -> None:
        """Wait until the model is loaded.

        Raises:
            DeviceError: It cannot be.
        """
        waiter = asyncio.create_task(self._ready.wait())
        keeper = self._keeper
        assert keeper is not None
        try:
            await asyncio.wait({waiter, keeper}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            waiter.cancel()
        if not self._ready.is_set():
            raise DeviceError(self.problem or "the engine could not be started")

    async def stop(self) -> None:
        """End the process and every request that it has."""
        if self._keeper:
            self._keeper.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._keeper
            self._keeper = None
        self.state = "stopped"

    @contextlib.asynccontextmanager
    async def open(self, requests: Sequence[Mapping[str, Any]]) -> AsyncIterator[Stream]:
        """Run what one client asked for, in one slot; leaving the block cancels what is left of it.

        Args:
            requests: For each answer `op` and what it takes; see `worker`.

        Raises:
            EngineBusy: The line is full.
            EngineLost: There is no engine.
            EngineTimeout: No slot came free in time.
        """
        deadline = time.monotonic() + self.request_timeout_s
        await self._take_slot(deadline)
        stream = Stream([next(self._ids) for _ in requests])
        timer = asyncio.get_running_loop().call_later(max(0.0, deadline - time.monotonic()), stream.put, LATE)
        try:
            self._check_alive()
            for request_id, request in zip(stream.open, requests, strict=True):
                self._streams[request_id] = stream
                self._send({**request, "id": request_id})
            yield stream
        finally:
            timer.cancel()
            for request_id in stream.open:
                self._send({"op": "cancel", "id": request_id})
            self._streams = {key: each for key, each in self._streams.items() if each is not stream}
            self.last_used = time.monotonic()
            self._give_slot()

    async def ask(self, request: Mapping[str, Any]) -> Message:
        """The result of a request that generates nothing."""
        async with self.open([request]) as stream:
            answer: Message = (await stream.get())["result"]
            return answer

    def _check_alive(self) -> None:
        if self.state != "ready":
            raise EngineLost(
                "the model is being loaded; try again shortly" if self.state == "loading" else "the engine is down"
            )

    async def _take_slot(self, deadline: float) -> None:
        self._check_alive()
        if self.running < self.spec.max_running and not self._line:
            self.running += 1
            return
        if self.waiting >= self.max_queue:
            raise EngineBusy(f"{self.running} requests are running and {self.waiting} waiting; try again later")
        turn = asyncio.get_running_loop().create_future()
        self._line.append(turn)
        self.waiting += 1
        try:
            await asyncio.wait({turn}, timeout=max(0.0, deadline - time.monotonic()))
        except asyncio.CancelledError:
            if turn.done() and turn.exception() is None:
                self._give_slot()
            raise
        finally:
            self.waiting -= 1
            with contextlib.suppress(ValueError):
                self._line.remove(turn)
        if not turn.done():
            raise EngineTimeout("no slot came free in the time that a request may take")
        turn.result()

    def _give_slot(self) -> None:
        self.running -= 1
        while self._line and self.running < self.spec.max_running:
            turn = self._line.popleft()
            if not turn.done():
                self.running += 1
                turn.set_result(None)

    def _send(self, message: Message) -> None:
        if self._process and self._process.stdin and not self._process.stdin.is_closing():
            self._process.stdin.write(json.dumps(message).encode() + b"\n")

    async def _keep(self) -> None:
        """Keep a process running until this task is cancelled or the model turns out to be unusable."""
        pause = FIRST_PAUSE_S
        while True:
            self.state = "loading"
            was_ready = await self._run_process()
            if self.problem is not None:
                self.state = "dead"
                self.on_unusable()
                return
            pause = FIRST_PAUSE_S if was_ready else min(pause * 2, LONGEST_PAUSE_S)
            logger.error("the engine died; starting it again in %.1f s", pause)
            self.state = "dead"
            await asyncio.sleep(pause)
            self.restarts += 1

    async def _run_process(self) -> bool:
        """Start a process and hand its messages out until it ends; whether it had become ready."""
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "ov_afm.serve.worker"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env={**os.environ, **child_process.CHILD_ENV},
            limit=LONGEST_LINE,
            # A Ctrl-C of the terminal is the server's to handle.
            start_new_session=True,
        )
        self._process = process
        assert process.stdin is not None
        process.stdin.write(json.dumps(dataclasses.asdict(self.spec)).encode() + b"\n")
        reading = asyncio.create_task(self._read(process))
        try:
            await process.wait()
            _end_group(process.pid)
            await reading
        finally:
            was_ready = self._ready.is_set()
            self._ready.clear()
            self._process = None
            self._fail_all("the engine ended while it worked on this request; try again shortly")
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            _end_group(process.pid)
            reading.cancel()
            await process.wait()
        return was_ready

    async def _read(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None
        try:
            async for line in process.stdout:
                if line.endswith(b"\n"):
                    self._take(json.loads(line))
        except (ConnectionError, ValueError) as error:
            logger.error("the engine's answer cannot be read: %r", error)
            process.kill()

    def _take(self, messages: list[Message]) -> None:
        for message in messages:
            if "id" in message:
                stream = self._streams.get(message["id"])
                if stream:
                    stream.put(message)
            elif "cache" in message:
                self.cache_usage = message["cache"]
            elif "ready" in message:
                self.info, self.state = message["ready"], "ready"
                self.last_used = time.monotonic()
                self._ready.set()
                self.on_ready()
            elif "unusable" in message:
                self.problem = message["unusable"]

    def _fail_all(self, why: str) -> None:
        for stream in set(self._streams.values()):
            stream.put({"lost": why})
        while self._line:
            turn = self._line.popleft()
            if not turn.done():
                turn.set_exception(EngineLost(why))


def _end_group(pid: int) -> None:
    """End what the process started and left behind, which would hold its pipe open."""
    if sys.platform != "win32":
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)
