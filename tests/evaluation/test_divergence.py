"""Intervals of figures."""

from __future__ import annotations

import numpy as np

from ov_afm.evaluation.divergence import Interval, Scores, summarize


def test_interval_narrows_with_blocks_and_holds_the_truth() -> None:
    draw = np.random.default_rng(1)
    empty = np.empty(0, dtype=np.float32)

    def interval(blocks: int) -> Interval:
        made = [
            Scores(draw.exponential(2.0, 100).astype(np.float32), empty, empty, empty.astype(bool))
            for _ in range(blocks)
        ]
        return summarize(made).perplexity

    wide, narrow = interval(5), interval(80)
    assert wide.low is not None and wide.high is not None and narrow.low is not None and narrow.high is not None
    assert narrow.low < np.exp(2.0) < narrow.high
    assert narrow.high - narrow.low < 0.5 * (wide.high - wide.low)
    assert interval(1).low is None
