"""`ov-afm prune`: a smaller checkpoint out of a large one, with a report of what that cost.

Where it is asked for, rows of the vocabulary go for scripts that are not wanted, and KV heads with their query heads.
To reach a number of parameters neurons go, by their output energy on calibration text; whole layers where neurons alone
would leave the MLPs too narrow. The result is an ordinary checkpoint that transformers loads and `ov-afm export`
exports. What was lost is measured on text that was not calibrated on, before and after healing; the vocabulary is cut
after that.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..cli.command import command
from ..cli.command import parser as command_parser
from ..conversion.sources import Source, resolve
from ..errors import CompressionError, ConfigError
from ..evaluation import table
from ..model_dir.manifest import geometry_of
from ..quantization import calibration
from ..system import child_process, console, resources
from ..system.atomic import disk_full_as_error, staging
from . import measure, vocabulary
from . import report as prune_report
from .distill import FULL_PARAMETERS
from .plan import Plan, parse_count, plan
from .vocabulary import Cut

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
    target_params: str | int | None = None,
    keep_scripts: Sequence[str] = (),
    kv_heads: int | None = None,
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
        target_params: Most parameters of the result, norms left out, such as "2.8B"; None where the two options that
            follow say all. What they take counts towards it.
        keep_scripts: Scripts whose tokens stay in the vocabulary, such as "latin", see `prune_vocabulary`; none given
            keeps all.
        kv_heads: KV heads that stay in every layer, with their query heads; None keeps all.
        dataset: Calibration text, see `calibration`.
        num_samples: Samples of 256 tokens.
        refit: Let the neurons and heads that stay take over what they can of the others, by least squares.
        heal_minutes: Minutes of distillation from the original; 0 for none. An interrupted run goes on.
        text: Evaluation text; None takes the packaged one.
        tokens: Most tokens to evaluate on; None for all.
        force: Replace a non-empty `output`.
        progress: Where to draw progress.

    Raises:
        ConfigError: The target cannot be reached, or an option is out of range.
        CompressionError: The model is no ReLU² model, its tokenizer no byte-level BPE where that is needed, or a weight
            is not finite.
        SourceError: The model cannot be found or read.
    """
    resources.require("export", "torch", "transformers", "safetensors")
    if target_params is None and not keep_scripts and kv_heads is None:
        raise ConfigError("nothing to prune; give --target-params, --keep-scripts or --kv-heads")
    options = _Options(dataset, num_samples, refit, heal_minutes, text, tokens)
    options.check()
    target = Path(output)
    with progress if progress is not None else console.Progress() as bars:
        source = _relu2(resolve(model, progress=bars))
        most = parse_count(target_params) if isinstance(target_params, str) else target_params
        cut = vocabulary.plan_cut(source.path, source.config, keep_scripts) if keep_scripts else None
        shape = plan(source.config, most, vocab=len(cut.rows) if cut else None, kv_heads=kv_heads)
        options.check_resources(source, shape)
        log = resources.log_file(f"prune-{target.name}")
        with staging(target, replace=force) as partial, disk_full_as_error(target.absolute().parent):
            copies = 2 if cut and shape.narrowed else 1
            resources.check_disk(partial, {"the pruned checkpoint": copies * 2.0 * shape.before})
            report: dict[str, Any] = {"plan": shape.to_dict(), "refit": refit}
            whole = source.path
            if shape.narrowed:
                # All rows are there until the rest is measured and healed, so that it compares with the original.
                whole = partial / "whole" if cut else partial
                report |= _narrow(source, whole, target, shape, options, bars, log)
            if cut:
                report["vocabulary"] = _cut(source, whole, partial, cut, options, bars, log)
                shutil.rmtree(partial / "whole", ignore_errors=True)
            (partial / REPORT).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return Pruned(target, shape, report)


@dataclass(frozen=True)
class _Options:
    """Arguments of `prune` that its steps share."""

    dataset: str
    num_samples: int
    refit: bool
    heal_minutes: float
    text: str | Path | None
    tokens: int | None

    def check(self) -> None:
        if self.heal_minutes < 0:
            raise ConfigError(f"minutes of healing must not be negative, found {self.heal_minutes}")
        calibration.check(self.dataset)
        if any(part.name == calibration.SELF for part in calibration.parts(self.dataset)):
            raise ConfigError(
                "prune reads its calibration text before there is a model to sample from; give a file, or packaged"
            )

    def check_resources(self, source: Source, shape: Plan) -> None:
        if self.heal_minutes and not shape.narrowed:
            raise ConfigError("rows of the vocabulary alone leave nothing to heal; leave --heal out, or prune more")
        if self.heal_minutes and shape.parameters > FULL_PARAMETERS:
            resources.require("heal", "peft")
        # Weights, and with a refit the residual stream after each layer; where heads go, after its attention too.
        streams = 0
        if self.refit and shape.narrowed:
            each = self.num_samples * calibration.SAMPLE_TOKENS * source.config["hidden_size"]
            streams = shape.layers * each * (2 if shape.kv_heads < geometry_of(source.config)["kv_heads"] else 1)
        resources.check_memory(4.0 * (shape.before + streams) + 4e9, "pruning")


