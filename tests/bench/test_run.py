"""Figures of one run: times, energy, memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ov_afm.bench import energy
from ov_afm.bench import run as bench_run
from ov_afm.bench.engine import Timeline
from ov_afm.bench.plan import Combination, Settings
from ov_afm.bench.run import Run
from ov_afm.model_dir.model_directory import ModelDirectory
from ov_afm.system.child_process import ChildProcess


@pytest.mark.slow
def test_prefix_caching_cannot_flatter_the_first_token(tiny_model: Path) -> None:
    settings = Settings(prompt_tokens=(2048,), new_tokens=2, runs=3)
    fresh = Combination("tiny", "CPU", "prefix-cache", 2048, 2, 1)
    events: list[object] = []
    ChildProcess(on_event=events.append).run(bench_run.measure, ModelDirectory.open(tiny_model), fresh, settings)
    runs = [event for event in events if isinstance(event, Run)]
    assert len(runs) == 3
    # The same prompt again is served from the cache, several times faster: the cache is on, and would be seen.
    repeated = min(run.ttft_repeated_ms or 0 for run in runs)
    assert min(run.ttft_ms for run in runs) > 2 * repeated > 0


def test_energy_of_a_token_leaves_out_idle_power_and_the_prompt() -> None:
    class Meter(energy.Meter):
        def __init__(self) -> None:
            self.readings = iter([0.0, 500.0, 40.0])

        def read_j(self) -> float:
            return next(self.readings)

    class Engine:
        device, emulated, kernels = "CPU", False, False

        def run(self, prompts: Any, new_tokens: int, on_first: Any = None) -> Any:
            times = Timeline(0.0)
            on_first()
            times.arrivals = [(5.0 + index, 1) for index in range(5)]
            times.tokens, times.end = [1] * 5, 9.0
            return [times]

    run = bench_run.measure_run(Engine(), [[1, 2]], 5, Meter(), 4.0)
    # 40 J over 4 s of decoding, less 4 W of idling, for the 4 tokens after the first.
    assert run.energy_per_token_j == pytest.approx((40 - 16) / 4)
    assert (run.ttft_ms, run.tpot_p50_ms, run.decode_tokens_per_s) == (5000, 1000, 1.0)
    assert (run.prefill_tokens_per_s, run.generated_tokens) == (0.4, 5)
    assert bench_run.measure_run(Engine(), [[1, 2]], 5).energy_per_token_j is None


def test_device_memory_counts_a_driver_client_once(tmp_path: Path) -> None:
    assert bench_run.device_bytes(tmp_path) is None
    (tmp_path / "fdinfo").mkdir()
    memory = "drm-resident-gtt:\t2048 KiB\ndrm-resident-stolen:\t0\n"
    text = f"drm-driver:\txe\ndrm-client-id:\t7\ndrm-pdev:\t0000:00:02.0\n{memory}"
    (tmp_path / "fdinfo" / "5").write_text(text)
    (tmp_path / "fdinfo" / "6").write_text(text)
    (tmp_path / "fdinfo" / "7").write_text("pos:\t0\nflags:\t02\n")
    assert bench_run.device_bytes(tmp_path) == 2 << 20


@pytest.mark.slow
def test_peak_memory_is_this_process_s_own() -> None:
    ballast = np.ones(40_000_000)
    child = subprocess.run(
        [sys.executable, "-c", "from ov_afm.bench.run import peak_rss_bytes; print(peak_rss_bytes())"],
        capture_output=True,
        check=True,
    )
    assert ballast.nbytes > int(child.stdout)
