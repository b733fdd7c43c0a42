"""Engines for measuring: token ids in, the times of every token out."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from ..errors import GenerationError
from ..kernels.select import engine_model
from ..model_dir import manifest
from ..runtime import device_cache, devices
from ..runtime.loading import LoadRequest, Phases, load
from .plan import OPTIONS, Combination, Settings, use_of

__all__ = ["Engine", "Timeline", "open_engine"]

LOOKUP_NGRAM = 3
LIBRARY_PREFIX = "ov_afm_kernels"


@dataclass(slots=True)
class Timeline:
    """When the tokens of one request came, in seconds of `time.perf_counter`.

    Attributes:
        start: When the request was made.
        arrivals: Time and number of tokens of each delivery; drafted tokens come several at once.
        end: When the request was over.
        tokens: The tokens.
    """

    start: float
    arrivals: list[tuple[float, int]] = field(default_factory=list)
    end: float = 0.0
    tokens: list[int] = field(default_factory=list)

    def take(self, tokens: list[int]) -> None:
        """Note tokens that have come."""
        self.arrivals.append((time.perf_counter(), len(tokens)))
        self.tokens += tokens

    @property
    def first(self) -> float:
        """When the first token came."""
        return self.arrivals[0][0]

    @property
    def last(self) -> float:
        """When the last token came."""
        return self.arrivals[-1][0]

    @property
    def new_tokens(self) -> int:
        """Tokens generated."""
        return len(self.tokens)

    @property
    def ttft_ms(self) -> float:
        """Request to first token."""
        return (self.first - self.start) * 1000

    @property
    def gaps_ms(self) -> list[float]:
        """Time to each token after the first delivery; tokens that came together share their gap evenly."""
        gaps: list[float] = []
        for (before, _), (now, count) in zip(self.arrivals, self.arrivals[1:], strict=False):
            gaps += [(now - before) * 1000 / count] * count
        return gaps


class Engine(Protocol):
    """What is measured."""

    device: str
    emulated: bool
    kernels: bool

    def run(
        self, prompts: list[list[int]], new_tokens: int, on_first: Callable[[], None] | None = None
    ) -> list[Timeline]:
        """Generate after each prompt, greedily and past any end-of-text token.

        Args:
            prompts: Token ids.
            new_tokens: Tokens to generate after each.
            on_first: Called when the first token comes.
        """


def open_engine(model_dir: Path, wanted: Combination, settings: Settings) -> Engine:
    """Load what a combination needs.

    Raises:
        DeviceError: The device cannot run it.
    """
    contents = manifest.verify(model_dir)
    request = LoadRequest(
        model_dir,
        contents,
        wanted.device,
        use_of(wanted, settings),
        dict(settings.properties),
        draft_model=Path(settings.draft_model) if wanted.option == "draft" and settings.draft_model else None,
        prompt_lookup=wanted.option == "prompt-lookup",
        fallback=False,
    )
    key = device_cache.model_key(model_dir, contents)
    if wanted.concurrency > 1:
        return _Batching(request, key)
    return _Single(request, key, wanted, settings)


def _config(new_tokens: int) -> Any:
    import openvino_genai

    config = openvino_genai.GenerationConfig()
    config.max_new_tokens = new_tokens
    config.ignore_eos = True
    config.do_sample = False
    return config


class _Single:
    """One request at a time, on the engine that `Pipeline` would load."""

    def __init__(self, request: LoadRequest, key: str, wanted: Combination, settings: Settings) -> None:
        loaded = load(request, Phases(key, None), engine_model)
        self._engine = loaded.engine
        self.device, self.emulated = loaded.choice.device, loaded.choice.emulated
        self.kernels = _kernels_loaded()
        self._drafts = settings.num_assistant_tokens if OPTIONS[wanted.option].drafts else 0
        self._lookup = wanted.option == "prompt-lookup"

    def run(
        self, prompts: list[list[int]], new_tokens: int, on_first: Callable[[], None] | None = None
    ) -> list[Timeline]:
        import numpy as np
        import openvino
        import openvino_genai

        config = _config(new_tokens)
        if self._drafts:
            config.num_assistant_tokens = self._drafts
        if self._lookup:
            config.max_ngram_size = LOOKUP_NGRAM
        timelines = []
        for prompt in prompts:
            ids = np.array([prompt], dtype=np.int64)
            inputs = openvino_genai.TokenizedInputs(openvino.Tensor(ids), openvino.Tensor(np.ones_like(ids)))
            times = Timeline(time.perf_counter())
            self._engine.generate(inputs, config, _clock(times, on_first))
            times.end = time.perf_counter()
            timelines.append(times)
        return timelines


def _clock(times: Timeline, on_first: Callable[[], None] | None) -> Any:
    """GenAI's streamer that only looks at the clock; made here because its base class comes with the heavy import."""
    import openvino_genai

    class Clock(openvino_genai.StreamerBase):  # type: ignore[misc]
        def write(self, token: int | list[int]) -> Any:
            times.take([token] if isinstance(token, int) else list(token))
            if on_first and len(times.arrivals) == 1:
                on_first()
            return openvino_genai.StreamingStatus.RUNNING

        def end(self) -> None:
            pass

    return Clock()


class _Batching:
    """Several requests at once, on continuous batching."""

    def __init__(self, request: LoadRequest, key: str) -> None:
        import openvino_genai

        def make(folder: Path, choice: devices.Choice, properties: dict[str, Any]) -> Any:
            scheduler = properties.pop("scheduler_config", None) or openvino_genai.SchedulerConfig()
            return openvino_genai.ContinuousBatchingPipeline(folder, scheduler, choice.device, properties)

        loaded = load(replace(request, batch=True), Phases(key, None), engine_model, make)
        self._engine = loaded.engine
        self.device, self.emulated, self.kernels = loaded.choice.device, loaded.choice.emulated, _kernels_loaded()
        self._next_id = 0

    def run(
        self, prompts: list[list[int]], new_tokens: int, on_first: Callable[[], None] | None = None
    ) -> list[Timeline]:
        import numpy as np
        import openvino

        open_requests = []
        for prompt in prompts:
            times = Timeline(time.perf_counter())
            inputs = openvino.Tensor(np.array([prompt], dtype=np.int64))
            handle = self._engine.add_request(self._next_id, inputs, _config(new_tokens))
            self._next_id += 1
            open_requests.append((handle, times))
        timelines = [times for _, times in open_requests]
        while self._engine.has_non_finished_requests():
            self._engine.step()
            for handle, times in open_requests:
                if handle.can_read():
                    times.take([token for each in handle.read().values() for token in each.generated_ids])
        for times in timelines:
            if not times.arrivals:
                raise GenerationError("the engine dropped a request of the batch: its KV cache is too small for it")
            times.end = times.last
        return timelines


def _kernels_loaded() -> bool:
    """Whether the native library is in this process: asked of the system, not of what was meant to happen."""
    import psutil

    return any(LIBRARY_PREFIX in each.path for each in psutil.Process().memory_maps())
