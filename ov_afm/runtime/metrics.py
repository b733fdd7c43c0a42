"""Records of what a request cost, and what their columns mean.

`ttft_ms` is what a user waits for the first token, queueing behind other requests included;
`tpot_ms` is the mean gap between tokens after it, so that prompt length and decode speed stay apart.
Of repeated runs the median is reported with the least and the most: a mean hides the one run that
another program disturbed.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["RequestMetrics", "Spread", "percentile", "spread"]


@dataclass(frozen=True, slots=True)
class RequestMetrics:
    """What one request measured.

    Attributes:
        prompt_tokens: Tokens of the prompt, template included.
        new_tokens: Tokens generated, an end-of-text token included.
        ttft_ms: Request to first token; the whole time where no token came.
        tpot_ms: Mean time between tokens after the first; None below two tokens.
        total_ms: Request to end.
    """

    prompt_tokens: int
    new_tokens: int
    ttft_ms: float
    tpot_ms: float | None
    total_ms: float

    @property
    def tokens_per_s(self) -> float | None:
        """Decode rate after the first token; None where it was not measured."""
        return 1000 / self.tpot_ms if self.tpot_ms else None

    @classmethod
    def from_times(
        cls, prompt_tokens: int, new_tokens: int, *, start: float, first: float | None, last: float | None, end: float
    ) -> RequestMetrics:
        """The record of a request from clock readings in seconds.

        Args:
            prompt_tokens: Tokens of the prompt.
            new_tokens: Tokens generated.
            start: When the request was made.
            first: When the first token came; None if none came.
            last: When the last token came.
            end: When the request was over.
        """
        tpot_ms = None
        if new_tokens > 1 and first is not None and last is not None:
            tpot_ms = (last - first) * 1000 / (new_tokens - 1)
        return cls(
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            ttft_ms=((end if first is None else first) - start) * 1000,
            tpot_ms=tpot_ms,
            total_ms=(end - start) * 1000,
        )


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


def spread(values: Sequence[float | None]) -> Spread | None:
    """Median, least and most of the runs that measured a figure; None if none did."""
    known = [value for value in values if value is not None]
    return Spread(statistics.median(known), min(known), max(known), len(known)) if known else None


def percentile(values: Sequence[float], percent: float) -> float:
    """The value below which a percentage of values lies, by linear interpolation between neighbours.

    Args:
        values: At least one value.
        percent: 0 to 100.
    """
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    low = math.floor(place)
    high = math.ceil(place)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)
