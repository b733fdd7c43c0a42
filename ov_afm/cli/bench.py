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
from typing import Any

from ..bench import report
from ..bench.compare import compare
from ..bench.plan import OPTIONS, Settings
from ..bench.prompts import KINDS
from ..bench.records import read
from ..bench.sweep import SETTINGS, bench
from ..system import console
from .command import command, command_parser, given
from .options import ov_properties

__all__ = ["main"]


def _parser() -> argparse.ArgumentParser:
    options = command_parser("bench", "Compare devices, precisions and engine options on this machine.")
    options.add_argument("models", nargs="*", metavar="DIR", help="model directories")

    def add(flag: str, field: str, help: str, **kind: Any) -> None:
        """Add an option that sets a field of `Settings`."""
        default = getattr(SETTINGS, field)
        if isinstance(default, tuple):
            kind["nargs"], default = "+", list(default)
        options.add_argument(flag, dest=field, default=default, help=help, **kind)

    add("--device", "devices", "devices; all of this machine if not given", metavar="DEVICE")
    add("--prompt-tokens", "prompt_tokens", "lengths", type=int, metavar="N")
    add("--new-tokens", "new_tokens", "answer length", type=int, metavar="N")
    add("--runs", "runs", "measured runs of a combination", type=int, metavar="N")
    batches = "requests at a time, e.g. 1 4 16; more than one on continuous batching"
    add("--concurrency", "concurrency", batches, type=int, metavar="N")
    add("--option", "options", f"compare with plain: {', '.join(list(OPTIONS)[1:])}", metavar="NAME")
    add("--draft-model", "draft_model", "adds option draft", metavar="DIR")
    add("--num-assistant-tokens", "num_assistant_tokens", "drafted at once", type=int, metavar="N")
    add("--threads", "threads", "CPU threads", type=int, metavar="N")
    add("--prompts", "prompts", "text, or random tokens", choices=KINDS)
    add("--seed", "seed", "of the prompts", type=int, metavar="N")
    properties = "OpenVINO property; may be given again"
    options.add_argument("--ov-config", action="append", default=[], metavar="KEY=VALUE", help=properties)
    folder = "folder for records.jsonl, report.md and report.html; an unfinished sweep in it is continued"
    options.add_argument("--report", metavar="OUT", help=folder)
    options.add_argument("--json", action="store_true", help="print records as JSON lines instead of a table")
    options.add_argument("--compare", nargs=2, metavar=("A", "B"), help="two records.jsonl")
    return options


def _settings(arguments: argparse.Namespace) -> Settings:
    if arguments.draft_model is not None and "draft" not in arguments.options:
        arguments.options = [*arguments.options, "draft"]
    return Settings(**given(Settings, arguments), properties=ov_properties(arguments.ov_config))


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Run `ov-afm bench`."""
    options = _parser()
    arguments = options.parse_args(argv)
    if arguments.compare is not None:
        before, after = (Path(each) for each in arguments.compare)
        print(compare(read(before), read(after)))
        return 0
    if not arguments.models:
        options.error("at least one model directory is needed")
    command = "ov-afm bench " + shlex.join(sys.argv[1:] if argv is None else argv)
    sweep = bench(*arguments.models, settings=_settings(arguments), report_dir=arguments.report, command=command)
    if arguments.json:
        print("\n".join(json.dumps(record, ensure_ascii=False) for record in sweep.records))
    else:
        print(report.markdown(sweep.records))
    if arguments.report is not None and sweep.records:
        console.note(f"report: {Path(arguments.report) / report.HTML_NAME}")
    if sweep.interrupted:
        more = "; the same command continues from here" if arguments.report else ""
        console.note(f"ov-afm: interrupted{more}")
        return 130
    return 0
