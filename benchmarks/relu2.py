"""ReLU² kernels against stock OpenVINO GenAI: decoding, prefill, batches, start, memory.

    python benchmarks/relu2.py MODEL_DIR                        # int4 or int8 model directory
    python benchmarks/relu2.py MODEL_DIR --active 1 0.5 0.2 0.1 --prompt 256 1024 --batch 4 16 --plot speedup.png
    python benchmarks/relu2.py MODEL_DIR --isa avx2vnni         # as a CPU without AVX-512 and AMX runs both
    python benchmarks/relu2.py MODEL_DIR --record               # a record for figures.py as well
    python benchmarks/relu2.py MODEL_DIR --active 0.1 --write DIR       # DIR/active-0.1, a model directory for peers.py

Each engine is loaded in a process of its own, because two in one process slow each other down, and both run in turn;
figures are medians with their range, and the speed is compared run by run. Every prompt is new random tokens, because
GenAI caches prefixes. The bandwidth of memory is read beside each decoding. Start and peak memory come from further
processes, in turns, with the file in the disk cache.

The share of active neurons is set for this benchmark alone, by a threshold on `up`'s output per layer, found on random
tokens: neurons at or below it are skipped. 1.0 is a threshold of -inf, which computes all neurons; its answers and
those of all shares but the model's own are meaningless. `own` is the model as it is: threshold 0.
Nothing of this is in the product: there, the threshold is 0. Tables show the share that was reached on those tokens,
not the one that was asked for.

`--isa` has both engines leave out what a smaller CPU lacks: ours takes the kernels of that name, oneDNN in stock
OpenVINO is told the same (ONEDNN_MAX_CPU_ISA), and both compute at f32 as OpenVINO does on CPUs without bf16. It shows
instructions, not another CPU's memory and caches, and says so in its output.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import records
from program import check_counts, last_words, program
from records import Figure, times

from ov_afm.bench.bandwidth import read_bandwidth, weight_bytes_per_token
from ov_afm.bench.run import peak_rss_bytes
from ov_afm.bench.statistics import Spread, spread
from ov_afm.errors import ConfigError, OVAFMError
from ov_afm.kernels import extension, graph, pack
from ov_afm.model_dir import manifest
from ov_afm.model_dir.inference import decoder_inputs
from ov_afm.model_dir.model_directory import ModelDirectory
from ov_afm.system.console import markdown_table

CALIBRATION_TOKENS = 48
ROUNDS = 3
ALL = -3e38  # a threshold that every neuron is above
ONEDNN_ISA = {"avx2": "AVX2", "avx2vnni": "AVX2_VNNI", "avx512vnni": "AVX512_CORE_VNNI"}
PROMPT = 32  # tokens before those whose decoding is timed
SEEDS = itertools.count()  # no prompt twice: GenAI would find it in its prefix cache


@dataclass(frozen=True)
class Share:
    """Neurons of a model that are computed.

    Attributes:
        name: What was asked for: a share, or `own`.
        active: The share that was reached.
        thresholds: Of each MLP; None for the model as it is.
    """

    name: str
    active: float
    thresholds: list[float] | None

    @property
    def title(self) -> str:
        """For people."""
        own = ", as the model is" if self.thresholds is None else ""
        return f"{self.active:.0%} of neurons active{own}"


def find_shares(model_dir: Path, wanted: Sequence[float]) -> list[Share]:
    """The model's own share, and thresholds for others; found in rounds, as each layer's depends on those before."""
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

    def run(limit_values: Any) -> list[Any]:
        request.reset_state()
        outputs = request.infer({**decoder_inputs(ids, names), "limits": limit_values})
        return [outputs[len(outputs) - len(mlps) + i] for i in range(len(mlps))]

    def active(zs: Sequence[Any], limit_values: Any) -> float:
        return statistics.mean(float((z > limit).mean()) for z, limit in zip(zs, limit_values, strict=True))

    own = np.zeros(len(mlps), np.float32)
    shares = [Share("own", active(run(own), own), None)]
    for share in wanted:
        if share == 1:
            shares.append(Share(str(share), 1.0, [ALL] * len(mlps)))
            continue
        limit_values = own
        for _ in range(ROUNDS):
            zs = run(limit_values)
            limit_values = np.array([max(0.0, float(np.quantile(z, 1 - share))) for z in zs], np.float32)
        shares.append(Share(str(share), active(zs, limit_values), [float(v) for v in limit_values]))
    for each in shares:
        print(f"active neurons: {each.name} asked for, {each.active:.1%} reached", file=sys.stderr)
    return shares


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


def write(model: ModelDirectory, wanted: Sequence[float], out: Path) -> None:
    """A model directory for each share: links to the files of the model and its packed form, with a manifest."""
    if model.manifest is None:
        raise ConfigError(f"{model.path} has no {manifest.FILE_NAME} to derive others from; export it with ov-afm")
    for existing in (out / f"active-{share}" for share in wanted if (out / f"active-{share}").exists()):
        raise ConfigError(f"{existing} exists; remove it, or name another --write")
    for share in find_shares(model.path, wanted)[1:]:
        folder = out / f"active-{share.name}"
        packed = variant(model.packed, share.thresholds, folder / model.packed.name)
        for name in model.manifest.files:
            (folder / name).parent.mkdir(exist_ok=True)
            if not (folder / name).exists():
                (folder / name).symlink_to((model.path / name).resolve())
        xml = packed / manifest.MODEL_XML
        entry = {"bytes": xml.stat().st_size, "sha256": manifest.sha256(xml)}
        kernels = {**model.manifest.sparsity["kernels"], "active": round(share.active, 4)}
        contents = replace(
            model.manifest,
            files={**model.manifest.files, f"{packed.name}/{xml.name}": entry},
            # What was proved of the model's answers is not true of these.
            checks={"skipped": "thresholds of benchmarks/relu2.py, whose answers are meaningless"},
            sparsity={**model.manifest.sparsity, "kernels": kernels},
        )
        manifest.write(folder, contents)
        print(folder)


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


class Remote:
    """An engine in a process of its own, which waits while the other one runs."""

    def __init__(self, folder: Path, kernels: bool, threads: int, isa: str):
        command = child_command(folder, kernels, threads, isa)
        self.process = subprocess.Popen(
            [*command, "--serve"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )

    def run(self, seed: int, **what: int) -> tuple[float, float]:
        """See `Engine.run`."""
        assert self.process.stdin is not None and self.process.stdout is not None
        print(json.dumps({"seed": seed, **what}), file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            raise OVAFMError(f"an engine ended with status {self.process.wait()}; is there enough memory for both?")
        first, between = json.loads(line)
        return first, between

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def compare(stock: Remote, ours: Remote, repeats: int, **what: int) -> dict[str, Any]:
    """Alternate both; the spread of each in ms, and how many times faster ours is, run by run."""
    runs: dict[str, list[tuple[float, float]]] = {"stock": [], "kernels": []}
    for i in range(repeats + 1):
        seed = next(SEEDS)
        for name, engine in (("stock", stock), ("kernels", ours)):
            result = engine.run(seed, **what)
            if i:  # the first pass repacks weights
                runs[name].append(result)
    column = 0 if what["new"] == 1 else 1
    return {**what, **_spreads({name: [row[column] for row in rows] for name, rows in runs.items()})}


def _spreads(values: dict[str, list[float]]) -> dict[str, Spread]:
    """Of stock, of the kernels, and of stock divided by the kernels."""
    ratio = [theirs / ours for theirs, ours in zip(values["stock"], values["kernels"], strict=True)]
    spreads = {name: spread(each) for name, each in {**values, "ratio": ratio}.items()}
    return {name: each for name, each in spreads.items() if each is not None}


def start(folders: dict[str, Path], repeats: int, threads: int, isa: str) -> dict[str, dict[str, Spread]]:
    """Seconds from the start of a process to its first token, and its peak memory in GB, in turns."""
    seconds: dict[str, list[float]] = {name: [] for name in folders}
    peaks: dict[str, list[float]] = {name: [] for name in folders}
    for i in range(repeats + 1):
        for name, folder in folders.items():
            command = child_command(folder, name == "kernels", threads, isa)
            began = time.time()
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise OVAFMError(f"{name} did not start: {last_words(done.stderr)}")
            result = json.loads(done.stdout.splitlines()[-1])
            if i:  # the first has the file read into the disk cache
                seconds[name].append(result["first_token_at"] - began)
                peaks[name].append(result["peak_rss_bytes"] / 1e9)
    return {"first_token_s": _spreads(seconds), "peak_rss_gb": _spreads(peaks)}


def child_command(folder: Path, kernels: bool, threads: int, isa: str) -> list[str]:
    """A process with one engine; see `child`."""
    name = "kernels" if kernels else "stock"
    return [sys.executable, __file__, str(folder), "--child", name, "--isa", isa, "--threads", str(threads)]


def child(folder: Path, kernels: bool, threads: int, isa: str, *, serve: bool) -> None:
    """Say when the first token came; with `serve`, run what each line of the input asks for instead."""
    engine = Engine(folder, kernels, threads, isa)
    if serve:
        for line in sys.stdin:
            what = json.loads(line)
            print(json.dumps(engine.run(np.random.default_rng(what.pop("seed")), **what)), flush=True)
    else:
        engine.run(np.random.default_rng(0), prompt=16, new=1)
        print(json.dumps({"first_token_at": time.time(), "peak_rss_bytes": peak_rss_bytes()}), flush=True)
    os._exit(0)


def plot(report: dict[str, Any], path: Path) -> None:
    """Speed-up against the share of active neurons."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = sorted((row["active"], row["ratio"].median) for row in report["decode"])
    figure, axes = pyplot.subplots(figsize=(6, 4))
    axes.plot(*zip(*rows, strict=True), "o-", label="measured")
    share = np.linspace(0.05, 1, 50)
    weights, down, bandwidth = report["weights_bytes"], report["down_bytes"], report["bandwidth_bytes_per_s"]
    stock_s = statistics.median(row["stock"].median for row in report["decode"]) / 1e3
    ceiling = stock_s * bandwidth / (weights - (1 - share) * down)
    axes.plot(share, ceiling, "--", label="roofline: active weights at read bandwidth")
    axes.axhline(1, color="grey", lw=0.8)
    axes.set(xlabel="share of active neurons", ylabel="decoding speed, stock = 1", xlim=(0, 1.05), ylim=(0, None))
    axes.legend()
    figure.savefig(path, dpi=150, bbox_inches="tight")


