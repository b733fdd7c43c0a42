"""Search the compression recipe for a size, or for a fidelity.

Every trial is a real compression, judged by KL divergence from the uncompressed model on text that was not used for
calibration. First the formats are tried plain, equalised and fitted; then the trials near the bound are refined:
attention, `down_proj` or a share of the layers in 8 bits, head and embedding in 4, scale estimation, GPTQ. Finished
trials are stored, so that an interrupted search continues.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ..compress import compress
from ..errors import CompressionError, ConfigError
from ..export import export
from ..model_dir import outputs
from ..model_dir.manifest import MODEL_BIN, MODEL_XML, sha256
from ..presets import RECIPES, Equalise, Recipe
from ..runtime.rules import check_name, violations
from ..system import console, resources
from ..system.atomic import write_json
from ..system.json_text import parse
from .fidelity import evaluate

__all__ = ["Trial", "candidates", "chosen", "front", "refinements", "tune"]

GROUP_SIZES = (128, 64, 32)
RATIOS = (0.9, 0.8)
NUM_SAMPLES = 64
# In the work folder, for the model of one trial.
TRIAL_FOLDER = "trial"
FITTED = " + fitted"
EQUALISED = " + equalise"
# Kinds of matrices that gain or lose most by a different format.
KINDS = (("attention", "int8"), ("down", "int8"), ("head", "int4"), ("embedding", "int4"))


@dataclass(frozen=True, slots=True)
class Trial:
    """One recipe, tried.

    Attributes:
        label: What people see.
        recipe: The recipe.
        weights_bytes: Size of `openvino_model.bin`.
        kl_mean: Mean KL divergence from the uncompressed model, nats.
        top1: Share of tokens whose first-ranked token is the same.
        seconds: Time of compression and evaluation.
        refused: Why the model cannot be compressed so; None where it can.
    """

    label: str
    recipe: Recipe
    weights_bytes: int = 0
    kl_mean: float = float("inf")
    top1: float = 0.0
    seconds: float = 0.0
    refused: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """All fields, as JSON values."""
        return {**asdict(self), "recipe": self.recipe.to_dict()}

    @property
    def figures(self) -> str:
        """The result on one line."""
        size = console.human_bytes(self.weights_bytes)
        return f"{size}, mean KL {self.kl_mean:.4f}, top-1 {self.top1:.1%}, {self.seconds:.0f} s"


def candidates(dataset: str | None = None) -> Iterator[tuple[str, Recipe]]:
    """The first round: every format, plain, equalised and fitted; quick ones first."""
    int4 = Recipe("tuned", "int4", sym=True, num_samples=NUM_SAMPLES, dataset=dataset)
    groups = [(f"int4 g{size}", replace(int4, group_size=size)) for size in GROUP_SIZES]
    int8 = replace(RECIPES["int8"], name="tuned", num_samples=NUM_SAMPLES, dataset=dataset)
    for label, plain in [*groups, ("int8", int8)]:
        yield label, plain
        yield f"{label}{EQUALISED}", replace(plain, equalise="full")
    yield f"int4 rows{EQUALISED}", replace(int4, backup_precision="int8_sym", equalise="full")
    for label, plain in groups:
        yield f"{label}{FITTED}", _fitted(plain)
    for label, plain in groups:
        yield f"{label}{EQUALISED}{FITTED}", _fitted(replace(plain, equalise="full"))
    yield "int8-quality", replace(RECIPES["int8-quality"], name="tuned", dataset=dataset)


def refinements(trial: Trial) -> Iterator[tuple[str, Recipe]]:
    """The second round: what could be better than a trial of the first."""
    recipe = trial.recipe
    if recipe.bits != 4:
        return
    base = trial.label.removesuffix(FITTED)
    label, fitted = f"{base}{FITTED}", _fitted(recipe)
    yield label, fitted
    for kind, stored in KINDS:
        yield f"{label}, {kind} {stored}", replace(fitted, kinds=((kind, stored),))
    yield f"{label}, tables too", replace(fitted, all_layers=True)
    for ratio in RATIOS:
        yield f"{label}, {ratio:.0%} of layers", replace(fitted, ratio=ratio)
    if recipe.sym:
        yield f"{label}, asymmetric", replace(fitted, sym=False)
    equalise: Equalise = "full" if recipe.equalise == "full" else "none"
    nearest = replace(recipe, equalise=equalise, rounding="nearest", num_samples=NUM_SAMPLES)
    yield f"{base} + scale estimation", replace(nearest, scale_estimation=True)
    yield f"{base} + GPTQ", replace(nearest, gptq=True)


def _fitted(recipe: Recipe) -> Recipe:
    """A recipe with the rounding of the named `int4-quality`, and its guard where there is no equalisation."""
    quality = RECIPES["int4-quality"]
    equalise = quality.equalise if recipe.equalise == "none" else recipe.equalise
    return replace(recipe, equalise=equalise, rounding=quality.rounding, num_samples=quality.num_samples)


def front(trials: Sequence[Trial]) -> list[Trial]:
    """The trials that no other beats in both size and KL divergence, smallest first."""
    best: list[Trial] = []
    for trial in sorted(trials, key=lambda each: (each.weights_bytes, each.kl_mean)):
        if trial.refused is None and (not best or trial.kl_mean < best[-1].kl_mean):
            best.append(trial)
    return best


def chosen(trials: Sequence[Trial], max_bytes: float | None, max_kl: float | None) -> Trial | None:
    """The most faithful trial of at most `max_bytes`, or the smallest of at most `max_kl`; None if there is none."""
    allowed = [
        trial
        for trial in front(trials)
        if (max_bytes is None or trial.weights_bytes <= max_bytes) and (max_kl is None or trial.kl_mean <= max_kl)
    ]
    if not allowed:
        return None
    return allowed[-1] if max_kl is None else allowed[0]


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
        minutes: Start no trial that would end after this time; trials of an earlier run do not count.
        dataset: Calibration data; None takes the packaged text.
        text: Evaluation text; None takes the packaged one.
        tokens: Most tokens to evaluate on.
        work_dir: Folder for the models of trials; default `OUTPUT.tuning`. Finished trials stay there.
        progress: Where to draw progress.

    Returns:
        The chosen trial, and all.

    Raises:
        ConfigError: No bound was given, one is not positive, no trial keeps to it, or `output` is another file.
        DeviceError: There is no such device.
    """
    target = Path(output)
    for name, bound in (("size", max_size_gb), ("KL divergence", max_kl), ("minutes", minutes)):
        if bound is not None and not bound > 0:
            raise ConfigError(f"the bound of {name} must be positive, found {bound}", code="bound-not-positive")
    if max_size_gb is None and max_kl is None:
        raise ConfigError("tune needs a bound: add --max-size-gb GB, or --max-kl NATS", code="bound-missing")
    if target.suffix != ".json":
        raise ConfigError(f"the recipe is written to a .json file, found {target}", code="recipe-suffix")
    if device is not None:
        check_name(device)
    outputs.check_file(target, ours=_is_result, what="a recipe of ov-afm tune")
    resources.require("export", "torch", "transformers", "nncf")
    work = Path(work_dir) if work_dir is not None else target.with_suffix(".tuning")
    max_bytes = None if max_size_gb is None else 1e9 * max_size_gb
    with progress if progress is not None else console.Progress() as bars:
        source = Path(model)
        if not (source / MODEL_XML).exists():
            source = export(model, work / "fp32", recipe="fp32", golden=False, progress=bars).path
        work.mkdir(parents=True, exist_ok=True)
        # What is there is replaced by every trial, and deleted.
        outputs.check(work / TRIAL_FOLDER, force=True, inputs=[source])
        search = _Search(source, work, device, text, tokens, time.monotonic() + 60 * minutes, bars)
        search.run(list(candidates(dataset)))
        for trial in _near_bound(search.trials, max_bytes, max_kl):
            search.run(list(refinements(trial)))
    best = chosen(search.trials, max_bytes, max_kl)
    if best is None:
        near = min(search.trials, key=lambda trial: trial.kl_mean if max_kl is not None else trial.weights_bytes)
        raise ConfigError(
            f"no recipe tried keeps to the bound; the nearest is {near.label} with {near.weights_bytes / 1e9:.3f} GB "
            f"and a KL divergence of {near.kl_mean:.4f}",
            code="bound-not-met",
        )
    result = {"recipe": best.recipe.to_dict(), "found_by": {**best.to_dict(), "evaluated_tokens": tokens}}
    write_json(target, result)
    return best, search.trials


