"""What pruning cost, on text that was not calibrated on.

A model with fewer rows in its vocabulary cannot be compared with the original over the whole vocabulary. So pruning
cuts the vocabulary last, and neurons, heads and layers are measured before that. The cut itself changes no logit of a
token that stays, for a text whose tokens all stay; what it takes away is the probability of the tokens that it drops,
and that is what is said of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..evaluation import scoring
from ..evaluation import text as eval_text
from ..evaluation.divergence import summarize
from ..system import console

__all__ = ["measure", "measure_cut"]


def measure(
    source: Path, pruned: Path, text: str | Path | None, tokens: int | None, progress: console.Progress
) -> dict[str, Any]:
    """Perplexity of both, KL and agreement, of checkpoints with one vocabulary; fields as `eval_measure.Summary`.

    Args:
        source: The original.
        pruned: The pruned checkpoint.
        text: Evaluation text; None takes the packaged one.
        tokens: Most tokens to evaluate on; None for all.
        progress: Where to draw progress.
    """
    blocks = scoring.tokens_of(pruned, eval_text.load_text(text), tokens, eval_text.BLOCK_TOKENS, source)
    scores, _ = scoring.score(pruned, blocks, scoring.prepare_reference(source, blocks, progress), progress)
    return asdict(summarize(scores))


def measure_cut(
    source: Path,
    cut: Path,
    rows: Sequence[int],
    text: str | Path | None,
    tokens: int | None,
    progress: console.Progress,
) -> dict[str, Any]:
    """What is known of a checkpoint with some rows of its source's vocabulary.

    Args:
        source: The original.
        cut: The checkpoint, its vocabulary cut.
        rows: The original's ids of its tokens.
        text: Evaluation text; None takes the packaged one.
        tokens: Most tokens to evaluate on; None for all.
        progress: Where to draw progress.

    Returns:
        text; bytes_per_token of the whole text in both vocabularies; same_tokens, whether what is evaluated has the
        same tokens in both; dropped_probability (mean, max) that the original gave to all dropped rows together,
        0 to 1; reference_perplexity of the original, and perplexity of the checkpoint, None unless same_tokens.
    """
    import numpy as np

    content = eval_text.load_text(text)
    blocks = scoring.tokens_of(source, content, tokens, eval_text.BLOCK_TOKENS)
    mine = scoring.tokens_of(cut, content, tokens, eval_text.BLOCK_TOKENS)
    reference = scoring.prepare_reference(source, blocks, progress)
    dropped = np.setdiff1d(np.arange(reference.vocab), rows)
    mass, nll = [], []
    for block in range(len(blocks.ids)):
        expected = reference.expected(block)
        nll.append(expected.nll)
        mass.append(np.exp(expected.log_p(0, len(expected.nll))[:, dropped]).sum(-1, dtype=np.float64))
    same = len(mine.ids) == len(blocks.ids) and all(
        np.array_equal(np.take(rows, new), old) for new, old in zip(mine.ids, blocks.ids, strict=True)
    )
    perplexity = None
    if same:
        scores, _ = scoring.score(cut, mine, None, progress)
        perplexity = summarize(scores).perplexity.value
    probability = np.concatenate(mass)
    return {
        "text": content.name,
        "bytes_per_token": {"before": blocks.bytes_per_token, "after": mine.bytes_per_token},
        "same_tokens": same,
        "dropped_probability": {"mean": float(probability.mean()), "max": float(probability.max())},
        "reference_perplexity": float(np.exp(np.concatenate(nll).mean(dtype=np.float64))),
        "perplexity": perplexity,
    }
