"""`ov-afm bench --compare`: what changed between two records files, beyond noise.

A change counts where the ranges of the runs do not overlap: the slowest run of one is faster than
the fastest of the other. With five runs a side, two equal programs do that by chance about once in
126 comparisons.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import ConfigError
from ..system.console import markdown_table
from .records import Record
from .statistics import Spread, Summary, summarize

__all__ = ["compare"]

# Figure, heading, whether more is better.
COLUMNS = (
    ("ttft_ms", "TTFT ms", False),
    ("decode_tokens_per_s", "decode tokens/s", True),
    ("total_tokens_per_s", "total tokens/s", True),
    ("peak_rss_bytes", "peak memory MB", False),
    ("energy_per_token_j", "energy J/token", False),
)
WORSE = "**worse**"
# Memory is read once a run of one process, and grows by pages: less than this is no change.
LEAST_CHANGE = 0.01


def compare(before: Sequence[Record], after: Sequence[Record]) -> str:
    """A Markdown table of two sweeps' common combinations, and what only one of them has.

    Args:
        before: Records of the earlier sweep.
        after: Records of the later one.

    Raises:
        ConfigError: They have no measured combination in common.
    """
    old = {each.combination: each for each in summarize(before) if each.runs}
    new = {each.combination: each for each in summarize(after) if each.runs}
    common = [combination for combination in old if combination in new]
    if not common:
        raise ConfigError(
            "the two files have no measured combination (model, device, prompt and new tokens) in common",
            code="nothing-in-common",
        )
    rows = [row for combination in common for row in _rows(old[combination], new[combination])]
    headers = ("combination", "figure", "before", "after", "change", "noise", "verdict")
    blocks = [*_versions(old[common[0]], new[common[0]]), markdown_table(headers, rows, "llrrrrl")]
    for title, only in (("before", old.keys() - new.keys()), ("after", new.keys() - old.keys())):
        if only:
            blocks.append(f"Only {title}: {', '.join(sorted(each.label for each in only))}.")
    worse = sum(row[-1] == WORSE for row in rows)
    verdict = "No figure is worse" if not worse else "1 figure is worse" if worse == 1 else f"{worse} figures are worse"
    blocks.append(f"{verdict} beyond noise (a change counts where the ranges of the runs do not overlap).")
    return "\n\n".join(blocks)


def _versions(old: Summary, new: Summary) -> list[str]:
    changed = []
    before, after = old.get("versions") or {}, new.get("versions") or {}
    for name in sorted(before.keys() | after.keys()):
        if before.get(name) != after.get(name):
            changed.append(f"{name} {before.get(name, 'absent')} → {after.get(name, 'absent')}")
    if old.get("machine") != new.get("machine"):
        changed.append("**another machine or system: speeds are not comparable**")
    return [f"Changed: {', '.join(changed)}."] if changed else []


def _rows(old: Summary, new: Summary) -> list[list[str]]:
    rows = []
    for name, heading, more_is_better in COLUMNS:
        before, after = old.figures.get(name), new.figures.get(name)
        if before is None or after is None or not before.median:
            continue
        change = after.median / before.median - 1
        scale = 1e6 if heading.endswith("MB") else 1
        rows.append(
            [
                old.combination.label,
                heading,
                f"{before.median / scale:.4g}",
                f"{after.median / scale:.4g}",
                f"{change:+.1%}",
                f"±{max(before.noise, after.noise) / 2:.1%}",
                _verdict(before, after, change, more_is_better),
            ]
        )
    return rows


def _verdict(before: Spread, after: Spread, change: float, more_is_better: bool) -> str:
    if before.overlaps(after) or abs(change) < LEAST_CHANGE:
        return "same"
    return "better" if (change > 0) == more_is_better else WORSE
