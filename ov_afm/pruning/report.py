"""What `ov-afm prune` did and what it cost, for people."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..evaluation import table
from ..system import console
from .plan import Plan

__all__ = ["plot", "show"]


def plot(healing: Mapping[str, Any], path: Path) -> None:
    """Draw the loss curve of healing."""
    from matplotlib.figure import Figure

    losses = healing["losses"]
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.add_subplot()
    axes.plot([(at + 0.5) * healing["steps"] / len(losses) for at in range(len(losses))], losses)
    axes.set_xlabel("step")
    axes.set_ylabel("KL to the original, training text, nats")
    axes.grid(alpha=0.3)
    table.save(figure, path)


def show(shape: Plan, report: Mapping[str, Any]) -> None:
    """Tell what was dropped and what it cost.

    Args:
        shape: The plan.
        report: As `prune.Pruned` has it.
    """
    console.note(f"  kept: {shape.reason}")
    if report.get("layers_dropped"):
        console.note(f"  layers dropped: {', '.join(map(str, report['layers_dropped']))}")
    if report.get("attention_energy_kept") is not None:
        console.note(f"  the KV heads kept had {report['attention_energy_kept']:.1%} of attention's output energy")
    if "prefill_tokens_per_s" in report:
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
    if "vocabulary" in report:
        _show_vocabulary(report["vocabulary"])


def _show_vocabulary(cut: Mapping[str, Any]) -> None:
    scripts = ", ".join(f"{script} {count}" for script, count in cut["tokens_dropped"].items()) or "none"
    console.note(f"  tokens dropped: {scripts}; rows without a token dropped: {cut['unused_rows_dropped']}")
    mass = cut["dropped_probability"]
    console.note(f"  on {cut['text']} the original gives the dropped rows {100 * mass['mean']:.3g}% of probability")
    if cut["same_tokens"]:
        before, after = cut["reference_perplexity"], cut["perplexity"]
        console.note(f"  vocabulary cut: perplexity {before:.2f} → {after:.2f}, among the rows that each has")
    else:
        size = cut["bytes_per_token"]
        console.note(
            f"  {cut['text']} has dropped letters: {size['before']:.2f} → {size['after']:.2f} bytes a token, so that "
            "perplexities do not compare"
        )
