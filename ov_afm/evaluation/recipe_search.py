"""`ov-afm tune`: search the compression recipe for a size, or for a fidelity.

Every trial is a real compression, judged by KL divergence from the uncompressed model on text that was not calibrated
on. First the formats are tried plain, equalised and fitted; then what is near the bound is refined: attention,
`down_proj` or a share of the layers in 8 bits, head and embedding in 4, scale estimation, GPTQ. Finished trials are
kept: an interrupted search goes on.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ..cli.command import command
from ..cli.command import parser as command_parser
from ..compress import compress
from ..errors import CompressionError, ConfigError, DeviceError
from ..export import export
from ..model_dir.manifest import sha256
from ..presets import Recipe
from ..runtime.devices import check as check_device
from ..system import console, resources
from . import table
from .evaluate import kl
from .trials import Trial, candidates, chosen, front, refinements

__all__ = ["Trial", "chosen", "front", "tune"]


def tune(
    model: str | Path,
    output: str | Path,
    *,
    max_size_gb: float | None = None,
    max_kl: float | None = None,
    device: str | None = None,
    minutes: float = 60.0,
    dataset: str | None = None,
    text: str | Path | None = None,
    tokens: int | None = 4096,
    work_dir: str | Path | None = None,
    progress: console.Progress | None = None,
) -> tuple[Trial, list[Trial]]:
    """Find a recipe and write it to a file for `export --recipe FILE`.

    Args:
        model: What `export` takes, or an uncompressed model directory.
        output: The recipe file, `.json`.
        max_size_gb: Bound of the weights' size, decimal GB.
        max_kl: Bound of the mean KL divergence, nats.
        device: Try only what this device can run.
        minutes: Start no trial that would end after this time; what an earlier run tried does not count.
        dataset: Calibration data; None takes the packaged text.
        text: Evaluation text; None takes the packaged one.
        tokens: Most tokens to evaluate on.
        work_dir: Where models are made; default `OUTPUT.tuning`. Finished trials stay there.
        progress: Where to draw progress.

    Returns:
        The chosen trial, and all.

    Raises:
        ConfigError: No bound was given, one is not positive, or nothing tried keeps to it.
    """
    target = Path(output)
    for name, bound in (("size", max_size_gb), ("KL divergence", max_kl), ("minutes", minutes)):
        if bound is not None and not bound > 0:
            raise ConfigError(f"the bound of {name} must be positive, found {bound}")
    if max_size_gb is None and max_kl is None:
        raise ConfigError("tune needs a bound: add --max-size-gb GB, or --max-kl NATS")
    if target.suffix != ".json":
        raise ConfigError(f"the recipe is written to a .json file, found {target}")
    resources.require("export", "torch", "transformers", "nncf")
    work = Path(work_dir) if work_dir is not None else target.with_suffix(".tuning")
    max_bytes = None if max_size_gb is None else 1e9 * max_size_gb
    with progress if progress is not None else console.Progress() as bars:
        source = Path(model)
        if not (source / "openvino_model.xml").exists():
            source = export(model, work / "fp32", recipe="fp32", golden=False, progress=_Within(bars)).path
        work.mkdir(parents=True, exist_ok=True)
        search = _Search(source, work, device, text, tokens, 60 * minutes, bars)
        search.run(list(candidates(dataset)))
        near = chosen(search.trials, max_bytes, max_kl)
        # Around the bound: the trial that keeps to it, and the next smaller one that does not yet.
        made = front(search.trials)
        at = made.index(near) if near in made else len(made) if max_kl is not None else 0
        for trial in [made[i] for i in (at, at - 1) if 0 <= i < len(made)]:
            search.run(list(refinements(trial)))
    found = chosen(search.trials, max_bytes, max_kl)
    if found is None:
        best = min(search.trials, key=lambda trial: trial.kl_mean if max_kl is not None else trial.weights_bytes)
        raise ConfigError(
            f"no recipe tried keeps to the bound; the nearest is {best.label} with {best.weights_bytes / 1e9:.3f} GB "
            f"and a KL divergence of {best.kl_mean:.4f}"
        )
    _write(target, {"recipe": found.recipe, "found_by": {**asdict(found), "evaluated_tokens": tokens}})
    return found, search.trials


class _Within(console.Progress):
    """Another's bars, for a verb that is called by a verb."""

    def __init__(self, bars: console.Progress) -> None:
        self._bars = bars._bars

    def __enter__(self) -> _Within:
        return self

    def __exit__(self, *exc: object) -> None:
        """The bars are not ours to stop."""


