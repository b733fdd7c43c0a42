"""`ov-afm prune`: a smaller checkpoint out of a large one, with a report of what that cost.

Neurons go first, by their output energy on calibration text; whole layers where neurons alone would leave the MLPs too
narrow. The result is an ordinary checkpoint that transformers loads and `ov-afm export` exports. What was lost is
measured on text that was not calibrated on, before and after healing.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from . import calibration, console, eval_run, eval_table, eval_text, resources, supervise
from .errors import CompressionError, ConfigError
from .eval_measure import summarize
from .prune_heal import FULL_PARAMETERS
from .prune_plan import Plan, parse_count, plan
from .sources import Source, resolve
from .staging import disk_full_as_error, staging

__all__ = ["Pruned", "prune"]

REPORT = "ov_afm_prune.json"
SAMPLES = 48
# Samples of the same text that healing takes, if there are so many: training sees each too often otherwise.
HEALING_SAMPLES = 1000


@dataclass(frozen=True)
class Pruned:
    """A pruned checkpoint.

    Attributes:
        path: The checkpoint.
        plan: Its shape, and why.
        report: What was dropped, and figures before, after pruning, and after healing.
    """

    path: Path
    plan: Plan
    report: dict[str, Any]


def prune(
    model: str | Path,
    output: str | Path,
    *,
    target_params: str | int,
    dataset: str = calibration.PACKAGED,
    num_samples: int = SAMPLES,
    refit: bool = True,
    heal_minutes: float = 0.0,
    text: str | Path | None = None,
    tokens: int | None = 2048,
    force: bool = False,
    progress: console.Progress | None = None,
) -> Pruned:
    """Write a checkpoint with fewer parameters.

    Args:
        model: Checkpoint of a ReLU² model: Hub id, folder or `.gguf` file.
        output: New checkpoint folder.
        target_params: Most parameters of the result, norms left out, such as "2.8B".
        dataset: Calibration text, see `calibration`.
        num_samples: Samples of 256 tokens.
        refit: Let the neurons that stay take over what they can of the others, by least squares.
        heal_minutes: Minutes of distillation from the original; 0 for none. An interrupted run goes on.
        text: Evaluation text; None takes the packaged one.
        tokens: Most tokens to evaluate on; None for all.
        force: Replace a non-empty `output`.
        progress: Where to draw progress.

    Raises:
        ConfigError: The target cannot be reached, or an option is out of range.
        CompressionError: The model is no ReLU² model, or a weight is not finite.
        SourceError: The model cannot be found or read.
    """
    resources.require("export", "torch", "transformers", "safetensors")
    if heal_minutes < 0:
        msg = f"minutes of healing must not be negative, found {heal_minutes}"
        raise ConfigError(msg)
    calibration.check(dataset)
    if any(part.name == calibration.SELF for part in calibration.parts(dataset)):
        msg = "prune reads its calibration text before there is a model to sample from; give a file, or packaged"
        raise ConfigError(msg)
    target = Path(output)
    with progress if progress is not None else console.Progress() as bars:
        source = _relu2(resolve(model, progress=bars))
        shape = plan(source.config, target_params if isinstance(target_params, int) else parse_count(target_params))
        if heal_minutes and shape.parameters > FULL_PARAMETERS:
            resources.require("heal", "peft")
        # Weights, and with a refit the residual stream after each layer.
        streams = shape.layers * num_samples * calibration.SAMPLE_TOKENS * source.config["hidden_size"]
        resources.check_memory(4.0 * (shape.before + (streams if refit else 0)) + 4e9, "pruning")
        log = resources.log_file(f"prune-{target.name}")
        with staging(target, replace=force) as partial, disk_full_as_error(target.absolute().parent):
            resources.check_disk(partial, {"the pruned checkpoint": 2.0 * shape.parameters})
            arguments = {
                "source": str(source.path),
                "output": str(partial),
                "layers": shape.layers,
                "intermediate": shape.intermediate,
                "dataset": dataset,
                "num_samples": num_samples,
                "refit": refit,
            }
            with bars.step("pruning") as advance:
                made = supervise.run(
                    "ov_afm.prune_model:prune_checkpoint",
                    arguments,
                    log=log,
                    on_event=_relay(advance),
                    died=CompressionError,
                )
            report = {"plan": shape.to_dict(), "refit": refit, **made}
            report["pruned"] = _figures(source.path, partial, text, tokens, bars)
            if heal_minutes:
                report["healing"] = _heal(source, partial, target, dataset, num_samples, heal_minutes, bars, log)
                report["healed"] = _figures(source.path, partial, text, tokens, bars)
            (partial / REPORT).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return Pruned(target, shape, report)


def _relu2(source: Source) -> Source:
    activation = source.config.get("hidden_act")
    if source.prebuilt or activation != "relu2":
        found = "an OpenVINO model" if source.prebuilt else f"activation {activation}"
        msg = f"prune takes checkpoints with a ReLU² MLP, found {found} in {source.id}"
        raise CompressionError(msg)
    return source


def _relay(advance: Any) -> Callable[[dict[str, Any]], None]:
    def show(event: dict[str, Any]) -> None:
        if event["event"] == "progress":
            advance(to=event["done"], total=event["total"])

    return show


def _figures(
    source: Path, pruned: Path, text: str | Path | None, tokens: int | None, bars: console.Progress
) -> dict[str, Any]:
    """Perplexity of both, KL and agreement, on text that was not calibrated on."""
    blocks = eval_run.tokens_of(pruned, eval_text.load_text(text), tokens, eval_text.BLOCK_TOKENS, source)
    scores, _ = eval_run.score(pruned, blocks, eval_run.prepare_reference(source, blocks, bars), bars)
    return asdict(summarize(scores))


def _heal(
    source: Source,
    partial: Path,
    target: Path,
    dataset: str,
    num_samples: int,
    minutes: float,
    bars: console.Progress,
    log: Path,
) -> dict[str, Any]:
    state = target.resolve().with_name(f".{target.name}.healing")
    arguments = {
        "student": str(partial),
        "teacher": str(source.path),
        "state": str(state),
        "dataset": dataset,
        "num_samples": max(num_samples, HEALING_SAMPLES),
        "minutes": minutes,
    }
    with bars.step("healing") as advance:
        result: dict[str, Any] = supervise.run(
            "ov_afm.prune_heal:heal", arguments, log=log, on_event=_relay(advance), died=CompressionError
        )
    shutil.rmtree(state, ignore_errors=True)
    return result


def _plot(healing: dict[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure

    losses = healing["losses"]
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.add_subplot()
    axes.plot([(at + 0.5) * healing["steps"] / len(losses) for at in range(len(losses))], losses)
    axes.set_xlabel("step")
    axes.set_ylabel("KL to the original, training text, nats")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=130)


def _print(result: Pruned) -> None:
    shape, report = result.plan, result.report
    console.note(f"  kept: {shape.reason}")
    if report["layers_dropped"]:
        console.note(f"  layers dropped: {', '.join(map(str, report['layers_dropped']))}")
    speed = report["prefill_tokens_per_s"]
    console.note(f"  prefill in torch at f32: {speed['before']} → {speed['after']} tokens/s")
    if "healing" in report:
        healing = report["healing"]
        losses = " ".join(f"{loss:.2f}" for loss in healing["losses"][:: max(1, len(healing["losses"]) // 10)])
        console.note(f"  healing ({healing['method']}, {healing['steps']} steps), KL on the training text: {losses}")
    for stage in ("pruned", "healed"):
        if stage in report:
            figures = report[stage]
            console.note(
                f"  {stage}: perplexity {figures['reference_perplexity']['value']:.2f} → "
                f"{figures['perplexity']['value']:.2f}, KL {figures['kl_mean']['value']:.3f}, "
                f"top-1 {figures['top1_agreement']['value']:.1%}"
            )
    print(f"{result.path}  {shape.parameters / 1e9:.3f} B of {shape.before / 1e9:.3f} B parameters")


@console.command
def main(argv: Sequence[str] | None = None) -> int:
    """`ov-afm prune`."""
    parser = console.parser("prune", "Write a checkpoint with fewer parameters, and measure what that cost.")
    parser.add_argument("model", help="checkpoint of a ReLU² model: Hub id, folder or .gguf file")
    parser.add_argument("--target-params", required=True, metavar="COUNT", help="such as 2.8B")
    parser.add_argument("--output", "-o", required=True, metavar="DIR", help="new checkpoint folder")
    parser.add_argument("--dataset", default=calibration.PACKAGED, metavar="DATA", help="calibration text")
    parser.add_argument("--num-samples", type=int, default=SAMPLES, help="calibration samples of 256 tokens")
    parser.add_argument("--no-refit", action="store_true", help="keep down_proj as it is")
    parser.add_argument("--heal", type=float, default=0.0, metavar="MINUTES", help="distil from the original so long")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the loss curve of --heal: .svg, .png, .pdf")
    parser.add_argument("--text", metavar="FILE", help="evaluation text instead of the packaged one")
    parser.add_argument("--force", action="store_true", help="replace a folder that is not empty")
    parser.add_argument("--json", action="store_true", help="print the report")
    args = parser.parse_args(argv)
    if args.plot is not None:
        if not args.heal:
            parser.error("--plot draws the loss curve of healing; add --heal MINUTES")
        resources.require("bench", "matplotlib")
        eval_table.check_format(args.plot)
    result = prune(
        args.model,
        args.output,
        target_params=args.target_params,
        dataset=args.dataset,
        num_samples=args.num_samples,
        refit=not args.no_refit,
        heal_minutes=args.heal,
        text=args.text,
        force=args.force,
    )
    if args.plot is not None:
        _plot(result.report["healing"], args.plot)
    if args.json:
        print(json.dumps({"path": str(result.path), **result.report}))
    else:
        _print(result)
    return 0


if __name__ == "__main__":
    from ov_afm.prune import main as run

    sys.exit(run())