def _relu2(source: Source) -> Source:
    activation = source.config.get("hidden_act")
    if source.prebuilt or activation != "relu2":
        found = "an OpenVINO model" if source.prebuilt else f"activation {activation}"
        raise CompressionError(f"prune takes checkpoints with a ReLU² MLP, found {found} in {source.id}")
    return source


def _relay(advance: Any) -> Callable[[dict[str, Any]], None]:
    def show(event: dict[str, Any]) -> None:
        if event["event"] == "progress":
            advance(to=event["done"], total=event["total"])

    return show


def _narrow(
    source: Source, output: Path, target: Path, shape: Plan, options: _Options, bars: console.Progress, log: Path
) -> dict[str, Any]:
    """Write a checkpoint without the layers, neurons and heads that go, healed if asked for; what the report says."""
    arguments = {
        "source": str(source.path),
        "output": str(output),
        "layers": shape.layers,
        "intermediate": shape.intermediate,
        "kv_heads": shape.kv_heads,
        "dataset": options.dataset,
        "num_samples": options.num_samples,
        "refit": options.refit,
    }
    report: dict[str, Any] = _child("pruning", "ov_afm.pruning.checkpoint:prune_checkpoint", arguments, bars, log)
    report["pruned"] = measure.measure(source.path, output, options.text, options.tokens, bars)
    if options.heal_minutes:
        state = target.resolve().with_name(f".{target.name}.healing")
        arguments = {
            "student": str(output),
            "teacher": str(source.path),
            "state": str(state),
            "dataset": options.dataset,
            "num_samples": max(options.num_samples, HEALING_SAMPLES),
            "minutes": options.heal_minutes,
        }
        report["healing"] = _child("healing", "ov_afm.pruning.distill:heal", arguments, bars, log)
        shutil.rmtree(state, ignore_errors=True)
        report["healed"] = measure.measure(source.path, output, options.text, options.tokens, bars)
    return report


def _cut(
    source: Source, whole: Path, output: Path, cut: Cut, options: _Options, bars: console.Progress, log: Path
) -> dict[str, Any]:
    """Write a checkpoint without the rows that go; what the report says."""
    arguments = {"source": str(whole), "output": str(output), "rows": cut.rows}
    _child("cutting the vocabulary", "ov_afm.pruning.vocabulary:cut_checkpoint", arguments, bars, log)
    figures = measure.measure_cut(source.path, output, cut.rows, options.text, options.tokens, bars)
    return {**cut.to_dict(), **figures}


def _child(name: str, target: str, arguments: dict[str, Any], bars: console.Progress, log: Path) -> Any:
    with bars.step(name) as advance:
        return child_process.run(target, arguments, log=log, on_event=_relay(advance), died=CompressionError)


@command
def main(argv: Sequence[str] | None = None) -> int:
    """`ov-afm prune`."""
    parser = command_parser("prune", "Write a checkpoint with fewer parameters, and measure what that cost.")
    parser.add_argument("model", help="checkpoint of a ReLU² model: Hub id, folder or .gguf file")
    parser.add_argument("--target-params", metavar="COUNT", help="most parameters that stay, such as 2.8B")
    parser.add_argument(
        "--keep-scripts",
        nargs="+",
        default=[],
        metavar="NAME",
        help="drop tokens with letters of other scripts, such as: latin greek",
    )
    parser.add_argument("--kv-heads", type=int, metavar="N", help="KV heads that stay in every layer")
    parser.add_argument("--output", "-o", required=True, metavar="DIR", help="new checkpoint folder")
    parser.add_argument("--dataset", default=calibration.PACKAGED, metavar="DATA", help="calibration text")
    parser.add_argument("--num-samples", type=int, default=SAMPLES, help="calibration samples of 256 tokens")
    parser.add_argument("--no-refit", action="store_true", help="keep down_proj and o_proj as they are")
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
        table.check_format(args.plot)
    result = prune(
        args.model,
        args.output,
        target_params=args.target_params,
        keep_scripts=args.keep_scripts,
        kv_heads=args.kv_heads,
        dataset=args.dataset,
        num_samples=args.num_samples,
        refit=not args.no_refit,
        heal_minutes=args.heal,
        text=args.text,
        force=args.force,
    )
    if args.plot is not None:
        prune_report.plot(result.report["healing"], args.plot)
    if args.json:
        print(json.dumps({"path": str(result.path), **result.report}))
    else:
        shape = result.plan
        prune_report.show(shape, result.report)
        print(f"{result.path}  {shape.parameters / 1e9:.3f} B of {shape.before / 1e9:.3f} B parameters")
    return 0


if __name__ == "__main__":
    from .prune import main as run

    sys.exit(run())