def figures(report: dict[str, Any]) -> list[Figure]:
    """Everything that was measured, with its title."""
    found = []

    def add(kind: str, what: str, unit: str, row: dict[str, Any], note: str = "") -> None:
        found.append(Figure(kind, what, unit, "OpenVINO GenAI", row["kernels"], row["stock"], row["ratio"], note))

    for row in report["decode"]:
        bandwidth = row["bandwidth_bytes_per_s"]
        note = f"{row['read_bytes_per_s'] / bandwidth:.0%} of {bandwidth / 1e9:.1f} GB/s"
        add("decode", f"decode after {row['prompt']} tokens, {row['title']}", "ms a token", row, note)
    for row in report["prefill"]:
        add("prefill", f"prefill of {row['prompt']} tokens", "ms", row)
    for row in report["batch"]:
        add("together", f"{row['batch']} decoding together", "ms a token", row)
    peak = report["start"]["peak_rss_gb"]
    add("start", "start to first token", "s", report["start"]["first_token_s"])
    share = peak["kernels"].median * 1e9 / report["packed_bytes"]
    add("memory", "peak memory", "GB", peak, f"{share:.2f} times the weights")
    return found


def print_table(report: dict[str, Any], rows: Sequence[Figure]) -> None:
    if report["limited"]:
        isa = report["isa"]
        print(
            f"Both engines at f32, limited to the instructions of {isa}: not the figures of a CPU that has no more.\n"
        )
    cells = [
        [row.what, f"{row.theirs.text()} {row.unit}", f"{row.ours.text()} {row.unit}", times(row.ratio), row.note]
        for row in rows
    ]
    print(markdown_table(["", "stock", "kernels", "times as fast", ""], cells, "lrrrl"))


