"""ReLU² kernels against stock OpenVINO GenAI: decoding, prefill, batches, start, memory.

    python benchmarks/relu2.py MODEL_DIR                        # int4 or int8 model directory
    python benchmarks/relu2.py MODEL_DIR --active 1 0.5 0.2 0.1 --prompt 256 1024 --batch 4 16 --plot speedup.png
    python benchmarks/relu2.py MODEL_DIR --isa avx2vnni         # as a CPU without AVX-512 and AMX runs both
    python benchmarks/relu2.py MODEL_DIR --active 0.1 --write DIR       # DIR/active-0.1, a model directory for peers.py

Both engines are loaded in one process and run in turn; figures are medians with their range. Every prompt is new random
tokens, because GenAI caches prefixes. Start and peak memory come from a process each, with the file in the disk cache.

The share of active neurons is set for this benchmark alone, by a threshold on `up`'s output per layer, found on random
tokens: neurons at or below it are skipped. 1.0 is a threshold of -inf, which computes all neurons; its answers and
those of all shares but the model's own are meaningless. `own` is the model as it is: threshold 0.
Nothing of this is in the product: there, the threshold is 0.

`--isa` has both engines leave out what a smaller CPU lacks: ours takes the kernels of that name, oneDNN in stock OpenVINO
is told the same (ONEDNN_MAX_CPU_ISA), and both compute at f32 as OpenVINO does on CPUs without bf16. It shows
instructions, not another CPU's memory and caches, and says so in its output.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from ov_afm.bench.bandwidth import read_bandwidth, weight_bytes_per_token
from ov_afm.bench.run import peak_rss_bytes
from ov_afm.kernels import extension, graph, pack
from ov_afm.model_dir import manifest
from ov_afm.model_dir.inference import decoder_inputs
from ov_afm.model_dir.model_directory import PACKED_FOLDER

CALIBRATION_TOKENS = 48
ROUNDS = 3
ONEDNN_ISA = {"avx2": "AVX2", "avx2vnni": "AVX2_VNNI", "avx512vnni": "AVX512_CORE_VNNI"}
PROMPT = 32  # tokens before those whose decoding is timed
SEEDS = itertools.count()  # no prompt twice: GenAI would find it in its prefix cache


def thresholds(model_dir: Path, shares: list[float]) -> dict[float, list[float]]:
    """Per share the threshold of each layer; found in rounds, as each layer's depends on those before."""
    import openvino as ov
    from openvino import opset13 as op

    model = graph.read_model(model_dir / "openvino_model.xml")
    mlps, _ = graph.find_mlps(model)
    limits = op.parameter([len(mlps)], np.float32)
    limits.output(0).set_names({"limits"})
    for i, mlp in enumerate(mlps):
        z = mlp.up.output(0)
        consumers = list(z.get_target_inputs())
        limit = op.gather(limits, np.int64(i), np.int64(0))
        kept = op.select(op.greater(z, limit), z, np.float32(0))
        for consumer in consumers:
            consumer.replace_source_output(kept.output(0))
        model.add_outputs(z)
    model.add_parameters([limits])
    request = ov.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"}).create_infer_request()
    vocabulary = json.loads((model_dir / "config.json").read_text())["vocab_size"]
    ids = np.random.default_rng(0).integers(0, vocabulary, (1, CALIBRATION_TOKENS))
    names = {name for port in request.model_inputs for name in port.get_names()}
    results = {}
    for share in shares:
        limit_values = np.zeros(len(mlps), np.float32)
        for _ in range(ROUNDS):
            request.reset_state()
            outputs = request.infer({**decoder_inputs(ids, names), "limits": limit_values})
            zs = [outputs[len(outputs) - len(mlps) + i] for i in range(len(mlps))]
            limit_values = np.array([max(0.0, float(np.quantile(z, 1 - share))) for z in zs], np.float32)
        active = statistics.mean(float((z > limit).mean()) for z, limit in zip(zs, limit_values, strict=True))
        print(f"requested {share:.0%} active neurons, calibrated {active:.1%}", file=sys.stderr)
        results[share] = [float(v) for v in limit_values]
    return results


def variant(packed: Path, values: list[float] | None, folder: Path, isa: str = "") -> Path:
    """The packed model with other thresholds or another instruction set; its weights are the same file."""
    folder.mkdir(parents=True)
    for source in packed.iterdir():
        if source.name != "openvino_model.xml":
            (folder / source.name).symlink_to(source.resolve())
    xml = (packed / "openvino_model.xml").read_text()
    if values is not None:
        order = iter(values)
        xml = re.sub(r'threshold="[^"]*"', lambda _: f'threshold="{next(order)!r}"', xml)
    xml = re.sub(r' isa="[^"]*"', f' isa="{isa}"', xml)
    (folder / "openvino_model.xml").write_text(xml)
    return folder


