"""`ov-afm evaluate`: what compression costs, measured against the model that it was made from.

One answer says nothing of a 4-bit recipe. This compares whole next-token distributions on a text that neither model
was calibrated on: KL divergence, agreement on the first-ranked token, perplexity, each with its confidence interval.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from . import console, eval_card, eval_extras, eval_table, manifest, resources
from .errors import ConfigError
from .eval_measure import Summary, summarize
from .eval_run import OtherTokenizer, prepare_reference, score, tokens_of
from .eval_text import BLOCK_TOKENS, load_text
from .loading import locate, recipe_of
from .sources import resolve

__all__ = ["Fidelity", "compare", "evaluate", "kl", "main", "uncompressed"]

DEFAULT_PLOT = "size-kl.svg"


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
            msg = f"{self.model} was evaluated without a reference"
            raise ConfigError(msg)
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
    """
    return compare(
        [model_dir],
        reference,
        text=text,
        tokens=tokens,
        block_tokens=block_tokens,
        runtime_defaults=runtime_defaults,
        progress=progress,
    )[0]


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
        msg = "none of these models is uncompressed; add --reference SOURCE (an fp16 or fp32 model, or the checkpoint)"
        raise ConfigError(msg)
    return found[max(found)]


def _parameters(folder: Path) -> int:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return sum(manifest.parameters(manifest.geometry_of(config), tied=bool(config.get("tie_word_embeddings", False))))


def _parser() -> argparse.ArgumentParser:
    parser = console.parser("evaluate", "Measure what compression costs: KL divergence, agreement, perplexity, tasks.")

    def add(where: Any, flag: str, help: str, **kind: Any) -> None:
        where.add_argument(flag, help=help, default=argparse.SUPPRESS, **kind)

    parser.add_argument("models", nargs="*", default=[], metavar="DIR", help="model directories")
    add(
        parser,
        "--reference",
        "what they were made from: an fp32 or fp16 model directory, a checkpoint, or what else export takes",
        metavar="SOURCE",
    )
    add(
        parser,
        "--compare",
        f"model directories for one table and one plot ({DEFAULT_PLOT}, or --plot); the uncompressed one among them is "
        "the reference if none is named",
        nargs="+",
        metavar="DIR",
    )
    add(parser, "--plot", "size against KL: .svg, .png, .pdf", metavar="FILE")
    add(parser, "--text", "UTF-8 text instead of the packaged one", metavar="FILE")
    add(parser, "--tokens", "use the first N tokens of the text", type=int, metavar="N")
    parser.add_argument("--block", type=int, default=BLOCK_TOKENS, metavar="N", help="tokens of a block")
    parser.add_argument(
        "--runtime-defaults", action="store_true", help="run as users do (KV cache u8, bf16, kernels) instead of at f32"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    more = parser.add_argument_group("beyond one text")
    more.add_argument("--long", action="store_true", help="needles and perplexity along the context")
    add(more, "--long-tokens", "longest prompt of --long; the model's context if not given", type=int, metavar="N")
    add(more, "--tasks", "code, math, or .jsonl files of the same form", nargs="+", metavar="NAME")
    add(more, "--harness", "tasks of lm-evaluation-harness (extra: eval)", nargs="+", metavar="TASK")
    add(more, "--task-dir", "folder with the harness's task files, for work offline", metavar="DIR")
    add(more, "--suite", "card: quality, code, math, speed and energy of all models as one table", choices=["card"])
    return parser


@console.command
def main(argv: Sequence[str] | None = None) -> int:
    """Run `ov-afm evaluate`."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    given = vars(arguments)
    models = [*arguments.models, *given.get("compare", [])]
    if not models:
        parser.error("at least one model directory is needed")
    for flag, needed in (("long_tokens", arguments.long), ("task_dir", "harness" in given)):
        if flag in given and not needed:
            parser.error(f"--{flag.replace('_', '-')} needs {'--long' if flag == 'long_tokens' else '--harness'}")
    reference = given.get("reference")
    drawn = given.get("plot", DEFAULT_PLOT if "compare" in given else None)
    if drawn is not None:
        resources.require("bench", "matplotlib")
        eval_table.check_format(Path(drawn))
        reference = reference if reference is not None else uncompressed(models)
    wanted = eval_extras.Wanted(
        text=given.get("text"),
        long=arguments.long,
        long_tokens=given.get("long_tokens"),
        tasks=tuple(given.get("tasks", ("code", "math") if "suite" in given else ())),
        harness=tuple(given.get("harness", ())),
        task_dir=given.get("task_dir"),
        speed="suite" in given,
        runtime_defaults=arguments.runtime_defaults,
    )
    wanted.check()
    with console.Progress() as progress:
        results = compare(
            models,
            reference,
            text=wanted.text,
            tokens=given.get("tokens"),
            block_tokens=arguments.block,
            runtime_defaults=arguments.runtime_defaults,
            peers=wanted.speed,
            progress=progress,
        )
    extras = [eval_extras.measure(model, wanted) for model in models]
    _print(results, extras, card=wanted.speed, as_json=arguments.json)
    if drawn is not None:
        eval_table.plot(results, Path(drawn))
        console.note(f"plot: {drawn}")
    return 0


def _print(results: Sequence[Fidelity], extras: Sequence[eval_extras.Extras], *, card: bool, as_json: bool) -> None:
    if as_json:
        rows = [each.to_dict() | extra.to_dict() for each, extra in zip(results, extras, strict=True)]
        print(json.dumps({"models": rows}, ensure_ascii=False))
        return
    if card:
        print(eval_card.markdown(results, extras))
    else:
        print(eval_table.markdown(results))
    for each, extra in zip(results, extras, strict=True):
        for block in extra.blocks(each.model, tasks=not card):
            print(f"\n{block}")
    notes = eval_table.explanation(results)
    for line in notes + (eval_card.remarks(extras) if card else []):
        console.note(line)


if __name__ == "__main__":
    from ov_afm.evaluate import main as run

    sys.exit(run())
