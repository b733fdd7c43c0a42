"""`ov-afm tune`: search the compression recipe for a size, or for a fidelity."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from ..evaluation import table
from ..evaluation.recipe_search import Trial, front, tune
from ..system import console, resources
from .command import command, command_parser, given

__all__ = ["main"]


@command
def main(argv: Sequence[str] | None = None) -> int:
    """`ov-afm tune`."""
    options = command_parser("tune", "Search the compression recipe for a size or a fidelity.")
    options.add_argument("model", help="what `ov-afm export` takes, or an uncompressed model directory")
    recipe = "recipe file (.json), for export --recipe"
    options.add_argument("--output", "-o", required=True, metavar="FILE", help=recipe)
    options.add_argument("--max-size-gb", type=float, metavar="GB", help="most bytes of weights, decimal GB")
    options.add_argument("--max-kl", type=float, metavar="NATS", help="largest mean KL divergence")
    options.add_argument("--device", metavar="NAME", help="try only what this device can run")
    options.add_argument("--minutes", type=float, default=60.0, help="start no trial that would end later")
    options.add_argument("--dataset", metavar="DATA", help="calibration data instead of the packaged text")
    options.add_argument("--text", metavar="FILE", help="evaluation text instead of the packaged one")
    options.add_argument("--tokens", type=int, default=4096, help="most tokens to evaluate on")
    options.add_argument("--work-dir", metavar="DIR", help="where models are made (default: FILE.tuning)")
    options.add_argument("--plot", type=Path, metavar="FILE", help="size against KL: .svg, .png, .pdf")
    options.add_argument("--json", action="store_true", help="print all trials")
    args = options.parse_args(argv)
    if args.plot is not None:
        resources.require("bench", "matplotlib")
        table.check_format(args.plot)
    best, trials = tune(**given(tune, args))
    if args.plot is not None:
        _plot(trials, best, args.plot)
    if args.json:
        print(json.dumps({"chosen": best.to_dict(), "trials": [trial.to_dict() for trial in trials]}))
    else:
        print(_table(trials, best))
        console.note(f"  use it: ov-afm export {args.model} --recipe {args.output}")
    return 0


def _table(trials: Sequence[Trial], chosen: Trial) -> str:
    best = front(trials)
    width = max(len(trial.label) for trial in trials)
    lines = [f"{'recipe':<{width}}  {'size':>9}  {'mean KL':>8}  {'top-1':>6}  {'time':>6}"]
    for trial in sorted(trials, key=lambda each: each.weights_bytes):
        if trial.refused is not None:
            lines.append(f"{trial.label:<{width}}  refused: {trial.refused}")
            continue
        mark = " ← chosen" if trial is chosen else " *" if trial in best else ""
        figures = f"{trial.kl_mean:>8.4f}  {trial.top1:>6.1%}  {trial.seconds:>4.0f} s"
        lines.append(f"{trial.label:<{width}}  {console.human_bytes(trial.weights_bytes):>9}  {figures}{mark}")
    return "\n".join([*lines, "* no other is both smaller and nearer to the uncompressed model"])


def _plot(trials: Sequence[Trial], chosen: Trial, path: Path) -> None:
    from matplotlib.figure import Figure

    compressed, best = [trial for trial in trials if trial.refused is None], front(trials)
    figure = Figure(figsize=(7.2, 4.4), layout="constrained")
    axes = figure.add_subplot()
    axes.scatter(*_points(compressed), color="0.6")
    axes.plot(*_points(best), marker="o")
    for trial, x, y in zip(best, *_points(best), strict=True):
        weight = "bold" if trial is chosen else "normal"
        axes.annotate(trial.label, (x, y), (5, 4), textcoords="offset points", fontsize=7, fontweight=weight)
    axes.set_yscale("log")
    axes.set_xlabel("size of the weights, MB")
    axes.set_ylabel("mean KL divergence, nats")
    axes.grid(alpha=0.3)
    table.save(figure, path)


def _points(trials: Sequence[Trial]) -> tuple[list[float], list[float]]:
    return [trial.weights_bytes / 1e6 for trial in trials], [trial.kl_mean for trial in trials]
