"""Results for people: fidelity of several models as a table and as a plot of size against KL divergence, and the card.

The card shows what a model card promises in words ("code accuracy, math reasoning, energy") as one table that anyone
can make again, for any checkpoint, beside other people's model directories.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..bench.statistics import number
from ..errors import ConfigError
from ..model_dir.outputs import check_file
from ..system.atomic import replacing
from ..system.console import human_bytes, markdown_table
from .divergence import Interval
from .fidelity import Fidelity
from .speed import Speed
from .suite import SuiteResult

__all__ = ["card", "card_notes", "check_format", "explanation", "fidelity_table", "plot", "save"]

ABSENT = "–"
# Nats below which two models are the same: the rounding of the cache shows 4e-8.
SAME_KL = 1e-6
# Formats of a plot, and the field of each that names the program; by it `check_format` knows a plot of ours.
FORMATS = {".svg": "Creator", ".png": "Software", ".pdf": "Creator"}
PROGRAM = "ov_afm"


# Heading and cell of every column.
COLUMNS: dict[str, Callable[[Fidelity], str]] = {
    "model": lambda row: row.model,
    "recipe": lambda row: row.recipe or ABSENT,
    "weights": lambda row: human_bytes(row.weights_bytes),
    "bits/weight": lambda row: f"{row.bits_per_weight:.2f}",
    "mean KL": lambda row: _figure(row.figures.kl_mean),
    "median": lambda row: _figure(row.figures.kl_median, interval=False),
    "99%": lambda row: _figure(row.figures.kl_p99, interval=False),
    "max": lambda row: _cell(row.figures.kl_max, number),
    "same top-1": lambda row: _figure(row.figures.top1_agreement, " %", scale=100),
    "perplexity": lambda row: _figure(row.figures.perplexity),
    "ratio": lambda row: _figure(row.figures.perplexity_ratio),
}


def fidelity_table(results: Sequence[Fidelity]) -> str:
    """A Markdown table with one row for each model, smallest first."""
    ordered = sorted(results, key=lambda each: each.weights_bytes)
    return markdown_table(tuple(COLUMNS), [[cell(each) for cell in COLUMNS.values()] for each in ordered], "llr")


def _figure(figure: Interval | None, unit: str = "", *, scale: float = 1, interval: bool = True) -> str:
    if figure is None:
        return ABSENT
    text = number(scale * figure.value) + unit
    if not interval or figure.low is None or figure.high is None:
        return text
    return f"{text} ({number(scale * figure.low)}–{number(scale * figure.high)})"


def _cell(value: float | None, text: Callable[[float], str]) -> str:
    return ABSENT if value is None else text(value)


def card(fidelity: Sequence[Fidelity], results: Sequence[SuiteResult]) -> str:
    """The card as a Markdown table: a row for each figure, a column for each model.

    Args:
        fidelity: One for each model, in the order of the columns.
        results: Tasks and speed of each, in the same order.
    """
    rows = [
        ["size of the weights", *(human_bytes(each.weights_bytes) for each in fidelity)],
        ["bits per weight", *(f"{each.bits_per_weight:.2f}" for each in fidelity)],
    ]
    for tasks in zip(*(each.tasks for each in results), strict=True):
        rows.append([f"{tasks[0].tasks} accuracy", *(each.share for each in tasks)])
    speeds = [each.speed for each in results]
    rows += [
        ["bits per byte of text", *(number(each.bits_per_byte) for each in fidelity)],
        ["KL divergence from its reference", *(_figure(each.figures.kl_mean, interval=False) for each in fidelity)],
        ["decode, tokens/s", *(_cell(each.decode_tokens_per_s if each else None, number) for each in speeds)],
        ["first token, ms", *(_cell(each.ttft_ms if each else None, number) for each in speeds)],
        ["peak memory", *(_cell(each.peak_rss_bytes if each else None, human_bytes) for each in speeds)],
        ["energy, J/token", *map(_energy, speeds)],
    ]
    return markdown_table(["", *(each.model for each in fidelity)], rows, "lr")


def _energy(speed: Speed | None) -> str:
    if speed is None:
        return ABSENT
    return "no counter" if speed.energy_per_token_j is None else number(speed.energy_per_token_j)


def card_notes(results: Sequence[SuiteResult]) -> list[str]:
    """What the card cannot show: where energy was read, or why not."""
    return sorted({f"energy: {each.speed.energy_source}" for each in results if each.speed})


def explanation(results: Sequence[Fidelity]) -> list[str]:
    """What the figures of the fidelity table mean, a line each."""
    first = results[0]
    lines = [
        f"text: {first.text}, {first.tokens} tokens scored in {first.blocks} blocks; in brackets, 95% intervals "
        "(bootstrap over blocks)"
    ]
    if first.reference:
        lines.append(
            f"KL divergence in nats, top-1 and perplexity ratio are against {first.reference} at f32; 0, 100 % and 1 "
            "would be the same model"
        )
    else:
        lines.append("no reference: add --reference SOURCE (the uncompressed model or checkpoint) for KL divergence")
    lines += sorted({f"runtime: {_runtime(each.runtime)}" for each in results})
    return lines


def _runtime(runtime: dict[str, str]) -> str:
    kernels = ", ReLU² kernels" if runtime.get("kernels", "none") != "none" else ""
    return f"activations {runtime['INFERENCE_PRECISION_HINT']}, KV cache {runtime['KV_CACHE_PRECISION']}{kernels}"


def plot(results: Sequence[Fidelity], path: Path) -> None:
    """Draw size against mean KL divergence; both axes are logarithmic, whiskers are 95% intervals.

    Args:
        results: Those without KL divergence, or with almost none (the reference itself), are left out.
        path: `.svg`, `.png` or `.pdf` file; replaced in one step.

    Raises:
        ConfigError: The format is not one of these, or nothing is left to draw.
        ModuleNotFoundError: matplotlib is not installed.
    """
    check_format(path)
    ordered = sorted(results, key=lambda each: each.weights_bytes)
    points = [(each, kl) for each in ordered if (kl := each.figures.kl_mean) is not None and kl.value > SAME_KL]
    if not points:
        raise ConfigError("nothing to draw: no model differs from the reference", code="plot-empty")
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": "size-kl", "font.size": 10}):
        figure = Figure(figsize=(7.2, 4.4), layout="constrained")
        axes = figure.add_subplot()
        for each, kl in points:
            _point(axes, each, kl)
        axes.set_xscale("log")
        axes.set_yscale("log")
        _size_ticks(axes, [each.weights_bytes / 1e6 for each, _ in points])
        axes.set_xlabel("size of the weights, MB")
        axes.set_ylabel("mean KL divergence, nats")
        axes.set_title(f"Size against fidelity to {points[0][0].reference}", loc="left", fontweight="bold")
        axes.legend(frameon=False)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        save(figure, path)


def save(figure: Any, path: Path) -> None:
    """Write a figure, in one step; the same figure gives the same SVG."""
    metadata: dict[str, str | None] = {FORMATS[path.suffix]: PROGRAM}
    if path.suffix == ".svg":
        metadata["Date"] = None
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=130, metadata=metadata)


def check_format(path: Path) -> None:
    """Refuse a plot file that cannot be written, before the work.

    Raises:
        ConfigError: Unknown suffix, no such folder, or a file of that name that is no plot of ov_afm.
    """
    if path.suffix not in FORMATS:
        raise ConfigError(f"a plot is written as {', '.join(FORMATS)}, found {path.name!r}", code="plot-format")
    if not path.parent.is_dir():
        raise ConfigError(f"no such folder for the plot: {path.parent}", code="plot-folder")
    check_file(path, ours=lambda data: PROGRAM.encode() in data, what="a plot of ov_afm")


def _point(axes: Any, result: Fidelity, kl: Interval) -> None:
    whiskers = None
    if kl.low is not None and kl.high is not None:
        whiskers = [[max(0.0, kl.value - kl.low)], [max(0.0, kl.high - kl.value)]]
    size = result.weights_bytes / 1e6
    axes.errorbar([size], [kl.value], whiskers, marker="o", capsize=3, linestyle="none", label=result.model)


def _size_ticks(axes: Any, sizes: list[float]) -> None:
    from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator, StrMethodFormatter

    low, high = min(sizes) / 1.15, max(sizes) * 1.6
    steps = [base * 10**power for power in range(8) for base in (1, 1.5, 2, 3, 5, 7)]
    axes.set_xlim(low, high)
    axes.xaxis.set_major_locator(FixedLocator([each for each in steps if low <= each <= high]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
