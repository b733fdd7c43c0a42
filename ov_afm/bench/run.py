"""One combination, measured in a process of its own.

The parent starts `measure` with `supervise.run`, so that a driver's crash costs one row, and so that
peak memory and load time belong to this combination alone. The engine is the one that `Pipeline`
would load; it is given token ids, and a clock in place of a text streamer, so that neither
tokenizing nor assembling text is counted.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import DeviceError
from ..runtime.metrics import percentile
from ..runtime.rules import kind_of
from ..system.child_process import emit
from . import memory
from .bandwidth import read_bandwidth, weight_bytes_per_token
from .energy import Meter, open_meter
from .engine import Engine, Timeline, open_engine
from .plan import Combination, Settings
from .prompts import Prompts

__all__ = ["Timeline", "measure", "measure_ceiling"]

IDLE_S = 3.0
FIRST_PROMPT_TOKENS = 8


def measure(model_dir: str, combination: dict[str, Any], settings: dict[str, Any]) -> None:
    """Measure a combination; runs in a child.

    Emits `step` when a step begins, `loaded` with what loading cost, and `run` with each run's figures.

    Args:
        model_dir: The model directory.
        combination: Fields of a `Combination`.
        settings: Fields of the sweep's `Settings`.
    """
    wanted, chosen = Combination(**combination), Settings(**settings)
    folder = Path(model_dir)
    emit(Step("loading"))
    import openvino_genai  # noqa: F401 - imported before the clock is started

    begin = time.perf_counter()
    engine = open_engine(folder, wanted, chosen)
    load_s = time.perf_counter() - begin
    prompts = Prompts(folder, "random" if chosen.prompts == "random" else "text", chosen.seed)
    emit(Step("first inference"))
    first = engine.run([prompts.make(FIRST_PROMPT_TOKENS)], 2)
    emit(Step("warming up"))
    engine.run([prompts.make(wanted.prompt_tokens)], min(wanted.new_tokens, 8))
    meter, energy = _meter()
    idle_w = meter.idle_w(IDLE_S) if meter else None
    emit(
        "loaded",
        load_s=load_s,
        first_inference_s=first[0].end - first[0].start,
        device_used=engine.device,
        emulated=engine.emulated,
        kernels=engine.kernels,
        energy_source=energy,
        idle_w=idle_w,
    )
    repeat = wanted.option == "prefix-cache"
    for index in range(chosen.runs):
        batch = [prompts.make(wanted.prompt_tokens) for _ in range(wanted.concurrency)]
        figures = _figures(engine, batch, wanted.new_tokens, meter, idle_w)
        if repeat:
            figures["ttft_repeated_ms"] = engine.run(batch, 2)[0].ttft_ms
        emit("run", run=index, peak_rss_bytes=memory.peak_rss_bytes(), **_device_memory(wanted), **figures)


def measure_ceiling(threads: int, models: dict[str, str]) -> dict[str, Any]:
    """What a ceiling follows from; runs in a child, whose buffer goes with it.

    Args:
        threads: Threads that read memory.
        models: Name to model directory.

    Returns:
        `bandwidth` in bytes a second, and `weight_bytes` that each model reads for a token.
    """
    weights = {name: weight_bytes_per_token(Path(folder)) for name, folder in models.items()}
    return {"bandwidth": read_bandwidth(threads), "weight_bytes": weights}


def _figures(
    engine: Engine, batch: list[list[int]], new_tokens: int, meter: Meter | None, idle_w: float | None
) -> dict[str, Any]:
    joules: list[float] = []
    on_first: Callable[[], None] | None = None
    if meter:
        reading = meter.read_j
        reading()

        def on_first() -> None:
            # The prompt's share, taken when its answer begins.
            joules.append(reading())

    times = engine.run(batch, new_tokens, on_first)
    if meter:
        joules.append(meter.read_j())
    first, prompt_tokens = times[0], len(batch[0])
    gaps = [gap for each in times for gap in each.gaps_ms]
    total = sum(each.new_tokens for each in times)
    wall_s = max(each.end for each in times) - min(each.start for each in times)
    decode_s = (first.last - first.first) if len(times) == 1 else None
    figures: dict[str, Any] = {
        "ttft_ms": max(each.ttft_ms for each in times),
        "tpot_p50_ms": percentile(gaps, 50),
        "tpot_p95_ms": percentile(gaps, 95),
        "tpot_ms": sum(gaps) / len(gaps),
        "prefill_tokens_per_s": prompt_tokens * len(times) / (max(each.ttft_ms for each in times) / 1000),
        "decode_tokens_per_s": (first.new_tokens - 1) / decode_s if decode_s else None,
        "total_tokens_per_s": total / wall_s,
        "generated_tokens": total,
    }
    if meter and idle_w is not None and len(joules) == 2 and decode_s:
        figures["energy_per_token_j"] = max(0.0, joules[1] - idle_w * decode_s) / (first.new_tokens - 1)
    return figures


def _meter() -> tuple[Meter | None, str]:
    try:
        meter = open_meter()
    except DeviceError as error:
        return None, f"not available: {error}"
    return meter, meter.source


def _device_memory(wanted: Combination) -> dict[str, Any]:
    if kind_of(wanted.device) == "CPU" or sys.platform != "linux":
        return {}
    return {"device_memory_bytes": memory.drm_bytes()}