class _Search:
    """Trials of one source, kept in a file."""

    def __init__(
        self,
        source: Path,
        work: Path,
        device: str | None,
        text: str | Path | None,
        tokens: int | None,
        seconds: float,
        bars: console.Progress,
    ) -> None:
        self.source, self.work, self.device, self.bars = source, work, device, bars
        self.text, self.tokens = text, tokens
        self.deadline = time.monotonic() + seconds
        # Longest trial, by rounding: fitted takes several times as long.
        self.longest: dict[str, float] = {}
        self.trials: list[Trial] = []
        self.key = {
            "model": sha256(source / "openvino_model.bin"),
            "text": None if text is None else sha256(Path(text)),
            "tokens": tokens,
        }
        self.known = _read_trials(work / "trials.jsonl", self.key)

    def run(self, wanted: list[tuple[str, Recipe]]) -> None:
        """Try recipes that were not tried yet, as long as there is time."""
        with self.bars.step("trying recipes", total=len(wanted)) as advance:
            for label, recipe in wanted:
                if self._fits(recipe) and not any(trial.recipe == recipe.to_dict() for trial in self.trials):
                    self._one(label, recipe)
                advance(1)

    def _fits(self, recipe: Recipe) -> bool:
        if self.device is None:
            return True
        try:
            check_device(recipe, self.device)
        except DeviceError:
            return False
        return True

    def _one(self, label: str, recipe: Recipe) -> None:
        known = self.known.get(json.dumps(recipe.to_dict(), sort_keys=True))
        if known is not None:
            self._keep(recipe, known)
            return
        expected = self.longest.get(recipe.rounding, max(self.longest.values(), default=0.0))
        if self.trials and time.monotonic() + expected > self.deadline:
            return
        started = time.perf_counter()
        folder = self.work / "trial"
        try:
            compress(self.source, folder, recipe=recipe, force=True, progress=_Within(self.bars))
            found = kl(folder, self.source, self.text, tokens=self.tokens, progress=_Within(self.bars))
            agreement = found.figures.top1_agreement
            trial = Trial(
                label,
                recipe.to_dict(),
                (folder / "openvino_model.bin").stat().st_size,
                found.kl_mean,
                0.0 if agreement is None else agreement.value,
                time.perf_counter() - started,
            )
        except CompressionError as error:
            trial = Trial(label, recipe.to_dict(), refused=str(error))
        shutil.rmtree(folder, ignore_errors=True)
        self._keep(recipe, trial)
        # A log of hours must show that it goes on.
        console.note(f"{label}: " + (trial.refused or _figures(trial)))
        with (self.work / "trials.jsonl").open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({"key": self.key, "trial": asdict(trial)}) + "\n")

    def _keep(self, recipe: Recipe, trial: Trial) -> None:
        self.longest[recipe.rounding] = max(self.longest.get(recipe.rounding, 0.0), trial.seconds)
        self.trials.append(trial)


def _read_trials(path: Path, key: dict[str, Any]) -> dict[str, Trial]:
    """Finished trials of the same model, text and length; a line that a killed run left half is skipped."""
    found: dict[str, Trial] = {}
    if not path.exists():
        return found
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if record["key"] == key:
            trial = Trial(**record["trial"])
            # An older ov_afm recorded fewer fields.
            trial = replace(trial, recipe=Recipe.from_dict(trial.recipe).to_dict())
            found[json.dumps(trial.recipe, sort_keys=True)] = trial
    return found


def _write(path: Path, content: dict[str, Any]) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)


