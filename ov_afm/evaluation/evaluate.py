"""`ov-afm evaluate`: what compression costs, measured against the model that it was made from.

One answer says nothing of a 4-bit recipe. This compares whole next-token distributions on a text that neither model
was calibrated on: KL divergence, agreement on the first-ranked token, perplexity, each with its confidence interval.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..cli.command import command
from ..cli.command import parser as command_parser
from ..system import console, resources
from ..system.interrupt import leave_at_once
from . import scorecard, suite, table
from .fidelity import Fidelity, compare, uncompressed
from .server import Server
from .tasks import PACKAGED, ask, load_tasks
from .text import BLOCK_TOKENS

__all__ = ["Fidelity", "compare", "evaluate", "kl", "main", "uncompressed"]

DEFAULT_PLOT = "size-kl.svg"


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
    parser = command_parser("evaluate", "Measure what compression costs: KL divergence, agreement, perplexity, tasks.")

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
    add(more, "--server", "ask the tasks of an OpenAI-compatible server instead of a model directory", metavar="URL")
    add(more, "--harness", "tasks of lm-evaluation-harness (extra: eval)", nargs="+", metavar="TASK")
    add(more, "--task-dir", "folder with the harness's task files, for work offline", metavar="DIR")
    add(more, "--suite", "card: quality, code, math, speed and energy of all models as one table", choices=["card"])
    return parser


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Run `ov-afm evaluate`."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    given = vars(arguments)
    models = [*arguments.models, *given.get("compare", [])]
    if "server" in given:
        if models or set(given) & {"reference", "harness", "suite", "plot"} or arguments.long:
            parser.error("--server takes --tasks and --json alone: a server shows no distributions")
        return _ask_server(given["server"], given.get("tasks", PACKAGED), as_json=arguments.json)
    if not models:
        parser.error("at least one model directory is needed")
    for flag, needed in (("long_tokens", arguments.long), ("task_dir", "harness" in given)):
        if flag in given and not needed:
            parser.error(f"--{flag.replace('_', '-')} needs {'--long' if flag == 'long_tokens' else '--harness'}")
    reference = given.get("reference")
    drawn = given.get("plot", DEFAULT_PLOT if "compare" in given else None)
    if drawn is not None:
        resources.require("bench", "matplotlib")
        table.check_format(Path(drawn))
        reference = reference if reference is not None else uncompressed(models)
    wanted = suite.Wanted(
        text=given.get("text"),
        long=arguments.long,
        long_tokens=given.get("long_tokens"),
        tasks=tuple(given.get("tasks", PACKAGED if "suite" in given else ())),
        harness=tuple(given.get("harness", ())),
        task_dir=given.get("task_dir"),
        speed="suite" in given,
        runtime_defaults=arguments.runtime_defaults,
    )
    wanted.check()
    with leave_at_once():
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
        extras = [suite.measure(model, wanted) for model in models]
    _print(results, extras, card=wanted.speed, as_json=arguments.json)
    if drawn is not None:
        table.plot(results, Path(drawn))
        console.note(f"plot: {drawn}")
    return 0


def _ask_server(url: str, sets: Sequence[str], *, as_json: bool) -> int:
    loaded = [load_tasks(name) for name in sets]
    server = Server(url)
    with console.Progress() as progress:
        results = [ask(name, tasks, server, progress) for name, tasks in loaded]
    if as_json:
        print(json.dumps({"model": server.model, "tasks": [each.to_dict() for each in results]}))
    else:
        print("\n".join(f"{server.model}, {each.tasks}: {scorecard.share(each)}" for each in results))
    return 0


def _print(results: Sequence[Fidelity], extras: Sequence[suite.Extras], *, card: bool, as_json: bool) -> None:
    if as_json:
        rows = [each.to_dict() | extra.to_dict() for each, extra in zip(results, extras, strict=True)]
        print(json.dumps({"models": rows}, ensure_ascii=False))
        return
    if card:
        print(scorecard.markdown(results, extras))
    else:
        print(table.markdown(results))
    for each, extra in zip(results, extras, strict=True):
        for block in extra.blocks(each.model, tasks=not card):
            print(f"\n{block}")
    notes = table.explanation(results)
    for line in notes + (scorecard.remarks(extras) if card else []):
        console.note(line)


if __name__ == "__main__":
    from .evaluate import main as run

    sys.exit(run())
