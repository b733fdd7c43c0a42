"""`ov-afm prune`: a checkpoint with fewer parameters, and what that cost."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from ..evaluation import table
from ..pruning import report
from ..pruning.prune import SAMPLES, prune
from ..quantization import calibration
from ..system import resources
from .command import command, command_parser, given

__all__ = ["main"]


@command
def main(argv: Sequence[str] | None = None) -> int:
    """`ov-afm prune`."""
    options = command_parser("prune", "Write a checkpoint with fewer parameters, and measure what that cost.")
    options.add_argument("model", help="checkpoint of a ReLU² model: Hub id, folder or .gguf file")
    options.add_argument("--target-params", metavar="COUNT", help="most parameters that stay, such as 2.8B")
    scripts = "drop tokens with letters of other scripts, such as: latin greek"
    options.add_argument("--keep-scripts", nargs="+", default=[], metavar="NAME", help=scripts)
    options.add_argument("--kv-heads", type=int, metavar="N", help="KV heads that stay in every layer")
    options.add_argument("--output", "-o", required=True, metavar="DIR", help="new checkpoint folder")
    options.add_argument("--dataset", default=calibration.PACKAGED, metavar="DATA", help="calibration text")
    options.add_argument("--num-samples", type=int, default=SAMPLES, help="calibration samples of 256 tokens")
    refit = "keep down_proj and o_proj as they are"
    options.add_argument("--no-refit", dest="refit", action="store_false", help=refit)
    heal = "distil from the original so long"
    options.add_argument("--heal", dest="heal_minutes", type=float, default=0.0, metavar="MINUTES", help=heal)
    options.add_argument("--plot", type=Path, metavar="FILE", help="draw the loss curve of --heal: .svg, .png, .pdf")
    options.add_argument("--text", metavar="FILE", help="evaluation text instead of the packaged one")
    options.add_argument("--force", action="store_true", help="replace an older checkpoint of prune or synth")
    options.add_argument("--json", action="store_true", help="print the report")
    args = options.parse_args(argv)
    if args.plot is not None:
        if not args.heal_minutes:
            options.error("--plot draws the loss curve of healing; add --heal MINUTES")
        resources.require("bench", "matplotlib")
        table.check_format(args.plot)
    result = prune(**given(prune, args))
    if args.plot is not None:
        report.plot(result.report["healing"], args.plot)
    if args.json:
        print(json.dumps({"path": str(result.path), **result.report}))
    else:
        report.show(result.plan, result.report)
        print(f"{result.path}  {result.plan.parameters / 1e9:.3f} B of {result.plan.before / 1e9:.3f} B parameters")
    return 0