def _table(trials: Sequence[Trial], found: Trial) -> str:
    best = front(trials)
    width = max(len(trial.label) for trial in trials)
    lines = [f"{'recipe':<{width}}  {'size':>9}  {'mean KL':>8}  {'top-1':>6}  {'time':>6}"]
    for trial in sorted(trials, key=lambda each: each.weights_bytes):
        if trial.refused is not None:
            lines.append(f"{trial.label:<{width}}  refused: {trial.refused}")
            continue
        mark = " ← chosen" if trial is found else " *" if trial in best else ""
        figures = f"{trial.kl_mean:>8.4f}  {trial.top1:>6.1%}  {trial.seconds:>4.0f} s"
        lines.append(f"{trial.label:<{width}}  {console.human_bytes(trial.weights_bytes):>9}  {figures}{mark}")
    return "\n".join([*lines, "* no other is both smaller and nearer"])


def _figures(trial: Trial) -> str:
    size = console.human_bytes(trial.weights_bytes)
    return f"{size}, mean KL {trial.kl_mean:.4f}, top-1 {trial.top1:.1%}, {trial.seconds:.0f} s"


def _plot(trials: Sequence[Trial], found: Trial, path: Path) -> None:
    from matplotlib.figure import Figure

    made, best = [trial for trial in trials if trial.refused is None], front(trials)
    figure = Figure(figsize=(7.2, 4.4), layout="constrained")
    axes = figure.add_subplot()
    axes.scatter([trial.weights_bytes / 1e6 for trial in made], [trial.kl_mean for trial in made], color="0.6")
    axes.plot([trial.weights_bytes / 1e6 for trial in best], [trial.kl_mean for trial in best], marker="o")
    for trial in best:
        weight = "bold" if trial is found else "normal"
        place = (trial.weights_bytes / 1e6, trial.kl_mean)
        axes.annotate(trial.label, place, (5, 4), textcoords="offset points", fontsize=7, fontweight=weight)
    axes.set_yscale("log")
    axes.set_xlabel("size of the weights, MB")
    axes.set_ylabel("mean KL divergence, nats")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=130)


@command
def main(argv: Sequence[str] | None = None) -> int:
    """`ov-afm tune`."""
    parser = command_parser("tune", "Search the compression recipe for a size or a fidelity.")
    parser.add_argument("model", help="what `ov-afm export` takes, or an uncompressed model directory")
    parser.add_argument(
        "--output", "-o", required=True, metavar="FILE", help="recipe file (.json), for export --recipe"
    )
    parser.add_argument("--max-size-gb", type=float, metavar="GB", help="most bytes of weights, decimal GB")
    parser.add_argument("--max-kl", type=float, metavar="NATS", help="largest mean KL divergence")
    parser.add_argument("--device", metavar="NAME", help="try only what this device can run")
    parser.add_argument("--minutes", type=float, default=60.0, help="start no trial that would end later")
    parser.add_argument("--dataset", metavar="DATA", help="calibration data instead of the packaged text")
    parser.add_argument("--text", metavar="FILE", help="evaluation text instead of the packaged one")
    parser.add_argument("--tokens", type=int, default=4096, help="most tokens to evaluate on")
    parser.add_argument("--work-dir", metavar="DIR", help="where models are made (default: FILE.tuning)")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="size against KL: .svg, .png, .pdf")
    parser.add_argument("--json", action="store_true", help="print all trials")
    args = parser.parse_args(argv)
    if args.plot is not None:
        resources.require("bench", "matplotlib")
        table.check_format(args.plot)
    options = {name: value for name, value in vars(args).items() if name not in ("model", "output", "plot", "json")}
    found, trials = tune(args.model, args.output, **options)
    if args.plot is not None:
        _plot(trials, found, args.plot)
    if args.json:
        print(json.dumps({"chosen": asdict(found), "trials": [asdict(trial) for trial in trials]}))
    else:
        print(_table(trials, found))
        console.note(f"  use it: ov-afm export {args.model} --recipe {args.output}")
    return 0


if __name__ == "__main__":
    from .recipe_search import main as run

    sys.exit(run())
