"""What each way of rounding a model costs: KL divergence, top-1 agreement, perplexity, size, time, peak memory.

    python benchmarks/recipes.py CHECKPOINT_OR_FP32_MODEL --work-dir DIR [--only NAME ...] [--text FILE] [--plot FILE]

Calibration is on the packaged calibration text (a book on Rust), evaluation on the packaged evaluation text, which was
written for this project. Time is processor time of all cores together, which a busy machine does not change. Models
that are in the work folder already are not made again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from program import check_counts, program

from ov_afm import export, presets
from ov_afm.errors import OVAFMError
from ov_afm.evaluation import fidelity, table
from ov_afm.model_dir.model_directory import read_config
from ov_afm.system import console

INT4 = presets.Recipe("custom", weight_format="int4", sym=True, group_size=64, num_samples=64)
INT8 = presets.RECIPES["int8"]
RECIPES = {
    "int8": INT8,
    "int8-quality": presets.RECIPES["int8-quality"],
    "int4-g64": INT4,
    "int4-g64-se": replace(INT4, scale_estimation=True),
    "int4-quality": presets.RECIPES["int4-quality"],
    # Which part does what, and what else was tried; not made unless they are named.
    "int4-g64-asym": replace(INT4, sym=False),
    "int4-g64-eq": replace(INT4, equalise="full"),
    "int4-g64-fitted": replace(INT4, rounding="fitted"),
    "int4-g64-eq-se": replace(INT4, equalise="full", scale_estimation=True),
    "int4-g64-eq-gptq": replace(INT4, equalise="full", gptq=True),
    "int4-g64-eq-fitted": replace(INT4, equalise="full", rounding="fitted", num_samples=32),
    "int4-g64-eq-fitted-self": replace(INT4, equalise="full", rounding="fitted", num_samples=32, dataset="self"),
    "int8-eq": replace(INT8, name="custom", equalise="full"),
}
DEFAULT = list(RECIPES)[:5]


def make(source: Path, folder: Path, recipe: presets.Recipe) -> dict[str, float]:
    """Compress in a process of its own; returns its processor seconds and its peak memory in bytes."""
    file = folder.with_name(f"{folder.name}.recipe.json")
    file.write_text(json.dumps({"recipe": recipe.to_dict()}))
    words: list[str | Path] = [sys.executable, "-m", "ov_afm", "compress", source, "--output", folder, "--recipe", file]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL)
    # With what it has waited for: NNCF runs in a child.
    _, status, used = os.wait4(process.pid, 0)
    if status:
        raise OVAFMError(
            f"{folder.name} could not be made: ov-afm compress ended with status {os.waitstatus_to_exitcode(status)}"
        )
    return {"seconds": used.ru_utime + used.ru_stime, "peak_bytes": 1024.0 * used.ru_maxrss}


def row(result: fidelity.Fidelity, cost: dict[str, float]) -> str:
    """One line of the table."""
    figures = result.figures
    quantiles = [figures.kl_mean, figures.kl_median, figures.kl_p99]
    kl = " | ".join(f"{each.value:.4f}" for each in quantiles if each)
    top1 = f"{figures.top1_agreement.value:.1%}" if figures.top1_agreement else ""
    spent = f"{cost['seconds'] / 60:.1f} | {console.human_bytes(cost['peak_bytes'])}" if cost else " | "
    return (
        f"| {result.model} | {result.bits_per_weight:.2f} | {result.weights_bytes / 1e6:.1f} | {kl} | {top1} | "
        f"{figures.perplexity.value:.2f} | {spent} |"
    )


@program
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--work-dir", type=Path, required=True)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--only", nargs="*", choices=list(RECIPES), default=DEFAULT)
    parser.add_argument("--plot", type=Path, help="size against KL: .svg, .png, .pdf")
    args = parser.parse_args()
    read_config(args.model)
    check_counts(args, {"tokens": 1})
    args.work_dir.mkdir(parents=True, exist_ok=True)
    source = args.model
    if not (source / "openvino_model.xml").exists():
        source = args.work_dir / "fp32"
        if not source.exists():
            export(args.model, source, recipe="fp32")
    print("| recipe | bits/weight | MB | mean KL | median | 99% | top-1 | perplexity | CPU min | peak memory |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|", flush=True)
    results = []
    for name in args.only:
        folder, costs = args.work_dir / name, args.work_dir / f"{name}.json"
        if not folder.exists():
            costs.write_text(json.dumps(make(source, folder, RECIPES[name])))
        cost = json.loads(costs.read_text()) if costs.exists() else {}
        results.append(fidelity.evaluate(folder, source, text=args.text, tokens=args.tokens))
        print(row(results[-1], cost), flush=True)
    if args.plot is not None:
        table.plot(results, args.plot)


if __name__ == "__main__":
    sys.exit(main())
