"""A model beside its reference: what `evaluate` returns, for one model directory or for several."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..conversion.sources import resolve
from ..errors import ConfigError
from ..model_dir import manifest
from ..runtime.loading import locate, recipe_of
from ..system import console
from .divergence import Summary, summarize
from .scoring import OtherTokenizer, prepare_reference, score, tokens_of
from .text import BLOCK_TOKENS, load_text

__all__ = ["Fidelity", "compare", "uncompressed"]


@dataclass(frozen=True, slots=True)
class Fidelity:
    """How a model stands against its reference.

    Attributes:
        model: Name of its folder.
        recipe: Name of its recipe; None where its manifest does not say.
        reference: Name of the reference's folder; None where none was given.
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
            raise ConfigError(f"{self.model} was evaluated without a reference")
        return self.figures.kl_mean.value

    def to_dict(self) -> dict[str, Any]:
        """All figures, for JSON."""
        return {**asdict(self), "bits_per_weight": self.bits_per_weight}


def compare(
    models: Sequence[str | Path],
    reference: str | Path | None = None,
    *,
    text: str | Path | None = None,
    tokens: int | None = None,
    block_tokens: int = BLOCK_TOKENS,
    runtime_defaults: bool = False,
    peers: bool = False,
    progress: console.Progress | None = None,
) -> list[Fidelity]:
    """`evaluate` for several model directories in turn, after a look at all of them.

    Arguments, results and errors are those of `evaluate`; with `peers`, a model whose tokenizer is not the
    reference's is measured without one instead of being refused.
    """
    content = load_text(text)
    folders = [locate(model) for model in models]
    recipes = [recipe_of(manifest.verify(folder)) for folder in folders]
    results = []
    with progress if progress is not None else console.Progress() as bars:
        origin = None if reference is None else resolve(reference, progress=bars).path
        for folder, recipe in zip(folders, recipes, strict=True):
            against = origin
            try:
                blocks = tokens_of(folder, content, tokens, block_tokens, against)
            except OtherTokenizer:
                if not peers:
                    raise
                against = None
                blocks = tokens_of(folder, content, tokens, block_tokens)
            known = None if against is None else prepare_reference(against, blocks, bars)
            scores, runtime = score(folder, blocks, known, bars, runtime_defaults=runtime_defaults)
            figures = summarize(scores)
            results.append(
                Fidelity(
                    folder.resolve().name,
                    recipe.name if recipe else None,
                    known.name if known else None,
                    (folder / "openvino_model.bin").stat().st_size,
                    _parameters(folder),
                    blocks.text,
                    blocks.scored,
                    len(blocks.ids),
                    math.log2(figures.perplexity.value) / blocks.bytes_per_token,
                    runtime,
                    figures,
                )
            )
    return results


def uncompressed(models: Sequence[str | Path]) -> Path:
    """The model directory among these that others can be compared with: the one with the widest weights.

    Raises:
        ConfigError: All are compressed, or have no manifest to tell.
    """
    found = {}
    for model in map(locate, models):
        recipe = recipe_of(manifest.verify(model))
        if recipe is not None and recipe.bits > 8:
            found[recipe.bits] = model
    if not found:
        raise ConfigError(
            "none of these models is uncompressed; add --reference SOURCE (an fp16 or fp32 model, or the checkpoint)"
        )
    return found[max(found)]


def _parameters(folder: Path) -> int:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return sum(manifest.parameters(manifest.geometry_of(config), tied=bool(config.get("tie_word_embeddings", False))))
