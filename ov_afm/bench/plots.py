"""Plots of a comparison, as SVG that takes its colours from the page around it."""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from .plan import Combination
from .statistics import Spread, Summary, number

__all__ = ["draw"]

# Distinct, and at least 3:1 against both the light and the dark page.
COLOURS = ("#2f81d6", "#d9730d", "#2a9d5c", "#b45fcf", "#d1403f", "#1a93a5", "#8a7a1f", "#7d7f87")
# Stand-ins that matplotlib draws with; the page's own colours replace them.
INK, SOFT = "#010203", "#040506"
REPLACED = {INK: "currentColor", SOFT: "var(--line)"}
# Text stays text. Measured in matplotlib's own, wider font, so that any of these fits.
FONTS = "'Segoe UI', Arial, 'DejaVu Sans', sans-serif"
STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "font.family": "DejaVu Sans",
    "font.size": 11,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": SOFT,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": SOFT,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}
WIDTH = 7.2


def draw(summaries: Sequence[Summary]) -> list[tuple[str, str]]:
    """SVG and caption of every plot that the records can fill; emulations are in none.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    import matplotlib

    real = [each for each in summaries if each.runs and not each.emulated]
    drawn = []
    for index, plot in enumerate((_ttft, _decode, _memory, _energy, _batches, _options)):
        style: Any = {**STYLE, "svg.hashsalt": f"plot{index}"}
        with matplotlib.rc_context(style):
            if figure_and_caption := plot(real):
                figure, caption = figure_and_caption
                drawn.append((_svg(figure, index, caption), caption))
    return drawn


def _svg(figure: Any, index: int, title: str) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text[text.index("<svg") :], flags=re.DOTALL)
    for colour, name in REPLACED.items():
        text = text.replace(colour, name)
    text = re.sub(r"font: ([^;\"]*?)'DejaVu Sans'[^;\"]*", lambda match: f"font: {match[1]}{FONTS}", text)
    # Several drawings share a page: their ids must not.
    text = re.sub(r'\bid="', f'id="p{index}-', text)
    text = re.sub(r'(href="#|url\(#)', rf"\1p{index}-", text)
    return text.replace("<svg", f'<svg role="img" aria-label="{title}"', 1)


def _axes(height: float, title: str) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", fontsize=12, fontweight="bold")
    return figure, axes


def _lines(
    title: str,
    rows: Sequence[Summary],
    figure_name: str,
    x_of: Callable[[Combination], int],
    labels: tuple[str, str],
    *,
    scale: float = 1,
) -> tuple[Any, Any]:
    """A line with whiskers for each model and device.

    Args:
        title: Of the plot.
        rows: What to draw.
        figure_name: Figure on the vertical axis.
        x_of: Value on the horizontal axis.
        labels: Of both axes.
        scale: Divides the figure.
    """
    series: dict[str, list[Summary]] = {}
    for each in sorted(rows, key=lambda row: x_of(row.combination)):
        series.setdefault(each.series, []).append(each)
    figure, axes = _axes(4.2, title)
    for index, name in enumerate(dict.fromkeys(each.series for each in rows)):
        spreads = [each.figures[figure_name] for each in series[name]]
        axes.errorbar(
            [x_of(each.combination) for each in series[name]],
            [each.median / scale for each in spreads],
            _whiskers(spreads, scale),
            color=COLOURS[index % len(COLOURS)],
            marker="o",
            capsize=3,
            linewidth=2,
            label=name,
        )
    axes.set_xlabel(labels[0])
    axes.set_ylabel(labels[1])
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.legend(loc="upper left")
    return figure, axes


def _whiskers(spreads: Sequence[Spread], scale: float = 1) -> list[list[float]]:
    return [
        [(each.median - each.least) / scale for each in spreads],
        [(each.most - each.median) / scale for each in spreads],
    ]


def _ttft(real: Sequence[Summary]) -> tuple[Any, str] | None:
    plain = [each for each in real if each.plain]
    if not plain:
        return None
    labels = ("prompt, tokens", "seconds")
    figure, _ = _lines("Time to first token", plain, "ttft_ms", lambda row: row.prompt_tokens, labels, scale=1000)
    return figure, "Time to first token against prompt length; whiskers from the fastest run to the slowest."


def _bars(
    title: str,
    rows: Sequence[tuple[str, Spread]],
    axis: str,
    *,
    scale: float = 1,
    ceilings: Sequence[float | None] = (),
) -> Any:
    """Horizontal bars with whiskers and the median as text; a ceiling is a stroke across its bar."""
    figure, axes = _axes(1.3 + 0.55 * len(rows), title)
    places = list(range(len(rows)))
    spreads = [each for _, each in rows]
    medians = [each.median / scale for each in spreads]
    colours = [COLOURS[place % len(COLOURS)] for place in places]
    axes.barh(places, medians, 0.6, xerr=_whiskers(spreads, scale), color=colours, ecolor=INK, capsize=3)
    right = max([*(each.most / scale for each in spreads), *(each for each in ceilings if each)])
    for place, each in zip(places, spreads, strict=True):
        axes.annotate(
            number(each.median / scale),
            (each.most / scale, place),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
        )
    for place, ceiling in zip(places, ceilings, strict=False):
        if ceiling:
            axes.plot([ceiling, ceiling], [place - 0.4, place + 0.4], color=INK, linewidth=2.5, linestyle=(0, (2, 1)))
    axes.set_yticks(places, [label for label, _ in rows])
    axes.set_xlim(0, right * 1.15)
    axes.set_xlabel(axis)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    return figure


def _at_one_length(real: Sequence[Summary]) -> tuple[int, list[Summary]]:
    """The plain rows of the prompt length that most series have, the middle one of several."""
    plain = [each for each in real if each.plain]
    counts = Counter(each.combination.prompt_tokens for each in plain)
    if not counts:
        return 0, []
    full = sorted(length for length, count in counts.items() if count == max(counts.values()))
    length = full[len(full) // 2]
    return length, [each for each in plain if each.combination.prompt_tokens == length]


def _decode(real: Sequence[Summary]) -> tuple[Any, str] | None:
    length, selected = _at_one_length([each for each in real if "decode_tokens_per_s" in each.figures])
    rows = [(each.series, each.figures["decode_tokens_per_s"]) for each in selected]
    if not rows:
        return None
    ceilings = [each.ceiling for each in selected]
    figure = _bars("Decode speed against the ceiling", rows, "tokens/s", ceilings=ceilings)
    text = f"Decode speed, one request, prompt of {length} tokens; whiskers from the slowest run to the fastest."
    if any(ceilings):
        text += " Dashed: what memory bandwidth allows a dense model at best."
    return figure, text


def _memory(real: Sequence[Summary]) -> tuple[Any, str] | None:
    largest: dict[str, Summary] = {}
    for each in real:
        if each.plain:
            peak = each.figures["peak_rss_bytes"].most
            if each.series not in largest or peak > largest[each.series].figures["peak_rss_bytes"].most:
                largest[each.series] = each
    rows = [(name, each.figures["peak_rss_bytes"]) for name, each in largest.items()]
    if not rows:
        return None
    weights = [float(each.get("model_bytes")) / 1e9 for each in largest.values()]
    figure = _bars("Peak memory", rows, "GB", scale=1e9, ceilings=weights)
    return figure, "Most resident memory of the process at any prompt length; dashed: size of the weights on disk."


def _energy(real: Sequence[Summary]) -> tuple[Any, str] | None:
    length, selected = _at_one_length([each for each in real if "energy_per_token_j" in each.figures])
    rows = [(each.series, each.figures["energy_per_token_j"]) for each in selected]
    if not rows:
        return None
    source = selected[0].get("energy_source")
    return (
        _bars("Energy of a token", rows, "joules"),
        f"Energy of a decoded token, prompt of {length} tokens, idle power subtracted; read from {source}.",
    )


def _batches(real: Sequence[Summary]) -> tuple[Any, str] | None:
    plain = [each for each in real if each.combination.option == "plain"]
    if len({each.combination.concurrency for each in plain}) < 2:
        return None
    length = min(each.combination.prompt_tokens for each in plain if each.combination.concurrency > 1)
    rows = [each for each in plain if each.combination.prompt_tokens == length]
    labels = ("requests at a time", "generated tokens/s, all requests")
    figure, axes = _lines("Several requests at once", rows, "total_tokens_per_s", lambda row: row.concurrency, labels)
    axes.set_xticks(sorted({each.combination.concurrency for each in plain}))
    return figure, f"Throughput of continuous batching, prompts of {length} tokens, prefill included."


def _options(real: Sequence[Summary]) -> tuple[Any, str] | None:
    alone = [each for each in real if each.combination.concurrency == 1 and "decode_tokens_per_s" in each.figures]
    lengths = sorted({each.combination.prompt_tokens for each in alone if each.combination.option != "plain"})
    if not lengths:
        return None
    length = lengths[len(lengths) // 2]
    rows = [
        (f"{each.series} · {each.combination.option}", each.figures["decode_tokens_per_s"])
        for each in alone
        if each.combination.prompt_tokens == length
    ]
    return (
        _bars("Engine options", rows, "tokens/s"),
        f"Decode speed by engine option, one request, prompt of {length} tokens.",
    )
