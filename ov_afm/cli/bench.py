"""`ov-afm bench`: which device, which precision, which options, by figures of this machine.

Every combination runs in a process of its own with prompts that no engine has seen, after a warm-up
that is not counted, several times; medians are reported with the least and the most. Beside each
speed stands what the machine's memory would allow at best.
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
from ..bench.plan import OPTIONS, Settings, combinations, obstacle, read_models
from ..bench.prompts import KINDS
from ..bench.records import Store, read
from ..bench.sweep import Runner, Sweep, sweep_id
from ..errors import ConfigError, DeviceError
from ..system import console, resources
from .command import command
from .command import parser as command_parser
from .options import ov_properties

__all__ = ["Sweep", "bench", "main"]

SETTINGS = Settings()


def bench(
    *models: str | Path,
    settings: Settings = SETTINGS,
    report_dir: str | Path | None = None,
    command: str = "",
    progress: console.Progress | None = None,
) -> Sweep:
    """Measure every combination of models, devices, prompt lengths and options that can run here.

    Args:
        models: Model directories.
        settings: What to measure.
        report_dir: Folder for `records.jsonl`, `report.md` and `report.html`; a sweep that is there in part is
            gone on with. None writes nothing.
        command: The command line, for the record.
        progress: Where to draw progress.

    Returns:
        The records; after Ctrl-C those of the runs that were finished.

    Raises:
        SourceError: A model directory is missing, damaged or no text-generation model.
        DeviceError: No combination can run; with the reasons.
        ConfigError: The report folder holds something else, or its records are damaged.
    """
    if not models:
        raise ConfigError("bench needs at least one model directory")
    if report_dir is not None:
        resources.require("bench", "matplotlib")
    known = {model.name: model for model in read_models(models, settings.draft_model)}
    rows = combinations(list(known.values()), settings)
    blocked = {row: reason for row in rows if (reason := obstacle(row, known[row.model], settings))}
    if len(blocked) == len(rows):
        raise DeviceError(f"nothing to measure: {'; '.join(dict.fromkeys(blocked.values()))}")
    folder = None if report_dir is None else Path(report_dir)
    store = Store(folder, sweep_id(list(known.values()), settings))
    sweep = Runner(known, settings, store, blocked, command).run(rows, progress)
    if folder is not None and sweep.records:
        report.write(folder, sweep.records, interrupted=sweep.interrupted)
    return sweep


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("bench", "Compare devices, precisions and engine options on this machine.")
    parser.add_argument("models", nargs="*", default=argparse.SUPPRESS, metavar="DIR", help="model directories")
    parser.add_argument(
        "--device", nargs="+", default=argparse.SUPPRESS, help="devices; all that are here if not given"
    )
    parser.add_argument(
        "--prompt-tokens", nargs="+", type=int, default=list(SETTINGS.prompt_tokens), metavar="N", help="lengths"
    )
    parser.add_argument("--new-tokens", type=int, default=SETTINGS.new_tokens, metavar="N", help="answer length")
    parser.add_argument("--runs", type=int, default=SETTINGS.runs, metavar="N", help="measured runs of a combination")
    parser.add_argument(
        "--concurrency",
        nargs="+",
        type=int,
        default=list(SETTINGS.concurrency),
        metavar="N",
        help="requests at a time, e.g. 1 4 16; more than one on continuous batching",
    )
    parser.add_argument(
        "--option", nargs="+", default=[], metavar="NAME", help=f"compare with plain: {', '.join(list(OPTIONS)[1:])}"
    )
    parser.add_argument("--draft-model", default=argparse.SUPPRESS, metavar="DIR", help="adds option draft")
    parser.add_argument(
        "--num-assistant-tokens", type=int, default=SETTINGS.num_assistant_tokens, metavar="N", help="drafted at once"
    )
    parser.add_argument("--threads", type=int, default=argparse.SUPPRESS, metavar="N", help="CPU threads")
    parser.add_argument("--prompts", choices=KINDS, default=SETTINGS.prompts, help="text, or random tokens")
    parser.add_argument("--seed", type=int, default=SETTINGS.seed, metavar="N", help="of the prompts")
    parser.add_argument(
        "--ov-config", action="append", default=[], metavar="KEY=VALUE", help="OpenVINO property; may be given again"
    )
    parser.add_argument(
        "--report",
        default=argparse.SUPPRESS,
        metavar="OUT",
        help="folder for records.jsonl, report.md and report.html; a sweep that is there in part is gone on with",
    )
    parser.add_argument("--json", action="store_true", help="print records as JSON lines instead of a table")
    parser.add_argument("--compare", nargs=2, metavar=("A", "B"), default=argparse.SUPPRESS, help="two records.jsonl")
    return parser


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
    parser = _parser()
    arguments = parser.parse_args(argv)
    if hasattr(arguments, "compare"):
        before, after = (Path(each) for each in arguments.compare)
        print(compare(read(before), read(after)))
        return 0
    models = getattr(arguments, "models", [])
    if not models:
        parser.error("at least one model directory is needed")
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
        console.note("ov-afm: interrupted; the same command goes on from here" if out else "ov-afm: interrupted")
        return 130
    return 0


if __name__ == "__main__":
    from .bench import main as run

    sys.exit(run())
