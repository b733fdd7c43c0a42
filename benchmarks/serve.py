"""The server compared with its own engine and with llama.cpp's server: tokens/s at 1, 8 and 32 streams.

The same work is done in three ways, in turns, each with a process of its own: requests over HTTP to `ov-afm serve`; the
same continuous batching without a server, in a loop; and, where `--llama-python` names a Python that has xllamacpp
(wheels of llama.cpp with its server), requests over HTTP to that server with a GGUF of the same geometry (random
weights, made by random_gguf.py). Every stream has its own prompt of random tokens and generates a fixed number of
tokens. The client shares the processor with the servers.

    python benchmarks/serve.py MODEL_DIR --streams 1 8 32
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from gguf_format import read_peer
from matrices import read_matrices, stored_as
from program import check_counts, last_words, program
from random_gguf import write_gguf

from ov_afm.bench.statistics import spread
from ov_afm.errors import OVAFMError
from ov_afm.model_dir.model_directory import ModelDirectory
from ov_afm.system.console import markdown_table

# Seconds at which each stream's tokens came.
Arrivals = list[list[float]]
Prompts = list[list[int]]
START_S = 300.0


def loop(model_dir: str, cache_gb: float) -> None:
    """Runs in a child process: answers each line of prompts with the arrival times of their tokens."""
    import openvino_genai

    from ov_afm.runtime.detokenize import TextAssembler
    from ov_afm.serve.batching import BatchingEngine, Job
    from ov_afm.serve.messages import EngineSpec

    batch = BatchingEngine(EngineSpec(Path(model_dir), cache_size_gb=cache_gb))
    number = 0
    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        config = openvino_genai.GenerationConfig(
            max_new_tokens=request["new_tokens"], ignore_eos=True, do_sample=False, apply_chat_template=False
        )
        begin = time.perf_counter()
        arrivals: dict[int, list[float]] = {}
        for prompt in request["prompts"]:
            number += 1
            arrivals[number] = []
            batch.add(Job(number, prompt, config, TextAssembler(lambda _: "", {}, ())))
        while batch.busy:
            for piece in batch.step():
                arrivals[piece.id] += [time.perf_counter() - begin] * piece.tokens
        print(json.dumps(list(arrivals.values())), flush=True)


class Loop:
    """The engine without a server, in a process of its own."""

    name = "in process"

    def __init__(self, options: argparse.Namespace) -> None:
        command = [sys.executable, __file__, "--loop", options.model, str(options.cache_size_gb)]
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True
        )
        assert self._child.stdout
        if self._child.stdout.readline() != "ready\n":
            self._child.wait()
            self._log.seek(0)
            raise OVAFMError(f"the engine without a server did not start: {last_words(self._log.read())}")

    def run(self, prompts: Prompts, new_tokens: int) -> Arrivals:
        """Arrivals of every stream's tokens."""
        assert self._child.stdin
        assert self._child.stdout
        self._child.stdin.write(json.dumps({"prompts": prompts, "new_tokens": new_tokens}) + "\n")
        self._child.stdin.flush()
        arrivals: Arrivals = json.loads(self._child.stdout.readline())
        return arrivals

    def close(self) -> None:
        """End it."""
        self._child.terminate()
        self._child.wait()


class Http:
    """A server and a client that asks it for streams.

    Args:
        name: Its name in the table.
        command: What starts it.
        url: A pattern that finds its address in what it prints.
        body: The fields of a request, from a prompt and a number of tokens.
    """

    def __init__(self, name: str, command: list[str], url: str, body: Callable[[list[int], int], Any]) -> None:
        self.name, self._body = name, body
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=self._log, stderr=subprocess.STDOUT, text=True
        )
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            self._log.seek(0)
            log = self._log.read()
            if self._child.poll() is not None:
                raise OVAFMError(f"{name} ended with status {self._child.returncode}: {last_words(log)}")
            if address := re.search(url, log):
                self._url = address[1]
                with suppress(httpx.HTTPError):
                    if httpx.get(f"{self._url}/health").status_code == 200:
                        return
            time.sleep(0.1)
        self._child.kill()
        raise OVAFMError(f"{name} did not start within {START_S:.0f} s")

    def run(self, prompts: Prompts, new_tokens: int) -> Arrivals:
        """Arrivals of every stream's tokens."""
        return asyncio.run(self._all(prompts, new_tokens))

    async def _all(self, prompts: Prompts, new_tokens: int) -> Arrivals:
        limits = httpx.Limits(max_connections=len(prompts))
        async with httpx.AsyncClient(base_url=self._url, timeout=None, limits=limits) as client:
            begin = time.perf_counter()

            async def one(prompt: list[int]) -> list[float]:
                arrivals = []
                async with client.stream("POST", "/v1/completions", json=self._body(prompt, new_tokens)) as response:
                    assert response.status_code == 200, await response.aread()
                    async for line in response.aiter_lines():
                        if line.startswith("data: {"):
                            arrivals.append(time.perf_counter() - begin)
                # Text may be held back until a character is whole, so a message is not always one token; and the last
                # ones carry the reason of the end, or nothing.
                return arrivals

            return await asyncio.gather(*(one(prompt) for prompt in prompts))

    def close(self) -> None:
        """End it."""
        self._child.terminate()
        self._child.wait()


