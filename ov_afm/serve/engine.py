"""The engine as the server sees it: a process that may die and is started again, and a bounded queue before it.

A request takes a place in the queue, then a slot, then its pieces arrive in order. Whatever happens
to the request's owner, leaving the `with` block gives slot and cache back. When the process dies,
every request that it had ends with `EngineLost` and a new process is started, at once the first
time and then with growing pauses. A process that keeps dying is given up after a few starts: the
reason is told, and the server ends, rather than load a model for ever that nobody gets an answer from. A process that
is alive and stuck (`liveness`) is ended.

A slot belongs to the engine's work, not to the client: it is free when the engine has the last token or time is up,
even if the client has not read a word.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import itertools
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, Literal

from ..errors import DeviceError, EngineLost
from ..system.child_process import Exit, WorkerProcess
from . import messages, worker
from .errors import EngineBusy, EngineTimeout
from .liveness import BEAT_S, STEP_S, Liveness
from .turns import Turns

__all__ = ["Engine", "Stream"]

logger = logging.getLogger(__name__)

State = Literal["stopped", "loading", "ready", "dead"]
FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 30.0
# An engine that dies so often in that time and gives nobody an answer, or so often while it loads, is given up.
MAX_DEATHS = 5
DEATHS_WITHIN_S = 600.0


class Stream:
    """The pieces of one request's answers, as they come.

    Attributes:
        prompt_tokens: Tokens of the prompt; 0 until the engine has taken the request.
        thinking: The prompt ends within thoughts.
        open: The engine's ids of the answers that are not complete, with their index.
        unfinished: Those of them that the engine works on. Whoever reads the stream may be behind.
        deadline: When the request ends in any case, by the monotonic clock.
        has_slot: It has not given its slot back.
    """

    def __init__(self, ids: Sequence[int], deadline: float = 0.0, turns: Turns | None = None) -> None:
        self.open = {each: index for index, each in enumerate(ids)}
        self.unfinished = set(ids)
        self.deadline, self.has_slot = deadline, True
        self.prompt_tokens = 0
        self.thinking = False
        # An error ends the stream. A time-out comes this way too, not by `asyncio.wait_for`: before Python 3.12 that
        # loses a cancellation that arrives together with a piece, so a client that left would go unnoticed.
        self._answers: collections.deque[messages.Answer | Exception] = collections.deque()
        self._arrived = asyncio.Event()
        self._turns = turns or Turns()

    def put(self, answer: messages.Answer | Exception) -> None:
        """Take an answer of the engine, or the error that ends the stream."""
        self._answers.append(answer)
        self._arrived.set()

    async def get(self) -> tuple[int, messages.Answer]:
        """The next answer, and the index of what it belongs to.

        Raises:
            APIError: The request cannot be run as it is.
            EngineLost: The engine died.
            EngineTimeout: Time is up.
        """
        while not self._answers:
            self._arrived.clear()
            await self._arrived.wait()
        await self._turns.take()
        answer = self._answers.popleft()
        if isinstance(answer, EngineLost):
            self.open.clear()
        if isinstance(answer, Exception):
            raise answer
        index = self.open[answer.id]
        if isinstance(answer, messages.PromptTokens):
            self.prompt_tokens, self.thinking = answer.count, answer.thinking
        elif _is_last(answer):
            del self.open[answer.id]
        if isinstance(answer, messages.Failure):
            raise answer.error
        if isinstance(answer, messages.Piece) and answer.end == "cache":
            raise EngineLost("the KV cache is full; try again later or with a shorter prompt")
        return index, answer

    def more(self, index: int) -> messages.Piece | None:
        """The next piece, if it is there already, belongs to an answer and does not end it."""
        following = self._answers[0] if self._answers else None
        if not isinstance(following, messages.Piece) or following.end is not None:
            return None
        if self.open.get(following.id) != index:
            return None
        self._answers.popleft()
        return following


class Engine:
    """One model's engine process.

    Args:
        spec: What the process loads.
        max_queue: Requests that may wait for a slot; further ones are refused.
        request_timeout_s: Longest time for a request, waiting included.

    Attributes:
        state: `stopped`, `loading`, `ready` or `dead`.
        info: The loaded model; None until it was loaded once.
        restarts: How often the process was started again after it died.
        running: Requests with a slot.
        waiting: Requests in the queue.
        cache_usage: Share of the KV cache in use.
        last_used: When the model was loaded or the last request ended, by the monotonic clock.
        problem: Why the model can never be served; None while that is not known.
        on_ready: Called when the process has loaded the model.
        on_unusable: Called when it turns out that it never will.
    """

    def __init__(self, spec: messages.EngineSpec, *, max_queue: int = 64, request_timeout_s: float = 600) -> None:
        self.spec = spec
        self.max_queue, self.request_timeout_s = max_queue, request_timeout_s
        self.state: State = "stopped"
        self.info: messages.ModelInfo | None = None
        self.problem: str | None = None
        self.restarts = self.running = self.waiting = 0
        self.cache_usage = 0.0
        self.last_used = time.monotonic()
        self.on_ready: Callable[[messages.ModelInfo], object] = lambda _: None
        self.on_unusable: Callable[[], object] = lambda: None
        self._ids = itertools.count(1)
        self._streams: dict[int, Stream] = {}
        self._queue: collections.deque[asyncio.Future[None]] = collections.deque()
        self._process: WorkerProcess | None = None
        self._liveness = Liveness(0, STEP_S)
        self._stuck: str | None = None
        # The present process has answered a request.
        self._answered = False
        self._keeper: asyncio.Task[None] | None = None
        self._ready = asyncio.Event()
        self._turns = Turns()

    @property
    def is_ready(self) -> bool:
        """Whether the engine takes requests."""
        return self.state == "ready"

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
    async def open(self, tasks: Sequence[messages.Task]) -> AsyncIterator[Stream]:
        """Run what one client asked for, in one slot; leaving the block cancels what is left of it.

        Args:
            tasks: One for each answer.

        Raises:
            EngineBusy: The queue is full.
            EngineLost: The engine is not running.
            EngineTimeout: No slot came free in time.
        """
        deadline = time.monotonic() + self.request_timeout_s
        await self._take_slot(deadline)
        stream = Stream([next(self._ids) for _ in tasks], deadline, self._turns)
        late = EngineTimeout("the request took longer than this server allows; ask for fewer tokens")
        left_s = max(0.0, deadline - time.monotonic())
        timer = asyncio.get_running_loop().call_later(left_s, self._end, stream, late)
        try:
            self._check_alive()
            for request_id, task in zip(stream.open, tasks, strict=True):
                self._streams[request_id] = stream
                self._send(messages.Request(request_id, task))
            yield stream
        finally:
            timer.cancel()
            self._end(stream)

    def _end(self, stream: Stream, error: Exception | None = None) -> None:
        """Take a stream's work from the engine, and its slot; with an error, whoever reads the stream gets that."""
        if error is not None:
            stream.put(error)
        for request_id in list(stream.unfinished):
            self._send(messages.Cancel(request_id))
            self._finish(stream, request_id)
        self._release(stream)

    def _finish(self, stream: Stream, request_id: int) -> None:
        """The engine has nothing more to say about an answer."""
        stream.unfinished.discard(request_id)
        self._streams.pop(request_id, None)
        if not stream.unfinished:
            self._release(stream)

    def _release(self, stream: Stream) -> None:
        self.last_used = time.monotonic()
        if stream.has_slot:
            stream.has_slot = False
            self._give_slot()

    async def ask(self, task: messages.Tokenize | messages.Detokenize | messages.Embed | messages.Rerank) -> Any:
        """What a task that has one answer gives: tokens, text, embeddings or scores."""
        async with self.open([task]) as stream:
            _, answer = await stream.get()
            assert isinstance(answer, messages.Result)
            return answer.value

    def _check_alive(self) -> None:
        if not self.is_ready:
            loading = "the model is being loaded; try again shortly"
            raise EngineLost(loading if self.state == "loading" else "the engine is down")

    async def _take_slot(self, deadline: float) -> None:
        self._check_alive()
        if self.running < self.spec.max_running and not self._queue:
            self.running += 1
            return
        if self.waiting >= self.max_queue:
            raise EngineBusy(f"{self.running} requests are running and {self.waiting} waiting; try again later")
        turn = asyncio.get_running_loop().create_future()
        self._queue.append(turn)
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
                self._queue.remove(turn)
        if not turn.done():
            raise EngineTimeout("no slot came free in the time that a request may take")
        turn.result()

    def _give_slot(self) -> None:
        self.running -= 1
        while self._queue and self.running < self.spec.max_running:
            turn = self._queue.popleft()
            if not turn.done():
                self.running += 1
                turn.set_result(None)

    def _send(self, message: messages.ToEngine) -> None:
        if self._process:
            self._process.send(message)

    async def _keep(self) -> None:
        """Keep a process running until this task is cancelled or the model turns out to be unusable."""
        pause, unready = FIRST_PAUSE_S, 0
        deaths: collections.deque[float] = collections.deque(maxlen=MAX_DEATHS)
        while True:
            self.state = "loading"
            was_ready, end, how = await self._run_process()
            if self._answered:
                deaths.clear()
            deaths.append(time.monotonic())
            unready = 0 if was_ready else unready + 1
            often = len(deaths) == MAX_DEATHS and deaths[-1] - deaths[0] < DEATHS_WITHIN_S
            if self.problem is None and (often or unready == MAX_DEATHS):
                self.problem = f"the engine ended {MAX_DEATHS} times and is given up; the last time it {how}"
                if end.out_of_memory:
                    self.problem += "; use a smaller recipe or a smaller --cache-size-gb, or allow more memory"
                logger.error("%s", self.problem)
            if self.problem is not None:
                self.state = "dead"
                self.on_unusable()
                return
            pause = FIRST_PAUSE_S if was_ready else min(pause * 2, LONGEST_PAUSE_S)
            logger.error("starting the engine again in %.1f s", pause)
            self.state = "dead"
            await asyncio.sleep(pause)
            self.restarts += 1

    async def _run_process(self) -> tuple[bool, Exit, str]:
        """Start a process and hand its messages out until it ends.

        Returns:
            Whether it had become ready, how it ended, and that in words.
        """
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[Exit] = loop.create_future()
        process = self._process = WorkerProcess(
            worker.run,
            self.spec,
            on_message=lambda batch: loop.call_soon_threadsafe(self._take, batch),
            on_exit=lambda end: loop.call_soon_threadsafe(ended.set_result, end),
        )
        self._liveness = liveness = Liveness(process.pid, max(STEP_S, self.request_timeout_s))
        self._stuck, self._answered = None, False
        try:
            while self._stuck is None and not ended.done():
                await asyncio.wait({ended}, timeout=BEAT_S)
                if not ended.done():
                    self._stuck = self._stuck or liveness.tick(loading=not self.is_ready)
            if self._stuck is not None:
                logger.error("the engine is stuck: %s; it is ended", self._stuck)
                self.state = "dead"
                self._fail_all("the engine does not respond and is started again; try again shortly")
                await asyncio.to_thread(process.kill)
            end = await asyncio.shield(ended)
            how = f"was ended because {self._stuck}" if self._stuck else str(end)
            if self.problem is None:
                logger.error("the engine %s", how)
        finally:
            was_ready = self._ready.is_set()
            self._ready.clear()
            self._process = None
            self._fail_all("the engine ended while it worked on this request; try again shortly")
            if not ended.done():
                await asyncio.to_thread(process.kill)
                # Until then its threads use the event loop.
                await ended
        return was_ready, end, how

    def _take(self, batch: Sequence[messages.FromEngine]) -> None:
        if self._process is None:
            return
        self._liveness.heard()
        for message in batch:
            if isinstance(message, messages.Alive):
                if message.busy_s > max(STEP_S, self.request_timeout_s):
                    self._stuck = f"one step took more than {message.busy_s:.0f} s"
            elif isinstance(message, messages.CacheUsage):
                self.cache_usage = message.share
            elif isinstance(message, messages.ModelInfo):
                self.info, self.state = message, "ready"
                self.last_used = time.monotonic()
                self._ready.set()
                self.on_ready(message)
            elif isinstance(message, messages.Unusable):
                self.problem = message.reason
            elif stream := self._streams.get(message.id):
                stream.put(message)
                if _is_last(message):
                    self._answered = self._answered or not isinstance(message, messages.Failure)
                    self._finish(stream, message.id)

    def _fail_all(self, why: str) -> None:
        while self._queue:
            turn = self._queue.popleft()
            if not turn.done():
                turn.set_exception(EngineLost(why))
        for stream in set(self._streams.values()):
            self._end(stream, EngineLost(why))


def _is_last(answer: messages.Answer) -> bool:
    """Whether an answer of the engine is the last one to its request."""
    if isinstance(answer, messages.Piece):
        return answer.end is not None
    return not isinstance(answer, messages.PromptTokens)