def write(args: argparse.Namespace) -> None:
    """A model directory for each share: links to the files of the model and its packed form, but for the manifest."""
    for share, values in thresholds(args.model_dir, args.active).items():
        folder = args.write / f"active-{share}"
        variant(args.model_dir / PACKED_FOLDER, values, folder / PACKED_FOLDER)
        for source in args.model_dir.iterdir():
            if source.is_file() and source.name != manifest.FILE_NAME:
                (folder / source.name).symlink_to(source.resolve())


class Engine:
    """One loaded pipeline."""

    def __init__(self, folder: Path, kernels: bool, threads: int, isa: str = ""):
        import openvino_genai

        self.genai = openvino_genai
        properties: dict[str, Any] = {"INFERENCE_NUM_THREADS": threads} if threads else {}
        if isa:
            properties["INFERENCE_PRECISION_HINT"] = "f32"
        if kernels:
            properties["extensions"] = [str(extension.load())]
        self.pipeline = openvino_genai.LLMPipeline(folder, "CPU", **properties)
        self.vocabulary = json.loads((folder / "config.json").read_text())["vocab_size"]

    def run(self, rng: np.random.Generator, prompt: int, new: int, batch: int = 1) -> tuple[float, float]:
        """Milliseconds to the first token, and between the tokens after it."""
        import openvino as ov

        ids = rng.integers(0, self.vocabulary, (batch, prompt))
        inputs = self.genai.TokenizedInputs(ov.Tensor(ids), ov.Tensor(np.ones_like(ids)))
        config = self.genai.GenerationConfig(max_new_tokens=new, ignore_eos=True)
        metrics = self.pipeline.generate(inputs, config).perf_metrics
        return metrics.get_ttft().mean, metrics.get_tpot().mean if new > 1 else 0.0


def compare(stock: Engine, ours: Engine, repeats: int, **what: int) -> dict[str, Any]:
    """Alternate both; medians and ranges in ms, and how many times faster ours is."""
    times: dict[str, list[tuple[float, float]]] = {"stock": [], "kernels": []}
    for i in range(repeats + 1):
        seed = next(SEEDS)
        for name, engine in (("stock", stock), ("kernels", ours)):
            result = engine.run(np.random.default_rng(seed), **what)
            if i:  # the first pass repacks weights
                times[name].append(result)
    column = 0 if what["new"] == 1 else 1
    figures: dict[str, Any] = dict(what)
    for name, rows in times.items():
        values = [row[column] for row in rows]
        figures[name] = {"median_ms": statistics.median(values), "range_ms": [min(values), max(values)]}
    figures["speedup"] = figures["stock"]["median_ms"] / figures["kernels"]["median_ms"]
    return figures


def start(folder: Path, kernels: bool, threads: int, isa: str) -> dict[str, float]:
    """Seconds from the start of a process to its first token, and its peak memory."""
    command = [sys.executable, __file__, str(folder), "--child", "kernels" if kernels else "stock", "--isa", isa]
    began = time.time()
    output = subprocess.run([*command, "--threads", str(threads)], capture_output=True, text=True, check=True).stdout
    child = json.loads(output.splitlines()[-1])
    weights = (folder / "openvino_model.bin").stat().st_size
    return {
        "first_token_s": child["first_token_at"] - began,
        "peak_rss_bytes": child["peak_rss_bytes"],
        "peak_rss_over_weights": child["peak_rss_bytes"] / weights,
    }


def child(folder: Path, kernels: bool, threads: int, isa: str) -> None:
    Engine(folder, kernels, threads, isa).run(np.random.default_rng(0), prompt=16, new=1)
    print(json.dumps({"first_token_at": time.time(), "peak_rss_bytes": peak_rss_bytes()}), flush=True)
    os._exit(0)