def ours(options: argparse.Namespace) -> Http:
    """`ov-afm serve`."""
    command = [sys.executable, "-m", "ov_afm", "serve", options.model, "--port", "0"]
    command += ["--cache-size-gb", str(options.cache_size_gb)]

    def body(prompt: list[int], new_tokens: int) -> Any:
        return {"prompt": prompt, "max_tokens": new_tokens, "temperature": 0, "stream": True, "ignore_eos": True}

    return Http("ov-afm serve", command, r"(http://[\d.]+:\d+)/v1", body)


LLAMA = """
import sys, xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.n_parallel, params.n_ctx = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = int(sys.argv[4])
params.port = 0
server = xllamacpp.Server(params)
print(server.listening_address, flush=True)
sys.stdin.read()
"""


def llama(options: argparse.Namespace, gguf: Path) -> Http:
    """llama.cpp's server."""
    most = max(options.streams)
    context = most * (options.prompt_tokens + options.new_tokens + 8)
    command = [options.llama_python, "-c", LLAMA, str(gguf), str(most), str(context), str(options.threads)]

    def body(prompt: list[int], new_tokens: int) -> Any:
        return {"prompt": prompt, "max_tokens": new_tokens, "temperature": 0, "stream": True, "ignore_eos": True}

    return Http("llama.cpp server", command, r"(http://[\d.]+:\d+)", body)


def measure(options: argparse.Namespace, engines: Sequence[Any]) -> list[dict[str, Any]]:
    """Measure every engine at every number of streams, in turns; the first turn warms up and is not counted."""
    vocab = ModelDirectory.open(options.model).geometry.vocab
    source = random.Random(options.seed)
    records = []
    for streams in options.streams:
        for run in range(-1, options.runs):
            prompts = [
                [source.randrange(100, min(vocab, 40_000)) for _ in range(options.prompt_tokens)]
                for _ in range(streams)
            ]
            for turn in range(len(engines)):
                engine = engines[(turn + run) % len(engines)]
                arrivals = engine.run(prompts, options.new_tokens)
                if run < 0:
                    continue
                gaps = [
                    1000 * (later - sooner)
                    for times in arrivals
                    for sooner, later in zip(times, times[1:], strict=False)
                ]
                last = max(times[-1] for times in arrivals)
                records.append(
                    {
                        "engine": engine.name,
                        "streams": streams,
                        "run": run,
                        "tokens_per_s": streams * options.new_tokens / last,
                        "tpot_p50_ms": float(np.percentile(gaps, 50)),
                        "tpot_p99_ms": float(np.percentile(gaps, 99)),
                        "ttft_ms": 1000 * max(times[0] for times in arrivals),
                    }
                )
                print(json.dumps(records[-1]), file=sys.stderr)
    return records


def table(options: argparse.Namespace, weights: str, records: Sequence[dict[str, Any]]) -> str:
    """Medians, and ratios of runs side by side."""
    engines = list(dict.fromkeys(record["engine"] for record in records))
    title = (
        f"{Path(options.model).name}: prompt {options.prompt_tokens} tokens, {options.new_tokens} new, "
        f"{options.runs} runs in turns, {options.threads} threads. Weights: {weights}."
    )
    headers = ("streams", "way", "tokens/s, all streams", "`ov-afm serve` compared with it", "ms a token p50 / p99")
    rows = []
    for streams in options.streams:
        served = {r["run"]: r for r in records if (r["streams"], r["engine"]) == (streams, "ov-afm serve")}
        for engine in engines:
            runs = [r for r in records if (r["streams"], r["engine"]) == (streams, engine)]
            speed, ratio, p50, p99 = (
                spread(values)
                for values in (
                    [run["tokens_per_s"] for run in runs],
                    [served[run["run"]]["tokens_per_s"] / run["tokens_per_s"] for run in runs],
                    [run["tpot_p50_ms"] for run in runs],
                    [run["tpot_p99_ms"] for run in runs],
                )
            )
            assert speed and ratio and p50 and p99
            compared = f"{ratio.median:.2f} ({ratio.least:.2f}–{ratio.most:.2f})"
            latency = f"{p50.median:.1f} / {p99.median:.1f}"
            rows.append((str(streams), engine, f"{speed.median:.1f}", compared, latency))
    return f"{title}\n\n{markdown_table(headers, rows, 'rlr')}"


@program
def main() -> int:
    """Run the comparison."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", help="model directory")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2, help="of llama.cpp's server")
    parser.add_argument("--cache-size-gb", type=float, default=0.5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--llama-python", help="a Python that has xllamacpp")
    options = parser.parse_args()
    check_counts(
        options, {"streams": 1, "prompt_tokens": 1, "new_tokens": 2, "runs": 1, "threads": 1, "cache_size_gb": 0.01}
    )
    model = ModelDirectory.open(options.model)
    matrices = read_matrices(model.xml)
    weights = stored_as(matrices, model.bin)
    with ExitStack() as stack:
        engines: list[Any] = [Loop(options)]
        stack.callback(engines[0].close)
        engines.append(ours(options))
        stack.callback(engines[1].close)
        if options.llama_python is not None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            gguf = folder / "peer.gguf"
            write_gguf(model, matrices, gguf, vocabulary=True)
            weights += f"; llama.cpp's {stored_as(read_peer(gguf, model.geometry, matrices), gguf)}"
            engines.append(llama(options, gguf))
            stack.callback(engines[2].close)
        print(table(options, weights, measure(options, engines)))
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--loop"]:
        loop(sys.argv[2], float(sys.argv[3]))
    else:
        sys.exit(main())
