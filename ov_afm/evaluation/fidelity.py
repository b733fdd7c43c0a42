"""What compression costs: a model beside the one that it was made from.

One answer says nothing of a 4-bit recipe. So whole next-token distributions are compared on a text that neither model
was calibrated on: KL divergence, agreement on the first-ranked token, perplexity, each with its confidence interval.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..conversion.sources import resolve
from ..errors import ConfigError
from ..model_dir.model_directory import ModelDirectory
from ..system import console
from .divergence import Summary, summarize
from .scoring import OtherTokenizer, Reference, prepare_reference, score, tokens_of
from .text import BLOCK_TOKENS, Blocks, Text, load_text

__all__ = ["Fidelity", "compare", "evaluate", "uncompressed"]


@dataclass(frozen=True, slots=True)
class Fidelity:
    """How a model compares with its reference.

    Attributes:
        model: Name of its folder.
        recipe: Name of its recipe; None where its manifest does not say.
        reference: Name of the reference's folder; None without a reference.
        weights_bytes: Size of its weights on disk.
        parameters: Number of its weights, norms left out.
        text: Name of the evaluation text.
        tokens: Scored tokens.
        blocks: Blocks they were cut into.
        bits_per_byte: Of the model on the text: perplexity that does not depend on the tokenizer, so that models of
            different families can be compared.
        runtime: Precisions it ran at.
        figures: Perplexity, KL divergence and agreement, with intervals.
    """

    model: str
    recipe: str | None
    reference: str | None
    weights_bytes: int
    parameters: int
    text: str
    tokens: int
    blocks: int
    bits_per_byte: float
    runtime: dict[str, str]
    figures: Summary

    @property
    def bits_per_weight(self) -> float:
        """Bits on disk for each weight, scales included."""
        return 8 * self.weights_bytes / self.parameters

    @property
    def kl_mean(self) -> float:
        """Mean KL divergence from the reference, nats.

        Raises:
            ConfigError: There was no reference.
        """
        if self.figures.kl_mean is None:
            raise ConfigError(f"{self.model} was evaluated without a reference", code="no-reference")
        return self.figures.kl_mean.value

    def to_dict(self) -> dict[str, Any]:
        """All figures, for JSON."""
        return {**asdict(self), "bits_per_weight": self.bits_per_weight}


def evaluate(
    model_dir: str | Path,
    reference: str | Path | None = None,
    *,
    text: str | Path | None = None,
    tokens: int | None = None,
    block_tokens: int = BLOCK_TOKENS,
    runtime_defaults: bool = False,
    progress: console.Progress | None = None,
) -> Fidelity:
    """Compare a model directory with what it was made from, on CPU.

    What was computed before, of the reference or of the model, comes from the cache.

    Args:
        model_dir: The model directory.
        reference: Uncompressed model directory, checkpoint folder, or anything that `export` takes; None measures
            perplexity alone. It always runs at f32.
        text: UTF-8 text file; None takes the packaged one.
        tokens: Most tokens to use.
        block_tokens: Tokens of a block; each is scored from an empty cache.
        runtime_defaults: Run the candidate as `Pipeline` does, KV cache u8 and bf16 included, instead of at f32.
        progress: Where to draw progress.

    Returns:
        The figures.

    Raises:
        ConfigError: The text is empty or too short, or the reference has another tokenizer or vocabulary.
        SourceError: A model is missing or damaged.
        OVAFMError: A model does not fit in memory, or gives logits that are not finite.

    Example:
        kl = evaluate("afm-int4", "arcee-ai/AFM-4.5B", tokens=4096).kl_mean
    """
    content = load_text(text, tokens=tokens, block_tokens=block_tokens)
    return compare([model_dir], reference, content, runtime_defaults=runtime_defaults, progress=progress)[0]


def compare(
    models: Sequence[str | Path],
    reference: str | Path | None,
    text: Text,
    *,
    runtime_defaults: bool = False,
    peers: bool = False,
    progress: console.Progress | None = None,
) -> list[Fidelity]:
    """`evaluate` for several model directories in turn, after a check of all of them.

    Results and errors are those of `evaluate`; with `peers`, a model whose tokenizer is not the reference's is
    measured without one instead of being refused.
    """
    directories = [ModelDirectory.open(model) for model in models]
    results = []
    with progress if progress is not None else console.Progress() as bars:
        origin = None if reference is None else resolve(reference, progress=bars).path
        for model in directories:
            try:
                blocks, compared = tokens_of(model.path, text, origin), origin
            except OtherTokenizer:
                if not peers:
                    raise
                blocks, compared = tokens_of(model.path, text), None
            prepared = None if compared is None else prepare_reference(compared, blocks, bars)
            scores, runtime = score(model.path, blocks, prepared, bars, runtime_defaults=runtime_defaults)
            results.append(_fidelity(model, prepared, blocks, runtime, summarize(scores)))
    return results


def _fidelity(
    model: ModelDirectory, reference: Reference | None, blocks: Blocks, runtime: dict[str, str], figures: Summary
) -> Fidelity:
    return Fidelity(
        model=model.name,
        recipe=model.recipe.name if model.recipe else None,
        reference=reference.name if reference else None,
        weights_bytes=model.weights_bytes,
        parameters=model.parameters,
        text=blocks.text,
        tokens=blocks.scored,
        blocks=len(blocks.ids),
        bits_per_byte=math.log2(figures.perplexity.value) / blocks.bytes_per_token,
        runtime=runtime,
        figures=figures,
    )


def uncompressed(models: Sequence[str | Path]) -> Path:
    """The model directory among these that others can be compared with: the one with the widest weights.

    Raises:
        ConfigError: All are compressed, or have no manifest that says otherwise.
    """
    by_bits = {each.recipe.bits: each.path for each in map(ModelDirectory.open, models) if each.recipe}
    if max(by_bits, default=0) <= 8:
        raise ConfigError(
            "none of these models is uncompressed; add --reference SOURCE (an fp16 or fp32 model, or the checkpoint)",
            code="no-reference",
        )
    return by_bits[max(by_bits)]