def measure(model: ModelDirectory, args: argparse.Namespace, work: Path) -> dict[str, Any]:
    isa, threads = args.isa, args.threads
    # First, while this process is small.
    folders = {"stock": model.path, "kernels": variant(model.packed, None, work / "start", isa)}
    starts = start(folders, args.repeats, threads, isa)
    shares = find_shares(model.path, args.active)
    mlps, _ = graph.find_mlps(graph.read_model(model.xml))
    down_weights = [graph.read_weights(mlp.down) for mlp in mlps]
    threads = threads or len(os.sched_getaffinity(0))
    report: dict[str, Any] = {
        "isa": isa or extension.best_isa(),
        "limited": bool(isa),
        "threads": threads,
        "weights_bytes": weight_bytes_per_token(model.path),
        "down_bytes": sum(w.codes.size * w.bits / 8 + w.scales.nbytes for w in down_weights),
        "packed_bytes": (model.packed / manifest.MODEL_BIN).stat().st_size,
        "start": starts,
        "decode": [],
        "prefill": [],
        "batch": [],
    }
    stock = Remote(model.path, False, args.threads, isa)
    bandwidths = []
    for share in shares:
        folder = variant(model.packed, share.thresholds, work / f"active-{share.name}", isa)
        ours = Remote(folder, True, args.threads, isa)
        bandwidth = read_bandwidth(threads)
        row = compare(stock, ours, args.repeats, prompt=PROMPT, new=args.new)
        row["bandwidth_bytes_per_s"] = (bandwidth + read_bandwidth(threads)) / 2
        bandwidths.append(row["bandwidth_bytes_per_s"])
        read = report["weights_bytes"] - (1 - share.active) * report["down_bytes"]
        row["read_bytes_per_s"] = read / (row["kernels"].median / 1e3)
        report["decode"].append({"active": share.active, "title": share.title, **row})
        if share.thresholds is None:
            # Many tokens compute all neurons that any of them needs: the share matters little there.
            for prompt in args.prompt:
                report["prefill"].append(compare(stock, ours, args.repeats, prompt=prompt, new=1))
            for batch in args.batch:
                row = compare(stock, ours, args.repeats, prompt=PROMPT, new=args.new // 2, batch=batch)
                report["batch"].append(row)
        ours.close()
    stock.close()
    report["bandwidth_bytes_per_s"] = statistics.median(bandwidths)
    return report


def _parser() -> argparse.ArgumentParser:
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
    parser.add_argument(
        "--record",
        nargs="?",
        type=Path,
        const=records.FOLDER,
        metavar="FOLDER",
        help="add a record for figures.py, to docs/figures or another folder",
    )
    parser.add_argument("--child", choices=["stock", "kernels"], help=argparse.SUPPRESS)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    return parser


def _prepare(args: argparse.Namespace) -> ModelDirectory:
    """The model, packed; nothing is measured before all options are known to be good."""
    check_counts(args, {"prompt": 1, "batch": 1, "new": 4, "repeats": 1, "threads": 0})
    for share in args.active:
        if not 0 < share <= 1:
            raise ConfigError(f"--active takes shares above 0 and up to 1, found {share}")
    for path in (args.plot, args.json):
        if path is not None and not path.parent.is_dir():
            raise ConfigError(f"no folder {path.parent} for {path.name}")
    if args.isa and not extension.has_isa(args.isa):
        raise ConfigError(f"this CPU cannot run the kernels of {args.isa}; its best are {extension.best_isa()}")
    model = ModelDirectory.open(args.model_dir)
    if not (model.packed / manifest.MODEL_XML).exists():
        pack.transform(model.path)
        model = ModelDirectory.open(args.model_dir)
    return model


@program
def main() -> None:
    args = _parser().parse_args()
    if args.isa:
        os.environ["ONEDNN_MAX_CPU_ISA"] = ONEDNN_ISA[args.isa]
    if args.child:
        child(args.model_dir, args.child == "kernels", args.threads, args.isa, serve=args.serve)
    model = _prepare(args)
    if args.write:
        write(model, args.active, args.write)
        return
    with tempfile.TemporaryDirectory() as work:
        report = measure(model, args, Path(work))
    rows = figures(report)
    print_table(report, rows)
    if args.json:
        args.json.write_text(json.dumps(report, indent=2, default=asdict) + "\n", encoding="utf-8")
    if args.plot:
        plot(report, args.plot)
    if args.record:
        cpu = records.describe_cpu(report["threads"], report["isa"], limit=args.isa or None)
        settings = f"both at f32, oneDNN limited to {ONEDNN_ISA[args.isa]}" if args.isa else ""
        print(f"{records.save(records.new_record(model, cpu, rows, settings=settings), args.record)} written")


if __name__ == "__main__":
    sys.exit(main())
