"""ov_afm beside stock openvino-genai and llama.cpp: same geometry, same prompts, same token counts, one invocation.

All engines are loaded at once, each in a process of its own, and take turns: every prompt goes to each of
them before the next one, in an order that rotates, so that whatever else the machine does disturbs them
alike. Speeds are compared prompt by prompt, and the ratios' median is reported with the least and the most.

llama.cpp runs a GGUF of the same geometry and of random weights (random_gguf.py), of as many bits as the IR really has,
whatever its manifest says; `--gguf` names another, which is refused if its geometry or its bits a weight are not the
model's. So no answer is compared, only speed and memory. Each engine has its own default KV cache: u8 in OpenVINO, f16
in llama.cpp.

    ov-afm synth --geometry afm-4.5b --output synth && ov-afm export synth --recipe int4 --output afm-int4
    pip install llama-cpp-python gguf        # builds llama.cpp for this CPU
    python benchmarks/peers.py afm-int4 --report peers
    python benchmarks/peers.py afm-int4 --record        # a record for figures.py as well
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import records
from gguf_format import read_peer
from matrices import read_matrices, stored_as
from program import check_counts, program
from random_gguf import write_gguf
from records import Figure, times

import ov_afm
from ov_afm.bench.engine import Engine, Timeline, clock
from ov_afm.bench.plan import Combination, Settings
from ov_afm.bench.prompts import Prompts
from ov_afm.bench.run import peak_rss_bytes
from ov_afm.bench.statistics import Spread, spread
from ov_afm.errors import ConfigError, OVAFMError
from ov_afm.kernels import extension
from ov_afm.model_dir import manifest
from ov_afm.model_dir.model_directory import ModelDirectory
from ov_afm.system import console
from ov_afm.system.console import markdown_table

Run = Callable[[list[int], int], Timeline]
Row = dict[str, Any]
ENGINES = ("ov_afm", "openvino-genai", "llama.cpp")


# The engines; each runs in a child.


def run_ov_afm(options: argparse.Namespace) -> tuple[Run, str]:
    """The engine that `Pipeline` loads, native kernels included where the model has them."""
    combination = Combination("peer", "CPU", "plain", options.prompt_tokens, options.new_tokens, 1)
    settings = Settings(devices=("CPU",), threads=options.threads)
    engine = Engine(ModelDirectory.open(options.model), combination, settings)
    kernels = "with kernels" if engine.kernels else "without kernels"
    version = f"ov_afm {manifest.installed_versions()['ov_afm']} {kernels}"
    return lambda prompt, count: engine.run([prompt], count)[0], version


def run_genai(options: argparse.Namespace) -> tuple[Run, str]:
    """Stock `LLMPipeline`, with its defaults but the number of threads."""
    import numpy as np
    import openvino
    import openvino_genai

    engine = openvino_genai.LLMPipeline(options.model, "CPU", INFERENCE_NUM_THREADS=options.threads)
    config = openvino_genai.GenerationConfig(ignore_eos=True, do_sample=False)

    def run(prompt: list[int], count: int) -> Timeline:
        config.max_new_tokens = count
        ids = np.array([prompt], dtype=np.int64)
        times = Timeline(time.perf_counter())

        inputs = openvino_genai.TokenizedInputs(openvino.Tensor(ids), openvino.Tensor(np.ones_like(ids)))
        engine.generate(inputs, config, clock(times))
        times.end = time.perf_counter()
        return times

    return run, f"openvino-genai {openvino_genai.__version__}"


def run_llama(options: argparse.Namespace) -> tuple[Run, str]:
    """llama.cpp through llama-cpp-python's lower level: evaluate, take the best token, evaluate it."""
    import llama_cpp
    import numpy as np

    context = options.prompt_tokens + options.new_tokens + 8
    model = llama_cpp.Llama(
        options.gguf, n_ctx=context, n_threads=options.threads, n_threads_batch=options.threads, verbose=False
    )

    def run(prompt: list[int], count: int) -> Timeline:
        model.reset()
        times = Timeline(time.perf_counter())
        tokens = prompt
        for _ in range(count):
            model.eval(tokens)
            logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(model.ctx, -1), shape=(model.n_vocab(),))
            tokens = [int(logits.argmax())]
            times.take(tokens)
        times.end = time.perf_counter()
        return times

    return run, f"llama-cpp-python {llama_cpp.__version__}"


