"""Fidelity of several models as one table, and as one plot of size against KL divergence."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError
from ..system.console import human_bytes
from .divergence import Interval

if TYPE_CHECKING:
    from .fidelity import Fidelity

__all__ = ["FORMATS", "explanation", "markdown", "plot"]

HEADINGS = (
    "model",
    "recipe",
    "weights",
    "bits/weight",
    "mean KL",
    "median",
    "99%",
    "max",
    "same top-1",
    "perplexity",
    "ratio",
)
TEXT_COLUMNS = 2
ABSENT = "–"
# Nats below which two models are the same: the rounding of the cache shows 4e-8.
SAME_KL = 1e-6
FORMATS = (".svg", ".png", ".pdf")


def markdown(results: Sequence[Fidelity]) -> str:
    """A Markdown table with one row for each model, smallest first."""
    rows = [_row(each) for each in sorted(results, key=lambda each: each.weights_bytes)]
    rule = ["---"] * TEXT_COLUMNS + ["---:"] * (len(HEADINGS) - TEXT_COLUMNS)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (list(HEADINGS), rule, *rows))


def _row(found: Fidelity) -> list[str]:
    figures = found.figures
    agreement = figures.top1_agreement
    return [
        found.model,
        found.recipe or ABSENT,
        human_bytes(found.weights_bytes),
        f"{found.bits_per_weight:.2f}",
        _figure(figures.kl_mean),
        _figure(figures.kl_median, interval=False),
        _figure(figures.kl_p99, interval=False),
        ABSENT if figures.kl_max is None else number(figures.kl_max),
        ABSENT if agreement is None else _figure(_percent(agreement), " %"),
        _figure(figures.perplexity),
        _figure(figures.perplexity_ratio),
    ]


def _percent(share: Interval) -> Interval:
    low, high = (None if each is None else 100 * each for each in (share.low, share.high))
    return Interval(100 * share.value, low, high)


def _figure(found: Interval | None, unit: str = "", *, interval: bool = True) -> str:
    if found is None:
        return ABSENT
    if not interval or found.low is None or found.high is None:
        return number(found.value) + unit
    return f"{number(found.value)}{unit} ({number(found.low)}–{number(found.high)})"


def number(value: float) -> str:
    """Three significant digits, without an exponent down to 0.00001."""
    if value == 0:
        return "0"
    if abs(value) < 1e-5:
        return f"{value:.0e}"
    digits = max(0, 2 - _magnitude(value))
    return f"{value:.{digits}f}"


def _magnitude(value: float) -> int:
    import math

    return math.floor(math.log10(abs(value)))


def explanation(results: Sequence[Fidelity]) -> list[str]:
    """What the figures of a table mean, a line each."""
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
        results: Those without KL divergence, or with none to speak of (the reference itself), are left out.
        path: `.svg`, `.png` or `.pdf` file; replaced in one step.

    Raises:
        ConfigError: The format is not one of these, or nothing is left to draw.
        ModuleNotFoundError: matplotlib is not installed.
    """
    check_format(path)
    found = [(each, each.figures.kl_mean) for each in sorted(results, key=lambda each: each.weights_bytes)]
    points = [(each, kl) for each, kl in found if kl is not None and kl.value > SAME_KL]
    if not points:
        raise ConfigError("nothing to draw: no model differs from the reference")
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
        temporary = path.with_name(f".{os.getpid()}.{path.name}")
        metadata: Any = {"Date": None} if path.suffix == ".svg" else None
        try:
            figure.savefig(temporary, dpi=130, metadata=metadata)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def check_format(path: Path) -> None:
    """Refuse a plot file that cannot be written, before the work.

    Raises:
        ConfigError: Unknown suffix, or no such folder.
    """
    if path.suffix not in FORMATS:
        raise ConfigError(f"a plot is written as {', '.join(FORMATS)}, found {path.name!r}")
    if not path.parent.is_dir():
        raise ConfigError(f"no such folder for the plot: {path.parent}")


def _point(axes: Any, found: Fidelity, kl: Interval) -> None:
    whiskers = None
    if kl.low is not None and kl.high is not None:
        whiskers = [[max(0.0, kl.value - kl.low)], [max(0.0, kl.high - kl.value)]]
    size = found.weights_bytes / 1e6
    axes.errorbar([size], [kl.value], whiskers, marker="o", capsize=3, linestyle="none", label=found.model)


def _size_ticks(axes: Any, sizes: list[float]) -> None:
    from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator, StrMethodFormatter

    low, high = min(sizes) / 1.15, max(sizes) * 1.6
    steps = [base * 10**power for power in range(8) for base in (1, 1.5, 2, 3, 5, 7)]
    axes.set_xlim(low, high)
    axes.xaxis.set_major_locator(FixedLocator([each for each in steps if low <= each <= high]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
