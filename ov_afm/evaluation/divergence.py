"""How far one next-token distribution is from another, and how sure that figure is.

For each scored token: the reference's and the candidate's negative log-likelihood, the Kullback-Leibler divergence
KL(reference || candidate) in nats over the whole vocabulary, and whether both put the same token first. Intervals are
percentiles of a bootstrap over blocks (Efron 1979): tokens of one passage are not independent, blocks nearly are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["Interval", "Scores", "Summary", "summarize"]

RESAMPLES = 1000
CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class Scores:
    """Figures of every scored token of one block, in order.

    Attributes:
        nll: Negative log-likelihood of the token by the candidate, nats.
        reference_nll: The same by the reference; empty without one.
        kl: KL(reference || candidate) of the distribution that predicts the token, nats; empty without a reference.
        same_top: Whether both models rank the same token first; empty without a reference.
    """

    nll: NDArray[np.float32]
    reference_nll: NDArray[np.float32]
    kl: NDArray[np.float32]
    same_top: NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Interval:
    """A figure with its 95% confidence interval; None where a single block allows none."""

    value: float
    low: float | None
    high: float | None

    def __str__(self) -> str:
        """Three significant digits, with the interval."""
        if self.low is None or self.high is None:
            return f"{self.value:.3g}"
        return f"{self.value:.3g} ({self.low:.3g}–{self.high:.3g})"


@dataclass(frozen=True, slots=True)
class Summary:
    """Figures that are reported of a candidate.

    Attributes:
        perplexity: Of the candidate.
        reference_perplexity: Of the reference on the same tokens; None without one, as all that follow.
        perplexity_ratio: Candidate by reference, paired, so that its interval is narrower than either's.
        kl_mean: Mean KL divergence, nats.
        kl_median: Median.
        kl_p99: 99th percentile.
        kl_max: Largest.
        top1_agreement: Share of tokens for which both models rank the same token first, 0 to 1.
    """

    perplexity: Interval
    reference_perplexity: Interval | None = None
    perplexity_ratio: Interval | None = None
    kl_mean: Interval | None = None
    kl_median: Interval | None = None
    kl_p99: Interval | None = None
    kl_max: float | None = None
    top1_agreement: Interval | None = None


def summarize(blocks: list[Scores]) -> Summary:
    """Figures and intervals over all blocks.

    Args:
        blocks: At least one; those of a model with a reference have all fields filled.
    """
    import numpy as np

    draws = np.random.default_rng(0).integers(0, len(blocks), (RESAMPLES, len(blocks))) if len(blocks) > 1 else None
    counts = np.array([len(each.nll) for each in blocks], dtype=np.float64)

    def interval(point: float, resampled: Callable[[NDArray[np.int64]], NDArray[np.float64]]) -> Interval:
        if draws is None:
            return Interval(point, None, None)
        low, high = np.quantile(resampled(draws), [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
        return Interval(point, float(low), float(high))

    def mean(values: list[NDArray[Any]], exponential: bool = False) -> Interval:
        sums = np.array([each.sum(dtype=np.float64) for each in values])
        finish = np.exp if exponential else np.positive
        point = float(finish(sums.sum() / counts.sum()))
        return interval(point, lambda draws: finish(sums[draws].sum(1) / counts[draws].sum(1)))

    def quantile(values: list[NDArray[Any]], share: float) -> Interval:
        point = float(np.quantile(np.concatenate(values), share))
        return interval(
            point, lambda draws: np.array([np.quantile(np.concatenate([values[i] for i in d]), share) for d in draws])
        )

    perplexity = mean([each.nll for each in blocks], exponential=True)
    if not len(blocks[0].kl):
        return Summary(perplexity)
    kl = [each.kl for each in blocks]
    return Summary(
        perplexity,
        mean([each.reference_nll for each in blocks], exponential=True),
        mean([each.nll - each.reference_nll for each in blocks], exponential=True),
        mean(kl),
        quantile(kl, 0.5),
        quantile(kl, 0.99),
        max(float(each.max()) for each in kl),
        mean([each.same_top for each in blocks]),
    )
