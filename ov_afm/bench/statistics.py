"""What repeated runs say: each figure with its range, and one summary for each combination of a sweep.

The median is reported with the least and the most: a mean hides the one run that another program disturbed.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any

from .plan import Combination
from .records import Record, group
from .run import Run

__all__ = ["FIGURES", "Spread", "Summary", "number", "spread", "summarize"]

# Figures of single runs that are summarized, by their names in a record.
FIGURES = tuple(each.name for each in fields(Run) if each.name not in ("run", "generated_tokens"))


@dataclass(frozen=True, slots=True)
class Spread:
    """One figure of several runs.

    Attributes:
        median: Its median.
        least: The smallest.
        most: The largest.
        runs: Number of runs.
    """

    median: float
    least: float
    most: float
    runs: int

    @property
    def noise(self) -> float:
        """Range of the runs as a share of their median; 0 for a median of 0."""
        return (self.most - self.least) / abs(self.median) if self.median else 0.0

    def overlaps(self, other: Spread) -> bool:
        """Whether two ranges share a value, so that their medians may differ by chance."""
        return self.least <= other.most and other.least <= self.most

    def text(self, scale: float = 1) -> str:
        """Median with the least and the most, in units of `scale`."""
        median, least, most = (number(each / scale) for each in (self.median, self.least, self.most))
        return median if self.runs == 1 or least == most else f"{median} ({least}–{most})"


def spread(values: Sequence[float | None]) -> Spread | None:
    """Median, least and most of the runs that measured a figure; None if none did."""
    measured = [value for value in values if value is not None]
    return Spread(statistics.median(measured), min(measured), max(measured), len(measured)) if measured else None


def number(value: float) -> str:
    """Three significant digits, without an exponent down to 0.00001."""
    if value == 0:
        return "0"
    if abs(value) < 1e-5:
        return f"{value:.0e}"
    return f"{value:.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"


@dataclass(frozen=True, slots=True)
class Summary:
    """All runs of a combination.

    Attributes:
        combination: Which one.
        reason: Why it could not run, or failed; None where every run was made.
        head: A record of it, for what is the same in all.
        runs: Runs that were measured.
        figures: Figure to its spread; what no run measured is missing.
    """

    combination: Combination
    reason: str | None
    head: Record
    runs: int
    figures: dict[str, Spread]

    @property
    def emulated(self) -> bool:
        """The NPU's path run on CPU."""
        return bool(self.head["emulated"])

    @property
    def plain(self) -> bool:
        """One request at a time without options, on a real device: what devices and precisions are compared by."""
        row = self.combination
        return bool(self.runs) and row.option == "plain" and row.concurrency == 1 and not self.emulated

    @property
    def series(self) -> str:
        """Model and device, the label of a line or a bar."""
        return f"{self.combination.model} · {self.device}"

    @property
    def device(self) -> str:
        """The device's name, which says where it is an emulation."""
        return "emulated NPU" if self.emulated else self.combination.device

    @property
    def ceiling(self) -> float | None:
        """Tokens a second that memory allows at best; None where it was not measured."""
        value = self.get("ceiling_tokens_per_s")
        return None if value is None else float(value)

    @property
    def ceiling_share(self) -> float | None:
        """Share of the ceiling that decoding reaches."""
        rate = self.figures.get("decode_tokens_per_s")
        return rate.median / self.ceiling if rate and self.ceiling else None

    def get(self, name: str) -> Any:
        """What the records say of the combination as a whole; None where they do not."""
        return self.head.get(name)


def summarize(records: Iterable[Record]) -> list[Summary]:
    """One summary for each combination, in the order of its first record."""
    summaries = []
    for combination, rows in group(records).items():
        measured = [row for row in rows if row["status"] == "ok"]
        reason = next((str(row["reason"]) for row in rows if row["status"] != "ok"), None)
        figures = {name: each for name in FIGURES if (each := spread([row.get(name) for row in measured]))}
        summaries.append(Summary(combination, reason, (measured or rows)[0], len(measured), figures))
    return summaries
