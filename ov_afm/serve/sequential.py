"""One request at a time: for a device that cannot batch, an NPU, and for prompts that are kept on disk.

For the worker it has the methods of `BatchingEngine`. Requests wait in a queue; the first is generated in a thread of
its own, and `step` takes its tokens as they come.
"""

from __future__ import annotations

import collections
import queue
import threading
import time
from typing import Any

from ..errors import ConfigError
from ..runtime.devices import EMULATED_NPU
from ..runtime.model_session import ModelSession
from ..runtime.rules import kind_of
from .batching import BatchingEngine, Job, load_request
from .messages import EngineSpec, Piece

__all__ = ["SequentialEngine", "one_at_a_time", "open_engine"]

# A step returns this often, so that the worker sees cancelled and new requests.
STEP_S = 0.05
# A device that gives no token for so long is stuck.
STUCK_S = 600.0


def one_at_a_time(device: str) -> bool:
    """Whether a device, as the user named it, generates one answer at a time."""
    return device.strip().upper() == EMULATED_NPU or kind_of(device.strip().upper()) == "NPU"


def open_engine(spec: EngineSpec) -> BatchingEngine | SequentialEngine:
    """Load a model in the way that its device needs.

    Raises:
        OVAFMError: The model or the device cannot be used.
    """
    sequential = one_at_a_time(spec.device) or spec.prompt_cache
    return SequentialEngine(spec) if sequential else BatchingEngine(spec)


class SequentialEngine:
    """A model loaded for one request at a time; attributes and methods are those of `BatchingEngine`.

    Args:
        spec: What to load.

    Raises:
        OVAFMError: The model or the device cannot be used.
    """

    logprobs = False

    def __init__(self, spec: EngineSpec) -> None:
        if spec.prompt_cache is None:
            for name in ("cache_size_gb", "kv_cache"):
                if getattr(spec, name) is not None:
                    advice = "on NPU set --ov-config MAX_PROMPT_LEN=N and MIN_RESPONSE_LEN=N"
                    raise ConfigError(f"{name} is for CPU and GPU; {advice}")
        self.session = ModelSession(load_request(spec))
        self._queue: collections.deque[Job] = collections.deque()
        self._run: _Run | None = None

    @property
    def busy(self) -> bool:
        """Whether a step would do anything."""
        return bool(self._queue) or self._run is not None

    def add(self, job: Job) -> None:
        """Put a request at the end of the queue."""
        self._queue.append(job)

    def cancel(self, job_id: int) -> None:
        """End a request; a running one ends with its next token."""
        self._queue = collections.deque(job for job in self._queue if job.id != job_id)
        if self._run is not None and self._run.job.id == job_id:
            self._run.unwanted.set()

    def step(self) -> list[Piece]:
        """Wait shortly for tokens; returns what was added to the running answer."""
        run = self._run = self._run or _Run(self.session.engine, self._queue.popleft())
        tokens, end = run.take()
        if end is not None:
            self._run = None
        if run.unwanted.is_set():
            return []
        assembler, text = run.job.text, ""
        for count, token in enumerate(tokens, 1):
            text += assembler.push(token)
            if assembler.stopped:
                tokens, end = tokens[:count], "stop"
                run.unwanted.set()
                break
        if end is not None:
            text += assembler.finish()
            end = "stop" if assembler.stopped else end
        return [Piece(run.job.id, text, len(tokens), end=end, stop=assembler.stop)] if tokens or end else []

    def cache_usage(self) -> float:
        """Share of the cache in use: all of it, as long as a request runs."""
        return float(self._run is not None)


class _Run:
    """One request in the engine, in a thread of its own."""

    def __init__(self, engine: Any, job: Job) -> None:
        self.job, self.unwanted = job, threading.Event()
        self._latest = time.monotonic()
        self._engine = engine
        # Tokens; at last the reason for the end, or the exception that caused it.
        self._events: queue.SimpleQueue[int | str | Exception] = queue.SimpleQueue()
        threading.Thread(target=self._work, daemon=True).start()

    def take(self) -> tuple[list[int], str | None]:
        """Tokens that came within a moment, and the reason of the end if the answer is complete.

        Raises:
            Exception: What the engine raised.
        """
        tokens: list[int] = []
        deadline = time.monotonic() + STEP_S
        while True:
            try:
                # Tokens that have come are not held back for more.
                event = self._events.get(timeout=0 if tokens else max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                if not tokens and time.monotonic() - self._latest > STUCK_S:
                    raise RuntimeError(f"the device has given no token for {STUCK_S:g} s") from None
                return tokens, None
            self._latest = time.monotonic()
            if isinstance(event, Exception):
                raise event
            if isinstance(event, str):
                return tokens, event
            tokens.append(event)

    def _work(self) -> None:
        try:
            result = self._engine.generate(self.job.inputs, self.job.config, self._sink())
            self._events.put("stop" if result.finish_reasons[0].name == "STOP" else "length")
        except Exception as error:  # noqa: BLE001 - belongs to the thread that steps
            self._events.put(error)

    def _sink(self) -> Any:
        import openvino_genai

        status = openvino_genai.StreamingStatus
        events, unwanted = self._events, self.unwanted

        class Sink(openvino_genai.StreamerBase):  # type: ignore[misc]
            def write(self, token: int | list[int]) -> Any:
                for each in [token] if isinstance(token, int) else token:
                    events.put(int(each))
                return status.CANCEL if unwanted.is_set() else status.RUNNING

            def end(self) -> None:
                pass

        return Sink()
