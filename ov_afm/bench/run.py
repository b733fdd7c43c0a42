"""One combination, measured in a separate process.

The parent calls `measure` in a child process, so that a driver's crash costs one row, and so that
peak memory and load time belong to this combination alone. The engine is the one that `Pipeline`
would load; it gets token ids, and a clock in place of a text streamer, so that neither
tokenizing nor assembling text is counted.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DeviceError
from ..model_dir.model_directory import ModelDirectory
from ..runtime.rules import kind_of
from ..system.child_process import Step, emit
from .energy import Meter, open_meter
from .engine import Engine
from .plan import Combination, Settings
from .prompts import Prompts

__all__ = ["Loaded", "Run", "device_bytes", "measure", "measure_run", "peak_rss_bytes"]

IDLE_S = 3.0
FIRST_PROMPT_TOKENS = 8
WARM_UP_TOKENS = 8
PROC = Path("/proc/self")
UNITS = {"": 1, "KiB": 1 << 10, "MiB": 1 << 20}


@dataclass(frozen=True, slots=True)
class Loaded:
    """The engine is ready; what that took.

    Attributes:
        load_s: Time to load it.
        first_inference_s: Time of the first, short, inference.
        device_used: The device that it runs on.
        emulated: Whether that is an emulation.
        kernels: Whether the model that is packed for the native kernels is in use.
        energy_source: The energy counter, or why there is none.
        idle_w: Power of the idle machine; None without a counter.
    """

    load_s: float
    first_inference_s: float
    device_used: str
    emulated: bool
    kernels: bool
    energy_source: str
    idle_w: float | None


@dataclass(frozen=True, slots=True)
class Run:
    """Figures of one run; with several requests at once, of all of them together.

    Attributes:
        ttft_ms: Request to first token, of the request that waits longest.
        tpot_ms: Mean time between tokens.
        tpot_p50_ms: Median time between tokens.
        tpot_p95_ms: The time that 95% of the gaps between tokens stay below.
        prefill_tokens_per_s: Prompt tokens a second until the first answer begins.
        decode_tokens_per_s: Tokens a second after the first; None for several requests.
        total_tokens_per_s: Generated tokens by the whole time.
        generated_tokens: Tokens generated.
        run: Number of the run.
        peak_rss_bytes: Most resident memory of the process so far.
        energy_per_token_j: Energy of a decoded token, idle power subtracted.
        ttft_repeated_ms: Time to first token of the same prompt again, where prefixes are cached.
        device_memory_bytes: Memory that the process holds on a GPU or NPU.
    """

    ttft_ms: float
    tpot_ms: float
    tpot_p50_ms: float
    tpot_p95_ms: float
    prefill_tokens_per_s: float
    decode_tokens_per_s: float | None
    total_tokens_per_s: float
    generated_tokens: int
    run: int = 0
    peak_rss_bytes: int = 0
    energy_per_token_j: float | None = None
    ttft_repeated_ms: float | None = None
    device_memory_bytes: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """The figures, without those that only some machines and options have, where they are missing."""
        values = ((field, getattr(self, field.name)) for field in fields(self))
        return {field.name: value for field, value in values if value is not None or field.default is MISSING}


def measure(model: ModelDirectory, combination: Combination, settings: Settings) -> None:
    """Measure a combination; runs in a child, and emits each `Step` that begins, one `Loaded`, and a `Run` a run.

    Args:
        model: The model directory.
        combination: What to measure.
        settings: The sweep's settings.
    """
    emit(Step("loading"))
    import openvino_genai  # noqa: F401 - imported before the clock is started

    begin = time.perf_counter()
    engine = Engine(model, combination, settings)
    load_s = time.perf_counter() - begin - engine.compared_s
    prompts = Prompts(model.path, settings.prompts, settings.seed)
    emit(Step("first inference"))
    (first,) = engine.run([prompts.make(FIRST_PROMPT_TOKENS)], 2)
    emit(Step("warming up"))
    engine.run([prompts.make(combination.prompt_tokens)], min(combination.new_tokens, WARM_UP_TOKENS))
    meter, source = _meter()
    idle_w = meter.idle_w(IDLE_S) if meter else None
    emit(Loaded(load_s, first.end - first.start, engine.device, engine.emulated, engine.kernels, source, idle_w))
    on_device = kind_of(combination.device) != "CPU" and sys.platform == "linux"
    for index in range(settings.runs):
        batch = [prompts.make(combination.prompt_tokens) for _ in range(combination.concurrency)]
        run = measure_run(engine, batch, combination.new_tokens, meter, idle_w)
        repeated = engine.run(batch, 2)[0].ttft_ms if combination.option == "prefix-cache" else None
        emit(
            replace(
                run,
                run=index,
                peak_rss_bytes=peak_rss_bytes(),
                ttft_repeated_ms=repeated,
                device_memory_bytes=device_bytes() if on_device else None,
            )
        )


def measure_run(
    engine: Engine,
    batch: Sequence[list[int]],
    new_tokens: int,
    meter: Meter | None = None,
    idle_w: float | None = None,
) -> Run:
    """Figures of one run.

    Args:
        engine: The engine.
        batch: Token ids of one prompt, or of several that run at once.
        new_tokens: Tokens to generate after each.
        meter: Reads energy.
        idle_w: Power of the idle machine, which is subtracted.
    """
    joules: list[float] = []

    def read() -> None:
        if meter:
            joules.append(meter.read_j())

    read()
    # Read again at the first token, so that the prompt's share is apart.
    times = engine.run(list(batch), new_tokens, read)
    read()
    gaps = [gap for each in times for gap in each.gaps_ms]
    generated = sum(each.new_tokens for each in times)
    wall_s = max(each.end for each in times) - min(each.start for each in times)
    ttft_ms = max(each.ttft_ms for each in times)
    decode_s = times[0].last - times[0].first if len(times) == 1 else 0.0
    energy = None
    if decode_s and idle_w is not None and len(joules) == 3:
        energy = max(0.0, joules[2] - idle_w * decode_s) / (generated - 1)
    return Run(
        ttft_ms=ttft_ms,
        tpot_ms=sum(gaps) / len(gaps),
        tpot_p50_ms=float(np.percentile(gaps, 50)),
        tpot_p95_ms=float(np.percentile(gaps, 95)),
        prefill_tokens_per_s=1000 * sum(map(len, batch)) / ttft_ms,
        decode_tokens_per_s=(generated - 1) / decode_s if decode_s else None,
        total_tokens_per_s=generated / wall_s,
        generated_tokens=generated,
        energy_per_token_j=energy,
    )


def _meter() -> tuple[Meter | None, str]:
    try:
        meter = open_meter()
    except DeviceError as error:
        return None, f"not available: {error}"
    return meter, meter.source


def peak_rss_bytes() -> int:
    """Most resident memory that this process ever had.

    On Linux from VmHWM: `getrusage` would report the parent's peak where that was larger, because it
    is carried over `exec`.
    """
    if sys.platform == "linux":
        peak = re.search(r"VmHWM:\s+(\d+) kB", (PROC / "status").read_text(encoding="utf-8"))
        if peak:
            return int(peak[1]) * 1024
    import psutil

    memory = psutil.Process().memory_info()
    return int(getattr(memory, "peak_wset", memory.rss))


def device_bytes(proc: Path = PROC) -> int | None:
    """Graphics and NPU memory that this process holds, as the kernel's drivers account it.

    Returns:
        Bytes over all of the process's clients of such drivers; None where no driver reports them.
    """
    clients: dict[str, int] = {}
    folder = proc / "fdinfo"
    for path in folder.iterdir() if folder.is_dir() else ():
        try:
            text = path.read_text(encoding="utf-8", errors="replace")
        except OSError:
            continue  # closed meanwhile
        # https://docs.kernel.org/gpu/drm-usage-stats.html
        client = re.search(r"^drm-client-id:\s*(\S+)", text, re.MULTILINE)
        device = re.search(r"^drm-pdev:\s*(\S+)", text, re.MULTILINE)
        regions = re.findall(r"^drm-(?:resident|memory)-\w+:\s*(\d+)\s*(KiB|MiB|)$", text, re.MULTILINE)
        if client and regions:
            # Several descriptors may belong to one client, which is counted once.
            name = f"{device[1] if device else ''}/{client[1]}"
            clients[name] = sum(int(amount) * UNITS[unit] for amount, unit in regions)
    return sum(clients.values()) if clients else None
