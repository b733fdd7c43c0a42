"""What to use, from the records, by a rule that is stated with the answer.

The rule: of the models and devices measured (no emulations, one request at a time, no options),
the fastest decoder wins, by the mean over prompt lengths; what lies within 5% of it, or cannot be
told from it because the runs overlap at every prompt length, counts as equally fast, and of those
the one that needs least memory wins.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from .statistics import Summary

__all__ = ["RULE", "recommend"]

EQUAL = 0.05
RULE = (
    "Rule: fastest decoding of one request, median of the runs, mean over prompt lengths; of what lies "
    "within 5% of the fastest, or overlaps with its runs at every length, the least peak memory. Emulations do not "
    "take part."
)


def recommend(summaries: Sequence[Summary]) -> list[str]:
    """Sentences for people: what to use, at what price in quality, which options help."""
    series: dict[str, list[Summary]] = {}
    for each in summaries:
        if each.plain and "decode_tokens_per_s" in each.figures:
            series.setdefault(each.series, []).append(each)
    if not series:
        return ["No recommendation: no real device was measured with one request at a time and no options."]
    # Series are compared over the prompt lengths that all of them ran.
    lengths = set.intersection(*({each.combination.prompt_tokens for each in rows} for rows in series.values()))
    shared = {name: [row for row in rows if row.combination.prompt_tokens in lengths] for name, rows in series.items()}
    if not lengths:
        return ["No recommendation: the models and devices measured have no prompt length in common."]
    speeds = {name: statistics.mean(_speed(row) for row in rows) for name, rows in shared.items()}
    fastest = max(speeds, key=lambda name: speeds[name])
    near = [
        name
        for name, speed in speeds.items()
        if speed >= speeds[fastest] * (1 - EQUAL) or _alike(shared[name], shared[fastest])
    ]
    best = min(near, key=lambda name: _memory(shared[name]))
    return [_choice(best, shared, speeds, near), *_quality(best, shared), *_options(summaries), RULE]


def _speed(row: Summary) -> float:
    return row.figures["decode_tokens_per_s"].median


def _alike(one: Sequence[Summary], other: Sequence[Summary]) -> bool:
    """Whether the runs of two series overlap at every prompt length."""
    rates = {row.combination.prompt_tokens: row.figures["decode_tokens_per_s"] for row in other}
    return all(row.figures["decode_tokens_per_s"].overlaps(rates[row.combination.prompt_tokens]) for row in one)


def _memory(rows: Sequence[Summary]) -> float:
    return max(row.figures["peak_rss_bytes"].median for row in rows)


def _choice(best: str, series: dict[str, list[Summary]], speeds: dict[str, float], near: list[str]) -> str:
    rows = series[best]
    longest = max(rows, key=lambda row: row.combination.prompt_tokens)
    wait_ms = longest.figures["ttft_ms"].median
    wait = f"{wait_ms / 1000:.1f} s" if wait_ms >= 1000 else f"{wait_ms:.0f} ms"
    text = (
        f"Use {best}: {speeds[best]:.1f} tokens/s, first token after {wait} for a prompt of "
        f"{longest.combination.prompt_tokens} tokens, {_memory(rows) / 1e9:.2f} GB of memory at most."
    )
    others = sorted((name for name in speeds if name != best), key=lambda name: -speeds[name])
    if not others:
        return f"{text} Nothing else was measured to compare it with."
    comparisons = [
        f"{name} is as fast ({speeds[name]:.1f}) and needs {_memory(series[name]) / 1e9:.2f} GB"
        if name in near
        else f"{name} {speeds[name]:.1f} tokens/s"
        for name in others
    ]
    return f"{text} The others: {'; '.join(comparisons)}."


def _quality(best: str, series: dict[str, list[Summary]]) -> list[str]:
    """What export measured of quality, of which speed says nothing."""
    divergences = {
        rows[0].combination.model: float(rows[0].get("kl_mean"))
        for rows in series.values()
        if rows[0].get("kl_mean") is not None and not rows[0].get("synthetic")
    }
    model = series[best][0].combination.model
    if model not in divergences or len(divergences) < 2:
        return ["Speed only: what a recipe costs in quality is measured by ov-afm evaluate."]
    ranking = ", ".join(f"{name} {value:.3g}" for name, value in sorted(divergences.items(), key=lambda item: item[1]))
    return [f"Quality, as mean KL divergence from the uncompressed model at export (0 is the same): {ranking}."]


def _options(summaries: Sequence[Summary]) -> list[str]:
    """Which options change decode speed: those whose runs do not overlap with the plain engine's."""
    lengths_of: dict[tuple[str, str, str], list[int]] = {}
    plain = {(each.series, each.combination.prompt_tokens): each for each in summaries if each.plain}
    for each in summaries:
        length = each.combination.prompt_tokens
        base = plain.get((each.series, length))
        if base is None or each.emulated or each.combination.option == "plain":
            continue
        ours, rate = base.figures.get("decode_tokens_per_s"), each.figures.get("decode_tokens_per_s")
        if ours is None or rate is None:
            continue
        verdict = "no change beyond noise" if ours.overlaps(rate) else f"{rate.median / ours.median:.2f}× decode speed"
        lengths_of.setdefault((each.combination.option, each.series, verdict), []).append(length)
    sentences = [
        f"{option} on {series}: {verdict} at {', '.join(map(str, lengths))} tokens"
        for (option, series, verdict), lengths in lengths_of.items()
    ]
    return [f"Options against plain: {'; '.join(sentences)}."] if sentences else []
