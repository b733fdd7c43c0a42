"""`ov-afm bench`: which device, which precision, which options, by figures of this machine.

Every combination runs several times in a separate process, with prompts that no engine has seen, after a
warm-up that is not counted; medians are reported with the least and the most, and beside each
speed what the machine's memory would allow at best.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from ..bench import report
from ..bench.compare import compare
from ..bench.plan import OPTIONS, Settings
from ..bench.prompts import KINDS
from ..bench.records import read
from ..bench.sweep import SETTINGS, bench
from ..system import console
from .command import command, parser
from .options import ov_properties

__all__ = ["main"]


def _parser() -> argparse.ArgumentParser:
    options = parser("bench", "Compare devices, precisions and engine options on this machine.")
    options.add_argument("models", nargs="*", default=argparse.SUPPRESS, metavar="DIR", help="model directories")
    options.add_argument(
        "--device", nargs="+", default=argparse.SUPPRESS, help="devices; all of this machine if not given"
    )
    options.add_argument(
        "--prompt-tokens", nargs="+", type=int, default=list(SETTINGS.prompt_tokens), metavar="N", help="lengths"
    )
    options.add_argument("--new-tokens", type=int, default=SETTINGS.new_tokens, metavar="N", help="answer length")
    options.add_argument("--runs", type=int, default=SETTINGS.runs, metavar="N", help="measured runs of a combination")
    options.add_argument(
        "--concurrency",
        nargs="+",
        type=int,
        default=list(SETTINGS.concurrency),
        metavar="N",
        help="requests at a time, e.g. 1 4 16; more than one on continuous batching",
    )
    options.add_argument(
        "--option", nargs="+", default=[], metavar="NAME", help=f"compare with plain: {', '.join(list(OPTIONS)[1:])}"
    )
    options.add_argument("--draft-model", default=argparse.SUPPRESS, metavar="DIR", help="adds option draft")
    options.add_argument(
        "--num-assistant-tokens", type=int, default=SETTINGS.num_assistant_tokens, metavar="N", help="drafted at once"
    )
    options.add_argument("--threads", type=int, default=argparse.SUPPRESS, metavar="N", help="CPU threads")
    options.add_argument("--prompts", choices=KINDS, default=SETTINGS.prompts, help="text, or random tokens")
    options.add_argument("--seed", type=int, default=SETTINGS.seed, metavar="N", help="of the prompts")
    options.add_argument(
        "--ov-config", action="append", default=[], metavar="KEY=VALUE", help="OpenVINO property; may be given again"
    )
    options.add_argument(
        "--report",
        default=argparse.SUPPRESS,
        metavar="OUT",
        help="folder for records.jsonl, report.md and report.html; an unfinished sweep in it is continued",
    )
    options.add_argument("--json", action="store_true", help="print records as JSON lines instead of a table")
    options.add_argument("--compare", nargs=2, metavar=("A", "B"), default=argparse.SUPPRESS, help="two records.jsonl")
    return options


def _settings(arguments: argparse.Namespace) -> Settings:
    given = vars(arguments)
    options = list(arguments.option)
    if "draft_model" in given and "draft" not in options:
        options.append("draft")
    return Settings(
        devices=tuple(given.get("device", ())),
        prompt_tokens=tuple(arguments.prompt_tokens),
        new_tokens=arguments.new_tokens,
        runs=arguments.runs,
        concurrency=tuple(arguments.concurrency),
        options=tuple(options),
        draft_model=given.get("draft_model"),
        num_assistant_tokens=arguments.num_assistant_tokens,
        threads=given.get("threads"),
        prompts=arguments.prompts,
        seed=arguments.seed,
        properties=ov_properties(arguments.ov_config),
    )


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Run `ov-afm bench`."""
    options = _parser()
    arguments = options.parse_args(argv)
    if hasattr(arguments, "compare"):
        before, after = (Path(each) for each in arguments.compare)
        print(compare(read(before), read(after)))
        return 0
    models = getattr(arguments, "models", [])
    if not models:
        options.error("at least one model directory is needed")
    out = getattr(arguments, "report", None)
    command = "ov-afm bench " + shlex.join(sys.argv[1:] if argv is None else argv)
    with console.Progress() as progress:
        sweep = bench(*models, settings=_settings(arguments), report_dir=out, command=command, progress=progress)
    if arguments.json:
        print("\n".join(json.dumps(record, ensure_ascii=False) for record in sweep.records))
    else:
        print(report.markdown(sweep.records))
    if out is not None and sweep.records:
        console.note(f"report: {Path(out) / report.HTML_NAME}")
    if sweep.interrupted:
        console.note("ov-afm: interrupted; the same command continues from here" if out else "ov-afm: interrupted")
        return 130
    return 0