def _is_result(data: bytes) -> bool:
    """Whether this is the content of a recipe file that `tune` wrote."""
    try:
        fields = parse(data)
    except ValueError:
        return False
    return isinstance(fields, dict) and {"recipe", "found_by"} <= set(fields)


def _near_bound(trials: Sequence[Trial], max_bytes: float | None, max_kl: float | None) -> list[Trial]:
    """The trial that would be chosen, and the next smaller one of the front, which misses the bound."""
    best, candidate = front(trials), chosen(trials, max_bytes, max_kl)
    miss = len(best) if max_kl is not None else 0
    at = miss if candidate is None else best.index(candidate)
    return [best[index] for index in (at, at - 1) if 0 <= index < len(best)]


@dataclass(slots=True)
class _Search:
    """Trials of one model, stored in a file.

    Attributes:
        source: The uncompressed model directory.
        work: Folder for trials.
        device: Try only what this device can run.
        text: Evaluation text.
        tokens: Most tokens to evaluate on.
        deadline: When the last trial must end, by `time.monotonic`.
        bars: Where to draw progress.
        trials: Trials so far.
        longest: Seconds of the longest trial, by rounding: fitted takes several times as long.
    """

    source: Path
    work: Path
    device: str | None
    text: str | Path | None
    tokens: int | None
    deadline: float
    bars: console.Progress
    trials: list[Trial] = field(default_factory=list)
    longest: dict[str, float] = field(default_factory=dict)
    _key: dict[str, Any] = field(init=False)
    _finished: dict[Recipe, Trial] = field(init=False)

    def __post_init__(self) -> None:
        self._key = {
            "model": sha256(self.source / MODEL_BIN),
            "text": None if self.text is None else sha256(Path(self.text)),
            "tokens": self.tokens,
        }
        self._finished = _read_trials(self.work / "trials.jsonl", self._key)

    def run(self, recipes: Sequence[tuple[str, Recipe]]) -> None:
        """Try recipes that were not tried yet, as long as there is time."""
        with self.bars.step("trying recipes", total=len(recipes)) as advance:
            for label, recipe in recipes:
                runs = self.device is None or not violations(recipe, self.device)
                if runs and all(trial.recipe != recipe for trial in self.trials):
                    self._try(label, recipe)
                advance(1)

    def _try(self, label: str, recipe: Recipe) -> None:
        finished = self._finished.get(recipe)
        if finished is not None:
            self._add(finished)
            return
        expected_s = self.longest.get(recipe.rounding, max(self.longest.values(), default=0.0))
        if self.trials and time.monotonic() + expected_s > self.deadline:
            return
        trial = self._measure(label, recipe)
        self._add(trial)
        # The log of a search that takes hours must show that it is alive.
        console.note(f"{label}: {trial.refused or trial.figures}")
        with (self.work / "trials.jsonl").open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({"key": self._key, "trial": trial.to_dict()}) + "\n")

    def _measure(self, label: str, recipe: Recipe) -> Trial:
        started = time.perf_counter()
        folder = self.work / TRIAL_FOLDER
        try:
            compress(self.source, folder, recipe=recipe, force=True, progress=self.bars)
            fidelity = evaluate(folder, self.source, text=self.text, tokens=self.tokens, progress=self.bars)
        except CompressionError as error:
            return Trial(label, recipe, refused=str(error))
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        agreement = fidelity.figures.top1_agreement
        return Trial(
            label,
            recipe,
            fidelity.weights_bytes,
            fidelity.kl_mean,
            0.0 if agreement is None else agreement.value,
            time.perf_counter() - started,
        )

    def _add(self, trial: Trial) -> None:
        rounding = trial.recipe.rounding
        self.longest[rounding] = max(self.longest.get(rounding, 0.0), trial.seconds)
        self.trials.append(trial)


def _read_trials(path: Path, key: dict[str, Any]) -> dict[Recipe, Trial]:
    """Finished trials of the same model, text and length; an incomplete line of a killed run is skipped."""
    trials: dict[Recipe, Trial] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            record = parse(line)
        except ValueError:
            continue
        if record["key"] == key:
            # An older ov_afm recorded fewer fields of a recipe.
            recipe = Recipe.from_dict(record["trial"]["recipe"])
            trials[recipe] = Trial(**{**record["trial"], "recipe": recipe})
    return trials
