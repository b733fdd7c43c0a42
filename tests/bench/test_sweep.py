"""Sweeps: a process for each combination, records that survive, and what cannot run as rows."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from support import simulated_faults

from ov_afm.bench import report
from ov_afm.bench import sweep as bench_sweep
from ov_afm.bench.plan import Settings
from ov_afm.bench.records import FILE_NAME, read
from ov_afm.bench.sweep import bench
from ov_afm.model_dir.model_directory import ModelDirectory
from ov_afm.runtime import device_cache
from ov_afm.system.child_process import ChildProcess

FEW = Settings(devices=("CPU",), prompt_tokens=(32,), new_tokens=8, runs=2)


def test_every_run_is_a_record_that_is_complete_in_itself(swept: Path, tiny_model: Path) -> None:
    records = read(swept / FILE_NAME)
    good = [record for record in records if record["status"] == "ok"]
    # CPU: two lengths of plain, prompt lookup and a batch; emulated NPU: two lengths of plain.
    assert len(good) == 2 * (3 * 2 + 2)
    for record in good:
        assert record["ttft_ms"] > 0
        assert record["tpot_p50_ms"] <= record["tpot_p95_ms"]
        assert record["generated_tokens"] == 8 * record["concurrency"]
        assert record["peak_rss_bytes"] > 50e6
        assert record["load_s"] > 0
        assert record["first_inference_s"] > 0
        assert record["recipe"] == "int8"
        assert len(record["recipe_sha256"]) == 16
        assert record["versions"]["openvino"]
        assert record["command"].startswith("ov-afm bench ")
        assert record["device_name"]
    assert {record["emulated"] for record in good if record["device"] == "NPU-EMULATED"} == {True}


def test_what_cannot_run_is_a_row_with_the_reason(swept: Path) -> None:
    reasons = {
        (record["device"], record["option"], record["concurrency"]): record["reason"]
        for record in read(swept / FILE_NAME)
        if record["status"] == "cannot run"
    }
    assert reasons["NPU", "plain", 1].startswith("device 'NPU' is not here; available: CPU")
    assert reasons["NPU-EMULATED", "prompt-lookup", 1] == "the NPU does not have prompt-lookup"
    assert "no continuous batching" in reasons["NPU-EMULATED", "plain", 4]


def test_ceiling_is_bandwidth_over_the_bytes_of_a_token(swept: Path, tiny_model: Path) -> None:
    weights = (tiny_model / "openvino_model.bin").stat().st_size
    rows = [record for record in read(swept / FILE_NAME) if record.get("ceiling_tokens_per_s")]
    assert {(row["device"], row["option"], row["concurrency"]) for row in rows} == {("CPU", "plain", 1)}
    short, long = (next(row for row in rows if row["prompt_tokens"] == length) for length in (32, 256))
    assert short["ceiling_tokens_per_s"] == pytest.approx(short["bandwidth_bytes_per_s"] / short["token_bytes"])
    # The embedding (512 rows of 64, with scales and zero points) is looked up, not read.
    assert weights - 512 * 67 - 2048 < short["token_bytes"] - 36 * 136 < weights - 512 * 64
    # 224 more tokens of 2 layers, 2 heads, keys and values, 16 wide at u8 with their scales.
    assert long["token_bytes"] - short["token_bytes"] == pytest.approx(224 * 2 * 2 * 2 * 16 * (1 + 8 / 128), abs=2)


def test_speeds_are_remembered_for_auto_but_not_those_of_emulations(
    swept: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OV_AFM_CACHE", str(swept.parent / "cache"))
    assert list(device_cache.speeds(ModelDirectory.open(tiny_model).key)) == ["CPU"]


@pytest.mark.slow
def test_resumed_sweep_measures_only_what_is_missing(tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    bench(tiny_model, settings=FEW, report_dir=folder)
    path = folder / FILE_NAME
    first = path.read_bytes()
    bench(tiny_model, settings=FEW, report_dir=folder)
    assert path.read_bytes() == first
    # A killed process left half a line: that combination is measured again.
    path.write_bytes(first[:-40])
    (folder / report.HTML_NAME).unlink()
    found = bench(tiny_model, settings=FEW, report_dir=folder).records
    assert [record["run"] for record in found] == [0, 1]
    assert path.read_bytes() != first
    assert (folder / report.HTML_NAME).exists()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGINT")
def test_ctrl_c_keeps_finished_runs_and_writes_the_report(tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    options = ["--device", "CPU", "--prompt-tokens", "32", "--new-tokens", "8", "--runs", "100000", "--report"]
    command = [sys.executable, "-m", "ov_afm", "bench", str(tiny_model), *options, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        path = folder / FILE_NAME
        deadline = time.monotonic() + 300
        while not (path.exists() and path.read_bytes().count(b"\n") > 3):
            assert time.monotonic() < deadline, "no run was measured"
            time.sleep(0.1)
        child.send_signal(signal.SIGINT)
        shown, said = child.communicate(timeout=300)
    assert child.returncode == 130
    assert "Traceback" not in said
    assert said.splitlines()[-1] == "ov-afm: interrupted; the same command continues from here"
    assert len(read(path)) > 3
    assert "| CPU | plain | 32 |" in shown
    assert "Interrupted: this is a part of the sweep" in (folder / report.HTML_NAME).read_text()


@pytest.mark.slow
def test_ctrl_c_before_the_first_run_leaves_a_folder_that_can_be_used(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ChildProcess, "run", interrupted)
        sweep = bench(tiny_model, settings=FEW, report_dir=tmp_path / "out")
    assert (sweep.records, sweep.interrupted) == ([], True)
    assert len(bench(tiny_model, settings=FEW, report_dir=tmp_path / "out").records) == 2


@pytest.mark.slow
def test_crash_of_one_combination_is_a_row_and_the_sweep_goes_on(
    tiny_model: Path, drafting_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_sweep, "measure", simulated_faults.bench_that_crashes)
    records = bench(drafting_model, tiny_model, settings=FEW).records
    assert [(record["model"], record["status"]) for record in records] == [
        ("draft", "failed"),
        ("tiny-int8", "ok"),
        ("tiny-int8", "ok"),
    ]
    assert records[0]["reason"] == "bench that crashes: the process was ended by SIGSEGV"
