"""`ov-afm evaluate`: what compression costs, measured against the model that it was made from.

One answer says nothing of a 4-bit recipe. This compares whole next-token distributions on a text that neither model
was calibrated on: KL divergence, agreement on the first-ranked token, perplexity, each with its confidence interval.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from . import console, manifest
from .errors import ConfigError
from .eval_measure import Summary, summarize
from .eval_run import prepare_reference, score, tokens_of
from .eval_text import BLOCK_TOKENS, load_text
from .loading import locate
from .sources import resolve

__all__ = ["Fidelity", "evaluate", "kl", "main"]


@dataclass(frozen=True, slots=True)
class Fidelity:
    """How a model stands against its reference.

    Attributes:
        model: Name of its folder.
        reference: Name of the reference's folder; None where none was given.
        weights_bytes: Size of its weights on disk.
        text: Name of the evaluation text.
        tokens: Scored tokens.
        blocks: Blocks they were cut into.
        runtime: Precisions it ran at.
        figures: Perplexity, KL divergence and agreement, with intervals.
    """

    model: str
    reference: str | None
    weights_bytes: int
    text: str
    tokens: int
    blocks: int
    runtime: dict[str, str]
    figures: Summary

    @property
    def kl_mean(self) -> float:
        """Mean KL divergence from the reference, nats.

        Raises:
            ConfigError: There was no reference.
        """
        if self.figures.kl_mean is None:
            msg = f"{self.model} was evaluated without a reference"
            raise ConfigError(msg)
        return self.figures.kl_mean.value

    def to_dict(self) -> dict[str, Any]:
        """All figures, for JSON."""
        return asdict(self)


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

    Args:
        model_dir: The model directory.
        reference: Uncompressed model directory, checkpoint folder, or anything that `export` takes; None measures
            perplexity alone. It runs at f32, and its distributions are cached.
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
    """
    content = load_text(text)
    model = locate(model_dir)
    manifest.verify(model)
    with progress if progress is not None else console.Progress() as bars:
        origin = None if reference is None else resolve(reference, progress=bars).path
        blocks = tokens_of(model, content, tokens, block_tokens, origin)
        known = None if origin is None else prepare_reference(origin, blocks, bars)
        scores, runtime = score(model, blocks, known, bars, runtime_defaults=runtime_defaults)
    return Fidelity(
        model.resolve().name,
        known.name if known else None,
        (model / "openvino_model.bin").stat().st_size,
        blocks.text,
        blocks.scored,
        len(blocks.ids),
        runtime,
        summarize(scores),
    )


def kl(
    model_dir: str | Path,
    reference: str | Path,
    text: str | Path | None = None,
    *,
    tokens: int | None = None,
    block_tokens: int = BLOCK_TOKENS,
    progress: console.Progress | None = None,
) -> Fidelity:
    """`evaluate` with a reference, at f32: what a search of recipes asks for each of them; see `Fidelity.kl_mean`."""
    return evaluate(model_dir, reference, text=text, tokens=tokens, block_tokens=block_tokens, progress=progress)


def _parser() -> argparse.ArgumentParser:
    parser = console.parser("evaluate", "Measure what compression costs: KL divergence, agreement, perplexity.")
    parser.add_argument("model", metavar="DIR", help="model directory")
    parser.add_argument(
        "--reference", default=argparse.SUPPRESS, metavar="SOURCE", help="what it was made from: fp16 or fp32 model"
    )
    parser.add_argument("--text", default=argparse.SUPPRESS, metavar="FILE", help="UTF-8 text instead of the packaged")
    parser.add_argument("--tokens", type=int, default=argparse.SUPPRESS, metavar="N", help="use the first N tokens")
    parser.add_argument("--block", type=int, default=BLOCK_TOKENS, metavar="N", help="tokens scored at a time")
    parser.add_argument("--runtime-defaults", action="store_true", help="run as users do: KV cache u8, bf16, kernels")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


@console.command
def main(argv: Sequence[str] | None = None) -> int:
    """Run `ov-afm evaluate`."""
    arguments = _parser().parse_args(argv)
    given = vars(arguments)
    found = evaluate(
        arguments.model,
        given.get("reference"),
        text=given.get("text"),
        tokens=given.get("tokens"),
        block_tokens=arguments.block,
        runtime_defaults=arguments.runtime_defaults,
    )
    print(json.dumps(found.to_dict(), indent=2))
    return 0


if __name__ == "__main__":
    from ov_afm.evaluate import main as run

    sys.exit(run())
