"""One request at a time: what serves a device that cannot batch, an NPU.

It looks like `batch.Batch` to the worker. Requests wait in the order in which they came; the first
is generated in a thread of its own, whose tokens `step` takes as they come.
"""

from __future__ import annotations

import collections
import json
import queue
import threading
import time
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..kernels.select import plain_model
from ..model_dir import manifest
from ..model_dir.geometry import Geometry
from ..runtime import device_cache, loading, lora
from ..runtime.detokenize import Detokenizer, TextAssembler
from ..runtime.devices import EMULATED_NPU, kind_of
from ..runtime.properties import Use
from .batching import Batch, EngineSpec, Event, Job

__all__ = ["Single", "open_engine", "takes_turns"]

# A step comes back this often, so that the worker hears of cancelled and new requests.
STEP_S = 0.05


def takes_turns(device: str) -> bool:
    """Whether a device, as asked for, generates one answer at a time."""
    return device.strip().upper() == EMULATED_NPU or kind_of(device.strip().upper()) == "NPU"


def open_engine(spec: EngineSpec) -> Batch | Single:
    """Load what a specification asks for.

    Raises:
        OVAFMError: The model or the device cannot be used.
    """
    return Single(spec) if takes_turns(spec.device) else Batch(spec)


class Single:
    """A model loaded for one request at a time; attributes and methods are those of `Batch`.

    Args:
        spec: What to load.

    Raises:
        OVAFMError: The model or the device cannot be used.
    """

    logprobs = False

    def __init__(self, spec: EngineSpec) -> None:
        model_dir = loading.locate(spec.model_dir)
        contents = manifest.verify(model_dir)
        given = [name for name in ("cache_size_gb", "kv_cache") if getattr(spec, name) is not None]
        if given:
            raise ConfigError(
                f"{given[0]} is for CPU and GPU; on NPU set --ov-config MAX_PROMPT_LEN=N and MIN_RESPONSE_LEN=N"
            )
        request = loading.LoadRequest(
            model_dir,
            contents,
            spec.device,
            Use(threads=spec.threads),
            spec.ov_config,
            fallback=False,
            adapters=() if spec.adapter is None else (lora.read(*spec.adapter),),
        )
        phases = loading.Phases(device_cache.model_key(model_dir, contents), None)
        loaded = loading.load(request, phases, plain_model)
        self._engine = loaded.engine
        self.device = loaded.choice.label
        self.tokenizer = self._engine.get_tokenizer()
        geometry = Geometry.from_config(json.loads((Path(model_dir) / "config.json").read_text(encoding="utf-8")))
        self.vocab = geometry.vocab
        # Static shapes: prompt and answer have rooms of their own.
        self.max_prompt_tokens = int(loaded.properties["MAX_PROMPT_LEN"])
        self.context_length = self.max_prompt_tokens + int(loaded.properties["MIN_RESPONSE_LEN"])
        self.context_length = min(self.context_length, geometry.max_positions)
        self.cache_tokens = self.context_length
        self._detokenizer = Detokenizer(self.tokenizer)
        self._line: collections.deque[Job] = collections.deque()
        self._run: _Run | None = None

    def assembler(self, stop: tuple[str, ...]) -> TextAssembler:
        """A new collector of an answer's text."""
        return self._detokenizer.assembler(stop)

    @property
    def busy(self) -> bool:
        """Whether a step would do anything."""
        return bool(self._line) or self._run is not None

    def add(self, job: Job) -> None:
        """Put a request at the end of the line."""
        self._line.append(job)

    def cancel(self, job_id: int) -> None:
        """Give a request up; a running one ends with its next token."""
        self._line = collections.deque(job for job in self._line if job.id != job_id)
        if self._run is not None and self._run.job.id == job_id:
            self._run.unwanted.set()

    def step(self) -> list[Event]:
        """Wait shortly for tokens; returns what there is to tell."""
        if self._run is None:
            self._run = _Run(self._engine, self._line.popleft())
        tokens, reason = self._run.take()
        ended = reason is not None
        job, heard = self._run.job, not self._run.unwanted.is_set()
        if ended:
            self._run = None
        if not heard:
            return []
        text = ""
        for count, token in enumerate(tokens, 1):
            text += job.text.push(token)
            if job.text.stopped:
                tokens, reason = tokens[:count], "stop"
                if self._run is not None:
                    self._run.unwanted.set()
                break
        if reason is not None:
            text += job.text.finish()
            reason = "stop" if job.text.stopped else reason
        if not tokens and reason is None:
            return []
        event: Event = {"id": job.id, "text": text, "tokens": len(tokens)}
        return [event if reason is None else {**event, "end": reason}]

    def cache_usage(self) -> float:
        """Share of the room in use: all of it, as long as a request runs."""
        return float(self._run is not None)


class _Run:
    """One request in the engine, in a thread of its own."""

    def __init__(self, engine: Any, job: Job) -> None:
        self.job, self.unwanted = job, threading.Event()
        self._engine = engine
        # Tokens; at the end the reason for it, or the exception that it was.
        self._events: queue.SimpleQueue[int | str | Exception] = queue.SimpleQueue()
        threading.Thread(target=self._work, daemon=True).start()

    def take(self) -> tuple[list[int], str | None]:
        """Tokens that came within a moment, and the reason of the end if it is there.

        Raises:
            Exception: What the engine raised.
        """
        tokens: list[int] = []
        deadline = time.monotonic() + STEP_S
        while True:
            try:
                # With a token in hand nothing is waited for.
                event = self._events.get(timeout=0 if tokens else max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                return tokens, None
            if isinstance(event, Exception):
                raise event
            if isinstance(event, str):
                return tokens, event
            tokens.append(event)

    def _work(self) -> None:
        import numpy as np
        import openvino

        try:
            inputs = openvino.Tensor(np.array([self.job.tokens], dtype=np.int64))
            result = self._engine.generate(inputs, self.job.config, self._sink())
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
