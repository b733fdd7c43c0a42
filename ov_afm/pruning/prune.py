"""A smaller checkpoint out of a large one, with a report of what that cost.

On request, rows of the vocabulary go that belong to other scripts, and KV heads with their query heads. To reach a
number of parameters, neurons go by their output energy on calibration text, and whole layers where neurons alone
would leave the MLPs too narrow. The result is an ordinary checkpoint that transformers loads and `ov-afm export`
exports. What was lost is measured on text that was not calibrated on, before and after healing. The vocabulary is cut
after that, because models with different vocabularies do not compare.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..conversion.sources import Source, resolve
from ..errors import CompressionError, ConfigError
from ..evaluation.divergence import summarize
from ..evaluation.scoring import prepare_reference, score, tokens_of
from ..evaluation.text import Text, load_text
from ..model_dir import outputs
from ..model_dir.outputs import PRUNED_FILE, new_folder
from ..quantization import calibration
from ..system import console, resources
from ..system.atomic import disk_full_as_error, write_json
from ..system.child_process import ChildProcess, Step
from .checkpoint import prune_checkpoint
from .distill import FULL_PARAMETERS, heal
from .plan import Plan, parse_count, plan
from .vocabulary import Cut, cut_checkpoint, plan_cut

__all__ = ["SAMPLES", "Pruned", "prune"]

SAMPLES = 48
# Healing takes more of the same text, if there is more: training sees each sample too often otherwise.
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
            follow decide everything. What they take away counts towards it.
        keep_scripts: Scripts whose tokens stay in the vocabulary, such as "latin", see `vocabulary`; none given keeps
            all.
        kv_heads: KV heads that stay in every layer, with their query heads; None keeps all.
        dataset: Calibration text, see `calibration`.
        num_samples: Samples of 256 tokens.
        refit: Let the neurons and heads that stay take over what they can of the others, by least squares.
        heal_minutes: Minutes of distillation from the original; 0 for none. An interrupted run is continued.
        text: Evaluation text; None takes the packaged one.
        tokens: Most tokens to evaluate on; None for all.
        force: Replace an older checkpoint of `prune` or `synth`; other folders never.
        progress: Where to draw progress.

    Raises:
        ConfigError: The target cannot be reached, or an option is out of range.
        CompressionError: The model is no ReLU² model, its tokenizer no byte-level BPE where that is needed, or a weight
            is not finite.
        SourceError: The model cannot be found or read.
    """
    resources.require("export", "torch", "transformers", "safetensors")
    if target_params is None and not keep_scripts and kv_heads is None:
        raise ConfigError(
            "nothing to prune; give --target-params, --keep-scripts or --kv-heads", code="nothing-to-prune"
        )
    options = _Options(dataset, num_samples, refit, heal_minutes, load_text(text, tokens=tokens))
    options.check()
    target = Path(output)
    inputs = [model, *calibration.files(dataset), *([text] if text is not None else [])]
    outputs.check(target, force=force, inputs=inputs)
    with progress if progress is not None else console.Progress() as bars:
        source = _relu2(resolve(model, progress=bars))
        most = parse_count(target_params) if isinstance(target_params, str) else target_params
        cut = plan_cut(source.path, source.config, keep_scripts) if keep_scripts else None
        shape = plan(source.config, most, vocab=len(cut.rows) if cut else None, kv_heads=kv_heads)
        _check_biases(source, shape)
        options.check_resources(shape)
        log = resources.log_file(f"prune-{target.name}")
        with new_folder(target, force=force, inputs=inputs) as partial, disk_full_as_error(target.absolute().parent):
            copies = 2 if cut and shape.narrowed else 1
            resources.check_disk(partial, {"the pruned checkpoint": copies * 2.0 * shape.before})
            work = _Work(source.path, options, bars, log)
            report: dict[str, Any] = {"plan": shape.to_dict(), "refit": refit}
            whole = source.path
            if shape.narrowed:
                # All rows stay until the rest is measured and healed, so that it compares with the original.
                whole = partial / "whole" if cut else partial
                report |= work.narrow(shape, whole, state=target.resolve().with_name(f".{target.name}.ov-afm.healing"))
            if cut:
                report["vocabulary"] = work.cut(cut, whole, partial)
                shutil.rmtree(partial / "whole", ignore_errors=True)
            write_json(partial / PRUNED_FILE, report)
    return Pruned(target, shape, report)


def _relu2(source: Source) -> Source:
    activation = source.config.get("hidden_act")
    if source.prebuilt or activation != "relu2":
        found = "an OpenVINO model" if source.prebuilt else f"activation {activation}"
        raise CompressionError(
            f"prune takes checkpoints with a ReLU² MLP, found {found} in {source.id}", code="not-relu2"
        )
    return source


def _check_biases(source: Source, shape: Plan) -> None:
    """Refuse what would leave biases of a width that is gone."""
    biased = [name for name in ("mlp_bias", "attention_bias") if source.config.get(name)]
    if biased and shape.narrowed:
        raise CompressionError(
            f"prune takes checkpoints without biases, found {' and '.join(biased)} in {source.id}; "
            "only --keep-scripts can be used with them",
            code="biases",
        )


