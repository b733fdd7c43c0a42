"""How far one next-token distribution is from another, and how sure that figure is.

For each scored token: the reference's and the candidate's negative log-likelihood, the Kullback-Leibler divergence
KL(reference || candidate) in nats over the whole vocabulary, and whether both put the same token first. Intervals are
percentiles of a bootstrap over blocks (Efron 1979): tokens of one passage are not independent, blocks nearly are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["Interval", "Scores", "Summary", "log_softmax", "summarize"]

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
    """What is reported of a candidate.

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


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Log-probabilities over the last axis; sums are taken at f64."""
    import numpy as np

    shifted = logits - logits.max(-1, keepdims=True)
    total = np.exp(shifted).sum(-1, keepdims=True, dtype=np.float64)
    result: NDArray[np.float32] = shifted - np.log(total).astype(np.float32)
    return result


def divergence(log_p: NDArray[np.float32], log_q: NDArray[np.float32]) -> NDArray[np.float32]:
    """KL(p || q) in nats over the last axis; `log_p` need not be normalised to more than its rounding."""
    import numpy as np

    p = np.exp(log_p)
    mass = p.sum(-1, dtype=np.float64)
    # Summed at f64, because for close models it is a small difference of large terms.
    found = (p * (log_p - log_q)).sum(-1, dtype=np.float64) / mass - np.log(mass)
    result: NDArray[np.float32] = np.maximum(found, 0).astype(np.float32)
    return result


def summarize(blocks: list[Scores]) -> Summary:
    """Figures and intervals over all blocks.

    Args:
        blocks: At least one; those of a model with a reference have all fields filled.
    """
    import numpy as np

    draws = np.random.default_rng(0).integers(0, len(blocks), (RESAMPLES, len(blocks))) if len(blocks) > 1 else None
    counts = np.array([len(each.nll) for each in blocks], dtype=np.float64)

    def mean(values: list[NDArray[np.generic]], exponential: bool = False) -> Interval:
        sums = np.array([each.sum(dtype=np.float64) for each in values])
        finish = np.exp if exponential else np.positive
        point = float(finish(sums.sum() / counts.sum()))
        if draws is None:
            return Interval(point, None, None)
        return Interval(point, *_bounds(finish(sums[draws].sum(1) / counts[draws].sum(1))))

    perplexity = mean([each.nll for each in blocks], exponential=True)
    if not len(blocks[0].kl):
        return Summary(perplexity)
    kl = [each.kl for each in blocks]

    def quantile(share: float) -> Interval:
        point = float(np.quantile(np.concatenate(kl), share))
        if draws is None:
            return Interval(point, None, None)
        return Interval(
            point, *_bounds(np.array([np.quantile(np.concatenate([kl[i] for i in d]), share) for d in draws]))
        )

    return Summary(
        perplexity,
        mean([each.reference_nll for each in blocks], exponential=True),
        mean([each.nll - each.reference_nll for each in blocks], exponential=True),
        mean([each.kl for each in blocks]),
        quantile(0.5),
        quantile(0.99),
        max(float(each.max()) for each in kl),
        mean([each.same_top for each in blocks]),
    )


def _bounds(drawn: NDArray[np.float64]) -> tuple[float, float]:
    import numpy as np

    low, high = np.quantile(drawn, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)
