"""Engines for measuring: token ids in, the times of every token out."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ..errors import GenerationError
from ..model_dir.model_directory import ModelDirectory
from ..runtime.kernel_choice import Workload
from ..runtime.loading import COMPARING, LoadRequest
from ..runtime.model_session import ModelSession
from .plan import Combination, Settings, use_of

__all__ = ["Engine", "Timeline", "clock"]


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


class Engine:
    """A loaded model that is measured.

    Args:
        model: The model directory.
        combination: What it is loaded for.
        settings: The sweep's settings.

    Raises:
        DeviceError: The device cannot run it.

    Attributes:
        device: OpenVINO's name of the device.
        emulated: The NPU's path runs on CPU.
        kernels: The model that is packed for the native kernels is in use.
        compared_s: Seconds of loading that went into the comparison with the plain model, which happens once a machine.
    """

    def __init__(self, model: ModelDirectory, combination: Combination, settings: Settings) -> None:
        self._batching, self._next_id = combination.concurrency > 1, 0
        draft_model = settings.draft_model if combination.option == "draft" else None
        request = LoadRequest(
            model,
            combination.device,
            use_of(combination, settings),
            settings.properties,
            draft_model=None if draft_model is None else ModelDirectory.open(draft_model),
            prompt_lookup=combination.option == "prompt-lookup",
            num_assistant_tokens=settings.num_assistant_tokens,
            scheduler=_default_scheduler if self._batching else None,
            workload=Workload(combination.prompt_tokens, combination.new_tokens, (combination.concurrency,)),
        )
        self._session = ModelSession(request, warm_up=False)
        self.device, self.emulated = self._session.device, self._session.emulated
        self.kernels = self._session.kernels
        self.compared_s = self._session.load_s.get(COMPARING, 0.0)

    def run(
        self, prompts: list[list[int]], new_tokens: int, on_first: Callable[[], None] | None = None
    ) -> list[Timeline]:
        """Generate after each prompt, greedily and past any end-of-text token.

        Args:
            prompts: Token ids.
            new_tokens: Tokens to generate after each.
            on_first: Called when the first token comes; only without continuous batching.
        """
        config = self._session.greedy_config(new_tokens)
        if self._batching:
            return self._run_batch(prompts, config)
        return [self._run_one(prompt, config, on_first) for prompt in prompts]

    def _run_one(self, prompt: list[int], config: Any, on_first: Callable[[], None] | None) -> Timeline:
        import numpy as np
        import openvino
        import openvino_genai

        ids = np.array([prompt], dtype=np.int64)
        inputs = openvino_genai.TokenizedInputs(openvino.Tensor(ids), openvino.Tensor(np.ones_like(ids)))
        times = Timeline(time.perf_counter())
        self._session.engine.generate(inputs, config, clock(times, on_first))
        times.end = time.perf_counter()
        return times

    def _run_batch(self, prompts: list[list[int]], config: Any) -> list[Timeline]:
        import numpy as np
        import openvino

        engine = self._session.engine
        requests = []
        for prompt in prompts:
            times = Timeline(time.perf_counter())
            inputs = openvino.Tensor(np.array([prompt], dtype=np.int64))
            requests.append((engine.add_request(self._next_id, inputs, config), times))
            self._next_id += 1
        while engine.has_non_finished_requests():
            engine.step()
            for handle, times in requests:
                if handle.can_read():
                    times.take([token for each in handle.read().values() for token in each.generated_ids])
        for _, times in requests:
            if not times.arrivals:
                raise GenerationError("the engine dropped a request of the batch: its KV cache is too small for it")
            times.end = times.last
        return [times for _, times in requests]


def _default_scheduler(kind: str, config: Any) -> None:
    """GenAI's own scheduler settings, whose KV cache grows as it is needed."""


def clock(times: Timeline, on_first: Callable[[], None] | None = None) -> Any:
    """GenAI's streamer that only notes times; a local class, because its base class comes with the heavy import."""
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