@dataclass(frozen=True)
class _Options:
    """Arguments of `prune` that its steps share."""

    dataset: str
    num_samples: int
    refit: bool
    heal_minutes: float
    text: Text

    def check(self) -> None:
        if self.heal_minutes < 0:
            raise ConfigError(f"minutes of healing must not be negative, found {self.heal_minutes}")
        calibration.check(self.dataset)
        if any(part.name == calibration.SELF for part in calibration.parts(self.dataset)):
            raise ConfigError(
                "prune reads its calibration text before there is a model to sample from; give a file, or packaged"
            )

    def check_resources(self, shape: Plan) -> None:
        if self.heal_minutes and not shape.narrowed:
            raise ConfigError("rows of the vocabulary alone leave nothing to heal; leave --heal out, or prune more")
        if self.heal_minutes and shape.parameters > FULL_PARAMETERS:
            resources.require("heal", "peft")
        # Weights, and with a refit the residual stream after each layer; where heads go, after its attention too.
        streams = 0
        if self.refit and shape.narrowed:
            each = self.num_samples * calibration.SAMPLE_TOKENS * shape.source.hidden
            streams = shape.geometry.layers * each * (2 if shape.geometry.kv_heads < shape.source.kv_heads else 1)
        resources.check_memory(4.0 * (shape.before + streams) + 4e9, "pruning")


@dataclass(frozen=True)
class _Work:
    """The steps of pruning a checkpoint, each in a child process; they return what the report says of them."""

    source: Path
    options: _Options
    bars: console.Progress
    log: Path

    def narrow(self, shape: Plan, output: Path, *, state: Path) -> dict[str, Any]:
        """Write a checkpoint without the layers, neurons and heads that go, healed on request.

        Args:
            shape: What stays.
            output: The new checkpoint.
            state: Folder for the state of healing, which outlives an interruption.
        """
        data, count, minutes = self.options.dataset, self.options.num_samples, self.options.heal_minutes
        refit = self.options.refit
        with self._child("pruning") as child:
            report = child.run(
                prune_checkpoint, self.source, output, shape.geometry, dataset=data, num_samples=count, refit=refit
            )
        report["pruned"] = self._measure(output)
        if minutes:
            count = max(count, HEALING_SAMPLES)
            with self._child("healing") as child:
                report["healing"] = child.run(
                    heal, output, self.source, state, dataset=data, num_samples=count, minutes=minutes
                )
            shutil.rmtree(state, ignore_errors=True)
            report["healed"] = self._measure(output)
        return report

    def cut(self, cut: Cut, whole: Path, output: Path) -> dict[str, Any]:
        """Write a checkpoint without the rows that go."""
        with self._child("cutting the vocabulary") as child:
            child.run(cut_checkpoint, whole, output, cut.rows)
        return {**cut.to_dict(), **self._measure_cut(output, cut.rows)}

    def _measure(self, pruned: Path) -> dict[str, Any]:
        """Perplexity of both, KL and agreement, of checkpoints with one vocabulary; fields as `divergence.Summary`."""
        blocks = tokens_of(pruned, self.options.text, self.source)
        reference = prepare_reference(self.source, blocks, self.bars)
        scores, _ = score(pruned, blocks, reference, self.bars)
        return asdict(summarize(scores))

    def _measure_cut(self, cut: Path, rows: Sequence[int]) -> dict[str, Any]:
        """What can be measured of a checkpoint with some rows of its source's vocabulary.

        The cut itself changes no logit of a token that stays, for a text whose tokens all stay. It only takes away the
        probability of the tokens that it drops.

        Args:
            cut: The checkpoint with the smaller vocabulary.
            rows: The original's ids of its tokens.

        Returns:
            text; bytes_per_token of the whole text in both vocabularies; same_tokens, whether what is evaluated has the
            same tokens in both; dropped_probability (mean, max) that the original gave to all dropped rows together,
            0 to 1; reference_perplexity of the original, and perplexity of the checkpoint, None unless same_tokens.
        """
        import numpy as np

        text = self.options.text
        before, after = tokens_of(self.source, text), tokens_of(cut, text)
        reference = prepare_reference(self.source, before, self.bars)
        dropped = np.setdiff1d(np.arange(reference.vocab), rows)
        mass, nll = [], []
        for block in range(len(before.ids)):
            expected = reference.expected(block)
            nll.append(expected.nll)
            mass.append(np.exp(expected.log_p(0, len(expected.nll))[:, dropped]).sum(-1, dtype=np.float64))
        same = len(after.ids) == len(before.ids) and all(
            np.array_equal(np.take(rows, new), old) for new, old in zip(after.ids, before.ids, strict=True)
        )
        perplexity = None
        if same:
            scores, _ = score(cut, after, None, self.bars)
            perplexity = summarize(scores).perplexity.value
        probability = np.concatenate(mass)
        return {
            "text": text.name,
            "bytes_per_token": {"before": before.bytes_per_token, "after": after.bytes_per_token},
            "same_tokens": same,
            "dropped_probability": {"mean": float(probability.mean()), "max": float(probability.max())},
            "reference_perplexity": float(np.exp(np.concatenate(nll).mean(dtype=np.float64))),
            "perplexity": perplexity,
        }

    @contextmanager
    def _child(self, step: str) -> Iterator[ChildProcess]:
        """A child process whose progress is drawn under the name of a step."""
        with console.step_bars(self.bars) as on_event:
            on_event(Step(step))
            yield ChildProcess(log=self.log, on_event=on_event, died=CompressionError)
