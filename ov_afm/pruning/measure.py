"""What pruning cost, on text that was not calibrated on.

A model with fewer rows in its vocabulary cannot be compared with the original over the whole vocabulary. So pruning
cuts the vocabulary last, and neurons, heads and layers are measured before that. The cut itself changes no logit of a
token that stays, for a text whose tokens all stay. It only takes away the probability of the tokens that it drops,
which is what is reported.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..evaluation.divergence import summarize
from ..evaluation.scoring import prepare_reference, score, tokens_of
from ..evaluation.text import Text
from ..system import console

__all__ = ["measure", "measure_cut"]


def measure(source: Path, pruned: Path, text: Text, progress: console.Progress) -> dict[str, Any]:
    """Perplexity of both, KL and agreement, of checkpoints with one vocabulary; fields as `divergence.Summary`.

    Args:
        source: The original.
        pruned: The pruned checkpoint.
        text: Evaluation text.
        progress: Where to draw progress.
    """
    blocks = tokens_of(pruned, text, source)
    scores, _ = score(pruned, blocks, prepare_reference(source, blocks, progress), progress)
    return asdict(summarize(scores))


def measure_cut(source: Path, cut: Path, rows: Sequence[int], text: Text, progress: console.Progress) -> dict[str, Any]:
    """What can be measured of a checkpoint with some rows of its source's vocabulary.

    Args:
        source: The original.
        cut: The checkpoint with the smaller vocabulary.
        rows: The original's ids of its tokens.
        text: Evaluation text.
        progress: Where to draw progress.

    Returns:
        text; bytes_per_token of the whole text in both vocabularies; same_tokens, whether what is evaluated has the
        same tokens in both; dropped_probability (mean, max) that the original gave to all dropped rows together,
        0 to 1; reference_perplexity of the original, and perplexity of the checkpoint, None unless same_tokens.
    """
    import numpy as np

    before, after = tokens_of(source, text), tokens_of(cut, text)
    reference = prepare_reference(source, before, progress)
    dropped = np.setdiff1d(np.arange(reference.vocab), rows)
    mass, nll = [], []
    for block in range(len(before.ids)):
        expected = reference.expected(block)
        nll.append(expected.nll)
        mass.append(np.exp(expected.log_p(0, len(expected.nll))[:, dropped]).sum(-1, dtype=np.float64))
    same = len(after.ids) == len(before.ids) and all(
        np.array_equal(np.take(rows, new), old) for new, old in zip(after.ids, before.ids, strict=True)
    )
    perplexity = None
    if same:
        scores, _ = score(cut, after, None, progress)
        perplexity = summarize(scores).perplexity.value
    probability = np.concatenate(mass)
    return {
        "text": text.name,
        "bytes_per_token": {"before": before.bytes_per_token, "after": after.bytes_per_token},
        "same_tokens": same,
        "dropped_probability": {"mean": float(probability.mean()), "max": float(probability.max())},
        "reference_perplexity": float(np.exp(np.concatenate(nll).mean(dtype=np.float64))),
        "perplexity": perplexity,
    }
