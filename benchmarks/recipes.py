"""What each way of rounding a model costs: KL divergence, top-1 agreement, perplexity, size, minutes, peak memory.

    python benchmarks/recipes.py CHECKPOINT_OR_FP32_MODEL --text EVALUATION.txt --work-dir DIR [--only NAME ...]

Calibration is the packaged text, evaluation the text given (or the packaged evaluation text). A model that is there
already in the work folder is not made again.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

from ov_afm import compress, console, evaluate, export, presets, supervise

INT4 = presets.Recipe("custom", weight_format="int4", sym=True, group_size=64)
INT8 = presets.RECIPES["int8"]
RECIPES = {
    "int8": INT8,
    "int8+eq": replace(INT8, name="custom", equalise="full"),
    "int4": INT4,
    "int4+se": replace(INT4, scale_estimation=True, num_samples=64),
    "int4+eq": replace(INT4, equalise="full"),
    "int4+eq+se": replace(INT4, equalise="full", scale_estimation=True, num_samples=64),
    "int4+eq+gptq": replace(INT4, equalise="full", gptq=True, num_samples=64),
    "int4+eq+self": replace(INT4, equalise="full", dataset="self", num_samples=64),
    "int4-asym+eq+se": replace(INT4, sym=False, equalise="full", scale_estimation=True, num_samples=64),
    "int4-g32+eq+se": replace(INT4, group_size=32, equalise="full", scale_estimation=True, num_samples=64),
}


def make(source: Path, folder: Path, recipe: presets.Recipe) -> tuple[float, float]:
    """Compress in a child, from the repository's root; returns its seconds and its peak memory in bytes."""
    started = time.perf_counter()
    arguments = {"source": str(source), "target": str(folder), "recipe": recipe.to_dict()}
    peak = supervise.run("benchmarks.recipes:_compress", arguments)
    return time.perf_counter() - started, float(peak)


def _compress(source: str, target: str, recipe: dict[str, object]) -> int:
    import resource

    compress(source, target, recipe=presets.Recipe.from_dict(recipe))
    return max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--work-dir", type=Path, required=True)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--only", nargs="*", choices=list(RECIPES), default=list(RECIPES))
    args = parser.parse_args()
    source = args.model
    if not (source / "openvino_model.xml").exists():
        source = args.work_dir / "fp32"
        if not source.exists():
            export(args.model, source, recipe="fp32")
    for name in args.only:
        folder = args.work_dir / name
        costs = args.work_dir / f"{name}.json"
        if not folder.exists():
            seconds, peak = make(source, folder, RECIPES[name])
            costs.write_text(json.dumps({"seconds": seconds, "peak_bytes": peak}))
        cost = json.loads(costs.read_text()) if costs.exists() else {"seconds": 0.0, "peak_bytes": 0.0}
        found = evaluate(folder, source, text=args.text, tokens=args.tokens)
        top1, perplexity = found.figures.top1_agreement, found.figures.perplexity
        print(
            f"{name:<18} KL {found.kl_mean:.4f}  top-1 {top1.value if top1 else 0:.1%}  "
            f"perplexity {perplexity.value:.2f}  {found.bits_per_weight:.3f} bits/weight  "
            f"{cost['seconds']:.0f} s  {console.human_bytes(cost['peak_bytes'])}",
            flush=True,
        )


if __name__ == "__main__":
    main()