def plot(report: dict[str, Any], path: Path) -> None:
    """Speed-up against the share of active neurons."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = sorted((row["active"], row["speedup"]) for row in report["decode"] if row["active"] != "own")
    figure, axes = pyplot.subplots(figsize=(6, 4))
    axes.plot(*zip(*rows, strict=True), "o-", label="measured")
    share = np.linspace(0.05, 1, 50)
    weights, down, bandwidth = report["weights_bytes"], report["down_bytes"], report["bandwidth_bytes_per_s"]
    stock_s = statistics.median(row["stock"]["median_ms"] for row in report["decode"]) / 1e3
    ceiling = stock_s * bandwidth / (weights - (1 - share) * down)
    axes.plot(share, ceiling, "--", label="roofline: active weights at read bandwidth")
    axes.axhline(1, color="grey", lw=0.8)
    axes.set(xlabel="share of active neurons", ylabel="decoding speed, stock = 1", xlim=(0, 1.05), ylim=(0, None))
    axes.legend()
    figure.savefig(path, dpi=150, bbox_inches="tight")


def print_table(report: dict[str, Any]) -> None:
    if report["limited"]:
        print(f"Both engines at f32, limited to the instructions of {report['isa']}: not the figures of a CPU that has no more.")
    print(f"{'':<34}{'stock':>10}{'kernels':>10}{'times':>8}   range of kernels")
    for name in ("decode", "prefill", "batch"):
        for row in report[name]:
            label = f"{name} active={row['active']} prompt={row['prompt']} batch={row.get('batch', 1)}"
            ours = row["kernels"]
            low, high = ours["range_ms"]
            print(
                f"{label:<34}{row['stock']['median_ms']:>8.1f}ms{ours['median_ms']:>8.1f}ms{row['speedup']:>7.2f}x"
                f"   {low:.1f}-{high:.1f}"
            )
            if "bandwidth_share" in row:
                bandwidth = report["bandwidth_bytes_per_s"] / 1e9
                print(f"{'':<34}weights read at {row['bandwidth_share']:.0%} of {bandwidth:.1f} GB/s")
    for name, row in report["start"].items():
        print(
            f"start {name}: first token after {row['first_token_s']:.1f} s, peak {row['peak_rss_bytes'] / 1e9:.2f} GB "
            f"= {row['peak_rss_over_weights']:.2f}x the weights"
        )


def measure(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    packed = args.model_dir / PACKED_FOLDER
    if not packed.exists():
        pack.transform(args.model_dir)
    # First, while this process is small, and once before that is kept, to have the files in the disk cache.
    starts = {}
    for name, folder in (("stock", args.model_dir), ("kernels", variant(packed, None, work / "start", args.isa))):
        start(folder, name == "kernels", args.threads, args.isa)
        starts[name] = start(folder, name == "kernels", args.threads, args.isa)
    shares = [share for share in args.active if share < 1]
    limits: dict[Any, list[float] | None] = {"own": None, **thresholds(args.model_dir, shares)}
    mlps, _ = graph.find_mlps(graph.read_model(args.model_dir / "openvino_model.xml"))
    down_weights = [graph.read_weights(mlp.down) for mlp in mlps]
    if 1.0 in args.active:
        limits[1.0] = [-3e38] * len(mlps)
    threads = args.threads or len(os.sched_getaffinity(0))
    report: dict[str, Any] = {
        "isa": args.isa or extension.best_isa(),
        "limited": bool(args.isa),
        "threads": threads,
        "weights_bytes": weight_bytes_per_token(args.model_dir),
        "down_bytes": sum(w.codes.size * w.bits / 8 + w.scales.nbytes for w in down_weights),
        "bandwidth_bytes_per_s": read_bandwidth(threads),
        "start": starts,
        "decode": [],
        "prefill": [],
        "batch": [],
    }
    stock = Engine(args.model_dir, False, args.threads, args.isa)
    for share, values in limits.items():
        ours = Engine(variant(packed, values, work / f"active-{share}", args.isa), True, args.threads, args.isa)
        row = compare(stock, ours, args.repeats, prompt=PROMPT, new=args.new)
        if share != "own":
            read = report["weights_bytes"] - (1 - share) * report["down_bytes"]
            row["bandwidth_share"] = read / (row["kernels"]["median_ms"] / 1e3) / report["bandwidth_bytes_per_s"]
        report["decode"].append({"active": share, **row})
        # Many tokens compute all neurons that any of them needs: the share matters little there.
        for prompt in args.prompt if share == "own" else ():
            report["prefill"].append({"active": share, **compare(stock, ours, args.repeats, prompt=prompt, new=1)})
        for batch in args.batch if share == "own" else ():
            row = compare(stock, ours, args.repeats, prompt=PROMPT, new=args.new // 2, batch=batch)
            report["batch"].append({"active": share, **row})
        del ours
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_dir", type=Path)
    parser.add_argument("--active", type=float, nargs="+", default=[1.0, 0.5, 0.2, 0.1])
    parser.add_argument("--prompt", type=int, nargs="+", default=[256])
    parser.add_argument("--batch", type=int, nargs="*", default=[])
    parser.add_argument("--new", type=int, default=32, help="tokens decoded in a run")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0, help="0: OpenVINO decides")
    parser.add_argument("--isa", default="", choices=["", *ONEDNN_ISA], help="leave out what a smaller CPU lacks")
    parser.add_argument("--write", type=Path, metavar="DIR", help="write a model directory for each share, and stop")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", choices=["stock", "kernels"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.isa:
        os.environ["ONEDNN_MAX_CPU_ISA"] = ONEDNN_ISA[args.isa]
    if args.child:
        child(args.model_dir, args.child == "kernels", args.threads, args.isa)
    if args.write:
        write(args)
        return
    work = Path(tempfile.mkdtemp())
    try:
        report = measure(args, work)
    finally:
        shutil.rmtree(work)
    print_table(report)
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")
    if args.plot:
        plot(report, args.plot)


if __name__ == "__main__":
    main()
