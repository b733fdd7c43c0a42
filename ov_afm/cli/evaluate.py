"""`ov-afm evaluate`: what compression costs, measured against the model that it was made from."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
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
from .command import command, command_parser, given

__all__ = ["main"]

DEFAULT_PLOT = "size-kl.svg"


def _parser() -> argparse.ArgumentParser:
    options = command_parser("evaluate", "Measure what compression costs: KL divergence, agreement, perplexity, tasks.")
    add = partial(options.add_argument, default=argparse.SUPPRESS)
    add("models", nargs="*", default=[], metavar="DIR", help="model directories")
    origin = "what they were made from: an fp32 or fp16 model directory, a checkpoint, or what else export takes"
    add("--reference", metavar="SOURCE", help=origin)
    add(
        "--compare",
        nargs="+",
        metavar="DIR",
        help=f"model directories for one table and one plot ({DEFAULT_PLOT}, or --plot); the uncompressed one among "
        "them is the reference if none is named",
    )
    add("--plot", metavar="FILE", help="size against KL: .svg, .png, .pdf")
    add("--text", metavar="FILE", help="UTF-8 text instead of the packaged one")
    add("--tokens", type=int, metavar="N", help="use the first N tokens of the text")
    add("--block", type=int, default=BLOCK_TOKENS, metavar="N", help="tokens of a block")
    users = "run as users do (KV cache u8, bf16, kernels) instead of at f32"
    add("--runtime-defaults", action="store_true", default=False, help=users)
    add("--json", action="store_true", default=False, help="print JSON instead of tables")
    add = partial(options.add_argument_group("beyond one text").add_argument, default=argparse.SUPPRESS)
    add("--long", action="store_true", default=False, help="needles and perplexity along the context")
    add("--long-tokens", type=int, metavar="N", help="longest prompt of --long; the model's context if not given")
    add("--tasks", nargs="+", metavar="NAME", help="code, math, or .jsonl files of the same form")
    server = "give the tasks to an OpenAI-compatible server instead of a model directory"
    add("--server", metavar="URL", help=server)
    add("--harness", nargs="+", metavar="TASK", help="tasks of lm-evaluation-harness (extra: eval)")
    add("--task-dir", metavar="DIR", help="folder with the harness's task files, for work offline")
    suite = "card: quality, code, math, speed and energy of all models as one table"
    add("--suite", choices=["card"], help=suite)
    return options


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Run `ov-afm evaluate`."""
    options = _parser()
    arguments = options.parse_args(argv)
    chosen = vars(arguments)
    models = [*arguments.models, *chosen.get("compare", [])]
    if problem := _problem(chosen, models):
        options.error(problem)
    if "server" in chosen:
        return _ask_server(arguments.server, chosen.get("tasks", PACKAGED), as_json=arguments.json)
    reference = chosen.get("reference")
    plot = chosen.get("plot", DEFAULT_PLOT if "compare" in chosen else None)
    if plot is not None:
        resources.require("bench", "matplotlib")
        table.check_format(Path(plot))
        reference = reference if reference is not None else uncompressed(models)
    packaged = {"tasks": PACKAGED} if "suite" in chosen else {}
    suite = Suite(**packaged | given(Suite, arguments), speed="suite" in chosen)
    suite.check()
    text = load_text(suite.text, tokens=chosen.get("tokens"), block_tokens=arguments.block)
    defaults = arguments.runtime_defaults
    with leave_at_once(), console.Progress() as bars:
        fidelity = compare(models, reference, text, runtime_defaults=defaults, peers=suite.speed, progress=bars)
        results = [suite.measure(model, bars) for model in models]
    _print(fidelity, results, card=suite.speed, as_json=arguments.json)
    if plot is not None:
        table.plot(fidelity, Path(plot))
        console.note(f"plot: {plot}")
    return 0


def _problem(chosen: dict[str, Any], models: Sequence[str]) -> str | None:
    """Why options do not fit together; None if they do."""
    if "server" in chosen:
        others = models or set(chosen) & {"reference", "harness", "suite", "plot"} or chosen["long"]
        return "--server takes --tasks and --json alone: a server shows no distributions" if others else None
    if not models:
        return "at least one model directory is needed"
    if "long_tokens" in chosen and not chosen["long"]:
        return "--long-tokens needs --long"
    return "--task-dir needs --harness" if "task_dir" in chosen and "harness" not in chosen else None


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
