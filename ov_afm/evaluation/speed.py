"""Speed and energy of a model directory, as `bench` measures them: what the card shows beside quality."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..bench.plan import Settings
from ..bench.statistics import summarize
from ..bench.sweep import bench
from ..system import console

__all__ = ["SETTINGS", "Speed", "measure_speed"]

# Enough for a median and an energy counter that counts in millijoules; `ov-afm bench` is for more.
SETTINGS = Settings(devices=("CPU",), prompt_tokens=(128,), new_tokens=64, runs=3)


@dataclass(frozen=True, slots=True)
class Speed:
    """What bench measured of a model on CPU, one request of 128 tokens, 64 new ones, median of the runs.

    Attributes:
        decode_tokens_per_s: Decode speed; None, as below, where a run was too short to say.
        ttft_ms: Time to first token.
        peak_rss_bytes: Most resident memory.
        energy_per_token_j: Energy of a decoded token, idle power subtracted; None without a counter.
        energy_source: The counter, or why there is none.
    """

    decode_tokens_per_s: float | None
    ttft_ms: float | None
    peak_rss_bytes: float | None
    energy_per_token_j: float | None
    energy_source: str


def measure_speed(model: str | Path, progress: console.Progress, settings: Settings = SETTINGS) -> Speed:
    """Run bench on one model directory.

    Raises:
        OVAFMError: It cannot run.
    """
    summary = summarize(bench(model, settings=settings, progress=progress).records)[0]
    medians = {name: figure.median for name, figure in summary.figures.items()}
    return Speed(
        medians.get("decode_tokens_per_s"),
        medians.get("ttft_ms"),
        medians.get("peak_rss_bytes"),
        medians.get("energy_per_token_j"),
        str(summary.get("energy_source")),
    )
