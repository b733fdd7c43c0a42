"""Records of single runs → one summary for each combination."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ..runtime.metrics import Spread, spread
from .plan import Combination
from .records import Record, group

__all__ = ["FIGURES", "Summary", "number", "summarize"]

# Figures of single runs that are summarized, by their names in a record.
FIGURES = (
    "ttft_ms",
    "ttft_repeated_ms",
    "tpot_ms",
    "tpot_p50_ms",
    "tpot_p95_ms",
    "decode_tokens_per_s",
    "prefill_tokens_per_s",
    "total_tokens_per_s",
    "peak_rss_bytes",
    "device_memory_bytes",
    "energy_per_token_j",
)


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

    @property
    def tpot_ms(self) -> Spread | None:
        """Mean time between tokens."""
        return self.figures.get("tpot_ms")

    def get(self, name: str) -> Any:
        """What the records say of the combination as a whole; None where they do not."""
        return self.head.get(name)


def summarize(records: Iterable[Record]) -> list[Summary]:
    """One summary for each combination, in the order of its first record."""
    summaries = []
    for combination, rows in group(records).items():
        good = [row for row in rows if row["status"] == "ok"]
        reason = next((str(row["reason"]) for row in rows if row["status"] != "ok"), None)
        figures = {name: found for name in FIGURES if (found := spread([row.get(name) for row in good]))}
        summaries.append(Summary(combination, reason, (good or rows)[0], len(good), figures))
    return summaries


def number(value: float) -> str:
    """Three significant digits, without an exponent."""
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"