OPENERS = dict(zip(ENGINES, (run_ov_afm, run_genai, run_llama), strict=True))


def serve(name: str, options: argparse.Namespace) -> None:
    """Load an engine, then measure the prompts that come on standard input, one JSON line each."""
    import numpy as np

    answers = sys.stdout
    sys.stdout = sys.stderr
    begin = time.perf_counter()
    run, version = OPENERS[name](options)
    load_s = time.perf_counter() - begin
    print(json.dumps({"version": version, "load_s": load_s}), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        times = run(request["prompt"], request["new_tokens"])
        gaps = times.gaps_ms
        figures = {
            "ttft_ms": times.ttft_ms,
            "tpot_p50_ms": float(np.percentile(gaps, 50)),
            "tpot_p95_ms": float(np.percentile(gaps, 95)),
            "decode_tokens_per_s": 1000 * len(gaps) / sum(gaps),
            "prefill_tokens_per_s": 1000 * len(request["prompt"]) / times.ttft_ms,
            "generated_tokens": times.new_tokens,
            "peak_rss_bytes": peak_rss_bytes(),
        }
        print(json.dumps(figures), file=answers, flush=True)


class Worker:
    """An engine in a child process.

    Raises:
        OVAFMError: It could not be loaded, or died; with the last line that it printed.
    """

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        fields = {**vars(options), "worker": name}
        python = options.llama_python if name == "llama.cpp" else sys.executable
        other = python != sys.executable
        self.name = name
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed by close()
        try:
            self._child = subprocess.Popen(
                [python, __file__, "--worker", json.dumps(fields)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                # Another Python may have llama-cpp-python; it needs this package's clock, and none of its libraries.
                env={**os.environ, "PYTHONPATH": str(Path(ov_afm.__file__).parents[1])} if other else None,
                encoding="utf-8",
            )
        except OSError as error:
            raise OVAFMError(f"{python} cannot be started: {error.strerror}") from error
        loaded = self._read()
        self.version, self.load_s = loaded["version"], loaded["load_s"]

    def measure(self, prompt: list[int], new_tokens: int) -> Row:
        """One prompt's figures."""
        assert self._child.stdin is not None
        self._child.stdin.write(json.dumps({"prompt": prompt, "new_tokens": new_tokens}) + "\n")
        self._child.stdin.flush()
        return self._read()

    def _read(self) -> Row:
        assert self._child.stdout is not None
        line = self._child.stdout.readline()
        if not line:
            self._child.wait()
            self._log.seek(0)
            last = self._log.read().decode("utf-8", "replace").strip().splitlines()
            raise OVAFMError(
                f"{self.name} ended with status {self._child.returncode}: {last[-1] if last else 'no message'}"
            )
        found: Row = json.loads(line)
        return found

    def close(self) -> None:
        """End the process."""
        self._child.kill()
        self._child.wait()
        self._log.close()


# The comparison.


def compare(options: argparse.Namespace) -> tuple[list[Row], dict[str, str]]:
    """Measure the engines in turns.

    Returns:
        One record for each engine and prompt, and the reason of each engine that could not run.
    """
    prompts = Prompts(Path(options.model), "random", options.seed)
    measured: list[Row] = []
    absent: dict[str, str] = {}
    with ExitStack() as stack, console.Progress() as progress:
        workers = []
        for name in options.engines:
            with progress.step(f"loading {name}"):
                try:
                    worker = Worker(name, options)
                except OVAFMError as error:
                    absent[name] = str(error)
                    continue
            stack.callback(worker.close)
            workers.append(worker)
        with progress.step("measuring", total=(options.runs + 1) * len(workers)) as advance:
            # The first prompt warms up: engines repack weights then.
            for run in range(-1, options.runs):
                prompt = prompts.make(options.prompt_tokens)
                turn = run % len(workers) if workers else 0
                for worker in workers[turn:] + workers[:turn]:
                    figures = worker.measure(prompt, options.new_tokens)
                    advance(1)
                    if run >= 0:
                        named = {"engine": worker.name, "version": worker.version, "run": run, "load_s": worker.load_s}
                        measured.append({**named, **figures})
    return measured, absent


def table(measured: Sequence[Row], absent: dict[str, str], weights: dict[str, str], options: argparse.Namespace) -> str:
    """Medians with ranges, and ratios pair by pair against the first engine."""
    engines = list(dict.fromkeys(record["engine"] for record in measured))
    headers = (
        "engine",
        "weights",
        "TTFT ms",
        "prefill tokens/s",
        "decode tokens/s",
        "TPOT p50 / p95 ms",
        "peak memory GB",
    )
    columns = ("ttft_ms", "prefill_tokens_per_s", "decode_tokens_per_s", "tpot_p50_ms", "tpot_p95_ms", "peak_rss_bytes")
    rows = []
    for engine in engines:
        runs = [record for record in measured if record["engine"] == engine]
        ttft, prefill, decode, p50, p95, peak = (_spread([run[name] for run in runs]) for name in columns)
        speeds = [each.text() for each in (ttft, prefill, decode)]
        gaps = f"{p50.median:.1f} / {p95.median:.1f}"
        rows.append([runs[0]["version"], weights[engine], *speeds, gaps, f"{peak.median / 1e9:.2f}"])
    rows += [[engine, f"not run: {reason}", *[""] * 5] for engine, reason in absent.items()]
    blocks = [
        f"Prompt {options.prompt_tokens} tokens, {options.new_tokens} new, {options.runs} runs in turns, "
        f"{options.threads} threads, model {Path(options.model).name}.",
        markdown_table(headers, rows, "llr"),
    ]
    for peer in engines[1:]:
        ratios = ", ".join(f"{title} {times(_ratio(measured, engines[0], peer, name))}" for name, title in RATIOS)
        blocks.append(f"{engines[0]} against {peer}, prompt by prompt: {ratios}.")
    return "\n\n".join(blocks)


RATIOS = (("decode_tokens_per_s", "decode speed"), ("prefill_tokens_per_s", "prefill speed"))


def _ratio(measured: Sequence[Row], ours: str, peer: str, name: str) -> Spread:
    values = {(record["engine"], record["run"]): record[name] for record in measured}
    runs = sorted({record["run"] for record in measured})
    return _spread([values[ours, run] / values[peer, run] for run in runs])


def _spread(values: Sequence[float]) -> Spread:
    found = spread(values)
    assert found
    return found


def figures(
    measured: Sequence[Row], weights: dict[str, str], active: float | None, options: argparse.Namespace
) -> list[Figure]:
    """What ov_afm's speeds are beside those of each peer, for a record."""
    share = "" if active is None else f", {active:.0%} of neurons active"
    titles = {
        "decode_tokens_per_s": ("decode", f"decode after {options.prompt_tokens} tokens{share}"),
        "prefill_tokens_per_s": ("prefill", f"prefill of {options.prompt_tokens} tokens"),
    }
    found = []
    for peer in (name for name in dict.fromkeys(record["engine"] for record in measured) if name != ENGINES[0]):
        title = "OpenVINO GenAI" if peer == "openvino-genai" else f"{peer}, {weights[peer]}"
        for name, (kind, what) in titles.items():
            ours, theirs = (
                _spread([record[name] for record in measured if record["engine"] == engine])
                for engine in (ENGINES[0], peer)
            )
            found.append(Figure(kind, what, "tokens/s", title, ours, theirs, _ratio(measured, ENGINES[0], peer, name)))
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="peers.py",
        description="ov_afm beside stock openvino-genai and llama.cpp.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("model", help="model directory, best one of a synthetic checkpoint")
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=_cores(), help="CPU threads of every engine")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--seed", type=int, default=0, help="of the prompts")
    parser.add_argument("--gguf", help="GGUF to use, or to write if it is not there; else a temporary one")
    parser.add_argument("--llama-python", default=sys.executable, help="Python that has llama-cpp-python")
    parser.add_argument("--report", help="new folder for peers.jsonl and peers.md")
    parser.add_argument(
        "--record",
        nargs="?",
        const=str(records.FOLDER),
        metavar="FOLDER",
        help="add a record for figures.py, to docs/figures or another folder",
    )
    return parser


def _cores() -> int:
    import psutil

    return psutil.cpu_count(logical=False) or 1


def _prepare(options: argparse.Namespace) -> tuple[ModelDirectory, dict[str, str]]:
    """The model, and of each engine what its weights are; writes the GGUF where there is none."""
    check_counts(options, {"runs": 1, "prompt_tokens": 1, "new_tokens": 2, "threads": 1})
    model = ModelDirectory.open(options.model)
    if options.report is not None and Path(options.report).exists():
        raise ConfigError(f"{options.report} exists; name another folder")
    if options.record is not None and ENGINES[0] not in options.engines:
        raise ConfigError(f"a record compares {ENGINES[0]} with others; it is not among --engines")
    matrices = read_matrices(model.xml)
    ours = stored_as(matrices, model.bin)
    weights = dict.fromkeys(ENGINES, ours)
    if "llama.cpp" in options.engines:
        gguf = Path(options.gguf)
        if not gguf.parent.is_dir():
            raise ConfigError(f"no folder {gguf.parent} for --gguf")
        if not gguf.exists():
            write_gguf(model, matrices, gguf)
        weights["llama.cpp"] = stored_as(read_peer(gguf, model.geometry, matrices), gguf)
    return model, weights


def _record(
    model: ModelDirectory, measured: Sequence[Row], weights: dict[str, str], options: argparse.Namespace
) -> None:
    kernels = any("with kernels" in record["version"] for record in measured)
    cpu = records.describe_cpu(options.threads, extension.best_isa() if kernels else None)
    versions = {record["engine"]: record["version"] for record in measured if record["engine"] == "llama.cpp"}
    # Without the kernels all neurons are computed, whatever relu2.py set.
    packed = model.manifest.sparsity.get("kernels", {}) if model.manifest and kernels else {}
    found = figures(measured, weights, packed.get("active"), options)
    print(
        f"{records.save(records.new_record(model, cpu, found, versions=versions), Path(options.record))} written",
        file=sys.stderr,
    )


@program
def main() -> int:
    """Run the comparison."""
    options = _parser().parse_args()
    with tempfile.TemporaryDirectory(prefix="ov_afm-peers-") as folder:
        if options.gguf is None:
            options.gguf = str(Path(folder) / "peer.gguf")
        model, weights = _prepare(options)
        measured, absent = compare(options)
    text = table(measured, absent, weights, options)
    print(text)
    if options.report is not None:
        out = Path(options.report)
        out.mkdir(parents=True)
        lines = [
            json.dumps({**record, "weights": weights[record["engine"]], "versions": manifest.installed_versions()})
            for record in measured
        ]
        (out / "peers.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        (out / "peers.md").write_text(text + "\n", encoding="utf-8")
    if options.record is not None and measured:
        _record(model, measured, weights, options)
    return 0 if measured else 1


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        fields = json.loads(sys.argv[2])
        serve(fields["worker"], argparse.Namespace(**fields))
    else:
        sys.exit(main())
