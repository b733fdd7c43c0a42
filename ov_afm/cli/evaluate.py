"""`ov-afm evaluate`: what compression costs, measured against the model that it was made from."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..evaluation import table
from ..evaluation.fidelity import Fidelity, compare, uncompressed
from ..evaluation.server import Server
from ..evaluation.suite import Suite, SuiteResult
from ..evaluation.tasks import PACKAGED, ask, load_tasks
from ..evaluation.text import BLOCK_TOKENS, load_text
from ..system import console, resources
from ..system.interrupt import leave_at_once
from .command import command, parser

__all__ = ["main"]

DEFAULT_PLOT = "size-kl.svg"


def _parser() -> argparse.ArgumentParser:
    options = parser("evaluate", "Measure what compression costs: KL divergence, agreement, perplexity, tasks.")

    def add(where: Any, flag: str, help: str, **kind: Any) -> None:
        where.add_argument(flag, help=help, default=argparse.SUPPRESS, **kind)

    options.add_argument("models", nargs="*", default=[], metavar="DIR", help="model directories")
    add(
        options,
        "--reference",
        "what they were made from: an fp32 or fp16 model directory, a checkpoint, or what else export takes",
        metavar="SOURCE",
    )
    add(
        options,
        "--compare",
        f"model directories for one table and one plot ({DEFAULT_PLOT}, or --plot); the uncompressed one among them is "
        "the reference if none is named",
        nargs="+",
        metavar="DIR",
    )
    add(options, "--plot", "size against KL: .svg, .png, .pdf", metavar="FILE")
    add(options, "--text", "UTF-8 text instead of the packaged one", metavar="FILE")
    add(options, "--tokens", "use the first N tokens of the text", type=int, metavar="N")
    options.add_argument("--block", type=int, default=BLOCK_TOKENS, metavar="N", help="tokens of a block")
    options.add_argument(
        "--runtime-defaults", action="store_true", help="run as users do (KV cache u8, bf16, kernels) instead of at f32"
    )
    options.add_argument("--json", action="store_true", help="print JSON instead of tables")
    more = options.add_argument_group("beyond one text")
    more.add_argument("--long", action="store_true", help="needles and perplexity along the context")
    add(more, "--long-tokens", "longest prompt of --long; the model's context if not given", type=int, metavar="N")
    add(more, "--tasks", "code, math, or .jsonl files of the same form", nargs="+", metavar="NAME")
    add(more, "--server", "give the tasks to an OpenAI-compatible server instead of a model directory", metavar="URL")
    add(more, "--harness", "tasks of lm-evaluation-harness (extra: eval)", nargs="+", metavar="TASK")
    add(more, "--task-dir", "folder with the harness's task files, for work offline", metavar="DIR")
    add(more, "--suite", "card: quality, code, math, speed and energy of all models as one table", choices=["card"])
    return options


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Run `ov-afm evaluate`."""
    options = _parser()
    arguments = options.parse_args(argv)
    given = vars(arguments)
    models = [*arguments.models, *given.get("compare", [])]
    if problem := _problem(given, models):
        options.error(problem)
    if "server" in given:
        return _ask_server(given["server"], given.get("tasks", PACKAGED), as_json=arguments.json)
    reference = given.get("reference")
    plot = given.get("plot", DEFAULT_PLOT if "compare" in given else None)
    if plot is not None:
        resources.require("bench", "matplotlib")
        table.check_format(Path(plot))
        reference = reference if reference is not None else uncompressed(models)
    suite = Suite(
        text=given.get("text"),
        long=arguments.long,
        long_tokens=given.get("long_tokens"),
        tasks=tuple(given.get("tasks", PACKAGED if "suite" in given else ())),
        harness=tuple(given.get("harness", ())),
        task_dir=given.get("task_dir"),
        speed="suite" in given,
        runtime_defaults=arguments.runtime_defaults,
    )
    suite.check()
    text = load_text(suite.text, tokens=given.get("tokens"), block_tokens=arguments.block)
    defaults = arguments.runtime_defaults
    with leave_at_once(), console.Progress() as bars:
        fidelity = compare(models, reference, text, runtime_defaults=defaults, peers=suite.speed, progress=bars)
        results = [suite.measure(model, bars) for model in models]
    _print(fidelity, results, card=suite.speed, as_json=arguments.json)
    if plot is not None:
        table.plot(fidelity, Path(plot))
        console.note(f"plot: {plot}")
    return 0


def _problem(given: dict[str, Any], models: Sequence[str]) -> str | None:
    """Why options do not fit together; None if they do."""
    if "server" in given:
        others = models or set(given) & {"reference", "harness", "suite", "plot"} or given["long"]
        return "--server takes --tasks and --json alone: a server shows no distributions" if others else None
    if not models:
        return "at least one model directory is needed"
    if "long_tokens" in given and not given["long"]:
        return "--long-tokens needs --long"
    return "--task-dir needs --harness" if "task_dir" in given and "harness" not in given else None


def _ask_server(url: str, sets: Sequence[str], *, as_json: bool) -> int:
    loaded = [load_tasks(name) for name in sets]
    server = Server(url)
    with console.Progress() as progress:
        results = [ask(name, tasks, server, progress) for name, tasks in loaded]
    if as_json:
        print(json.dumps({"model": server.model, "tasks": [asdict(each) for each in results]}))
    else:
        print("\n".join(f"{server.model}, {each.tasks}: {each.share}" for each in results))
    return 0


def _print(fidelity: Sequence[Fidelity], results: Sequence[SuiteResult], *, card: bool, as_json: bool) -> None:
    if as_json:
        rows = [each.to_dict() | result.to_dict() for each, result in zip(fidelity, results, strict=True)]
        print(json.dumps({"models": rows}, ensure_ascii=False))
        return
    print(table.card(fidelity, results) if card else table.fidelity_table(fidelity))
    for each, result in zip(fidelity, results, strict=True):
        for block in result.blocks(each.model, tasks=not card):
            print(f"\n{block}")
    for line in table.explanation(fidelity) + (table.card_notes(results) if card else []):
        console.note(line)
