"""The card: quality, speed and energy of model directories, one column each.

What a model card promises in words ("code accuracy, math reasoning, energy") as one table that anyone can make again,
for any checkpoint, beside other people's model directories.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..bench.plan import Settings
from ..bench.summary import summarize
from ..cli.bench import bench
from ..system import console
from ..system.console import human_bytes
from .table import ABSENT, number
from .tasks import Result

if TYPE_CHECKING:
    from .fidelity import Fidelity
    from .suite import Extras

__all__ = ["SETTINGS", "Speed", "markdown", "measure_speed", "remarks", "share"]

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

    def to_dict(self) -> dict[str, Any]:
        """All figures, for JSON."""
        return asdict(self)


def measure_speed(model: str | Path, progress: console.Progress, settings: Settings = SETTINGS) -> Speed:
    """Run bench on one model directory.

    Raises:
        OVAFMError: It cannot run.
    """
    found = summarize(bench(model, settings=settings, progress=progress).records)[0]

    def median(name: str) -> float | None:
        return found.figures[name].median if name in found.figures else None

    return Speed(
        median("decode_tokens_per_s"),
        median("ttft_ms"),
        median("peak_rss_bytes"),
        median("energy_per_token_j"),
        str(found.get("energy_source")),
    )


def markdown(fidelity: Sequence[Fidelity], extras: Sequence[Extras]) -> str:
    """The card as a Markdown table: a row for each figure, a column for each model.

    Args:
        fidelity: One for each model, in the order of the columns.
        extras: Tasks and speed of each, in the same order.
    """
    rows: list[tuple[str, list[str]]] = [
        ("size of the weights", [human_bytes(each.weights_bytes) for each in fidelity]),
        ("bits per weight", [f"{each.bits_per_weight:.2f}" for each in fidelity]),
    ]
    for results in zip(*(each.tasks for each in extras), strict=True):
        rows.append((f"{results[0].tasks} accuracy", [share(each) for each in results]))
    rows += [
        ("bits per byte of text", [number(each.bits_per_byte) for each in fidelity]),
        ("KL divergence from its reference", [_kl(each) for each in fidelity]),
    ]
    chosen = [each.speed for each in extras]
    rows += [
        ("decode, tokens/s", [_cell(each.decode_tokens_per_s if each else None, number) for each in chosen]),
        ("first token, ms", [_cell(each.ttft_ms if each else None, number) for each in chosen]),
        ("peak memory", [_cell(each.peak_rss_bytes if each else None, human_bytes) for each in chosen]),
        ("energy, J/token", [_energy(each) for each in chosen]),
    ]
    heading = "| | " + " | ".join(each.model for each in fidelity) + " |"
    lines = [f"| {name} | " + " | ".join(cells) + " |" for name, cells in rows]
    return "\n".join([heading, "| --- |" + " ---: |" * len(fidelity), *lines])


def share(result: Result) -> str:
    """Tasks passed of those asked, with the interval."""
    low, high = result.accuracy.low, result.accuracy.high
    interval = "" if low is None or high is None else f" ({low:.0%}–{high:.0%})"
    return f"{result.correct} of {result.total}, {result.accuracy.value:.0%}{interval}"


def _kl(found: Fidelity) -> str:
    return number(found.figures.kl_mean.value) if found.figures.kl_mean else ABSENT


def _cell(value: float | None, show: Callable[[float], str]) -> str:
    return ABSENT if value is None else show(value)


def _energy(speed: Speed | None) -> str:
    if speed is None:
        return ABSENT
    return number(speed.energy_per_token_j) if speed.energy_per_token_j is not None else "no counter"


def remarks(extras: Sequence[Extras]) -> list[str]:
    """What the table cannot say: where energy was read, or why not."""
    return sorted({f"energy: {each.speed.energy_source}" for each in extras if each.speed})
