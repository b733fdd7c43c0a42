"""Comparison runs: fresh prompts, a process for each combination, records that survive, refusals in one line."""

from __future__ import annotations

import importlib.machinery
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import simulated_faults

from ov_afm.bench import energy, report
from ov_afm.bench import run as bench_run
from ov_afm.bench import sweep as bench_sweep
from ov_afm.bench.bandwidth import read_bandwidth, weight_bytes_per_token
from ov_afm.bench.compare import compare
from ov_afm.bench.engine import Timeline
from ov_afm.bench.plan import Combination, Settings
from ov_afm.bench.prompts import Prompts
from ov_afm.bench.records import FILE_NAME, read
from ov_afm.bench.run import Run
from ov_afm.bench.statistics import number, spread
from ov_afm.bench.sweep import bench
from ov_afm.cli.bench import main
from ov_afm.errors import ConfigError, DeviceError
from ov_afm.model_dir import manifest
from ov_afm.model_dir.model_directory import ModelDirectory
from ov_afm.pipeline import Pipeline, Use
from ov_afm.runtime import device_cache
from ov_afm.runtime.sampling import Params
from ov_afm.system.child_process import ChildProcess

FEW = Settings(devices=("CPU",), prompt_tokens=(32,), new_tokens=8, runs=2)
FAST = ["--device", "CPU", "--prompt-tokens", "32", "--new-tokens", "8", "--runs", "2"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OV_AFM_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def swept(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report folder of a small sweep, with an option, a batch, an emulation and a device that is not here."""
    folder = tmp_path_factory.mktemp("sweep") / "report"
    options = ["--device", "CPU", "NPU", "NPU-EMULATED", "--prompt-tokens", "32", "256", "--new-tokens", "8"]
    more = ["--runs", "2", "--concurrency", "1", "4", "--option", "prompt-lookup", "--report", str(folder)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OV_AFM_CACHE", str(folder.parent / "cache"))
        assert main([str(tiny_model), *options, *more]) == 0
    return folder


def refused(capsys: pytest.CaptureFixture[str]) -> str:
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("ov-afm: error: ")
    assert shown.err.count("\n") == 1
    return shown.err.removeprefix("ov-afm: error: ").strip()


# Prompts


@pytest.mark.parametrize("kind", ["text", "random"])
def test_prompts_have_the_length_asked_for_and_no_common_beginning(tiny_model: Path, kind: Any) -> None:
    prompts = Prompts(tiny_model, kind)
    made = [prompts.make(length) for length in (1, 8, 64, 64, 64, 300, 300)]
    assert [len(each) for each in made] == [1, 8, 64, 64, 64, 300, 300]
    # The engine reuses whole blocks of 16 tokens or more (32 on CPU).
    assert len({tuple(each[:16]) for each in made[2:]}) == 5
    assert all(2 < token < 512 for each in made for token in each)


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


# Drafting changes speed, never the answer


@pytest.fixture(scope="session")
def drafting_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with some weights altered, so that it often drafts what the tiny model would not say."""
    folder = tmp_path_factory.mktemp("draft") / "draft"
    shutil.copytree(tiny_model, folder, ignore=shutil.ignore_patterns(manifest.FILE_NAME))
    path = folder / "openvino_model.bin"
    data = np.fromfile(path, np.uint8)
    graph = (folder / "openvino_model.xml").read_text()
    weights = re.findall(r'element_type="[ui]8" shape="\d+, ?\d+" offset="(\d+)" size="(\d+)"', graph)
    assert len(weights) > 10
    for offset, size in ((int(a), int(b)) for a, b in weights):
        data[offset : offset + size] ^= np.random.default_rng(offset).integers(0, 16, size, np.uint8)
    data.tofile(path)
    return folder


PROMPTS = ["1 2 3 4 1 2 3 4 1 2 3", "The quick brown fox jumps over the lazy dog. The quick brown"]


@pytest.fixture(scope="session")
def plain_answers(tiny_model: Path) -> list[str]:
    return answers(tiny_model)


def answers(model: Path, **options: Any) -> list[str]:
    params = Params(max_new_tokens=64, greedy=True, ignore_eos=True, repetition_penalty=1.0)
    with Pipeline(model, use=Use(exact=True), **options) as pipeline:
        return [pipeline.generate(prompt, params, raw=True).text for prompt in PROMPTS]


def test_prompt_lookup_gives_the_same_greedy_tokens(tiny_model: Path, plain_answers: list[str]) -> None:
    assert answers(tiny_model, prompt_lookup=True) == plain_answers


def test_draft_model_gives_the_same_greedy_tokens(
    tiny_model: Path, drafting_model: Path, plain_answers: list[str]
) -> None:
    assert answers(drafting_model) != plain_answers
    assert answers(tiny_model, draft_model=drafting_model) == plain_answers


# Records


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


def test_compare_tells_a_regression_from_noise(swept: Path) -> None:
    before = [record for record in read(swept / FILE_NAME) if record["option"] == "plain"]
    assert "No figure is worse beyond noise" in compare(before, before)
    after = [dict(record) for record in before]
    for record in after:
        if record["status"] == "ok" and record["device"] == "CPU" and record["prompt_tokens"] == 32:
            record["ttft_ms"] *= 1000
    table = compare(before, after)
    worse = [line for line in table.splitlines() if "**worse**" in line]
    assert [line.split("|")[2].strip() for line in worse] == ["TTFT ms"] * 2
    assert "2 figures are worse" in table


def test_compare_refuses_files_with_nothing_in_common(swept: Path) -> None:
    before = read(swept / FILE_NAME)
    other = [{**record, "model": "another"} for record in before]
    with pytest.raises(ConfigError, match="no measured combination .* in common"):
        compare(before, other)


# Bad input


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--runs", "0"], "runs must be at least 1, found 0"),
        (["--new-tokens", "1"], "new_tokens must be at least 2, found 1"),
        (["--prompt-tokens", "0"], "prompt_tokens must be at least 1, found 0"),
        (["--concurrency", "0"], "concurrency must be at least 1, found 0"),
        (["--threads", "0"], "threads must be at least 1, found 0"),
        (
            ["--device", "CPU", "--prompt-tokens", "2559", "--new-tokens", "8"],
            "nothing to measure: a prompt of 2559 tokens and 8 new ones need 2567 positions; "
            "{name} has a context of 2560",
        ),
        (
            ["--device", "NPU-EMULATED", "--prompt-tokens", "300", "--ov-config", "MAX_PROMPT_LEN=256"],
            "nothing to measure: the prompt has 300 tokens, MAX_PROMPT_LEN allows 256",
        ),
        (
            ["--device", "GPU"],
            "nothing to measure: device 'GPU' is not here; available: CPU, or AUTO; details: ov-afm devices",
        ),
        (
            ["--option", "faster"],
            "option 'faster' is unknown; choose of plain, prompt-lookup, draft, kv-u8, kv-f16, prefix-cache, "
            "no-prefix-cache, no-kernels",
        ),
        (["--option", "draft"], "option draft needs a draft model; add: --draft-model DIR"),
        (["--ov-config", "MAX_PROMPT_LEN"], "--ov-config takes KEY=VALUE, found 'MAX_PROMPT_LEN'"),
    ],
)
def test_bad_settings_are_one_line(
    tiny_model: Path, arguments: list[str], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tiny_model), *arguments, "--report", str(tmp_path / "out")]) == 1
    assert refused(capsys) == expected.format(name=tiny_model.name)
    assert not (tmp_path / "out").exists()


def test_directory_of_another_architecture_is_refused(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "bert"
    shutil.copytree(tiny_model, other, ignore=shutil.ignore_patterns(manifest.FILE_NAME))
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "architectures": ["BertModel"]}))
    assert main([str(other), *FAST]) == 1
    assert refused(capsys) == f"{other} holds BertModel, not a text-generation model; export one: ov-afm export --help"


def test_draft_model_of_another_vocabulary_is_refused(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "draft"
    shutil.copytree(tiny_model, other, ignore=shutil.ignore_patterns(manifest.FILE_NAME))
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "vocab_size": 600}))
    assert main([str(tiny_model), *FAST, "--draft-model", str(other)]) == 1
    assert refused(capsys) == f"the draft model {other} has 600 tokens, {tiny_model.name} has 512; use one tokenizer"


def test_the_same_model_twice_is_refused(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tiny_model), str(tiny_model), *FAST]) == 1
    assert refused(capsys) == f"{tiny_model} and {tiny_model} are the same model; give it once"


def test_report_folder_of_something_else_is_left_alone(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    assert main([str(tiny_model), *FAST, "--report", str(tmp_path)]) == 1
    assert (
        refused(capsys)
        == f"{tmp_path} exists and holds no records.jsonl; name another folder, nothing in it was changed"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_report_folder_of_another_sweep_is_left_alone(
    tiny_model: Path, swept: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path.name: path.read_bytes() for path in swept.iterdir()}
    assert main([str(tiny_model), *FAST, "--report", str(swept)]) == 1
    assert refused(capsys).startswith(f"{swept} holds another sweep (other settings, models, versions or machine); ")
    assert {path.name: path.read_bytes() for path in swept.iterdir()} == before


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"half": ', "Expecting value"),
        (b"\xff\xfe", "'utf-8' codec"),
        (b"[1]", "found list, not an object"),
        (b'{"model": "m"}', "lacks 'device'"),
    ],
    ids=["half", "bytes", "list", "keys"],
)
def test_corrupt_records_file_names_the_line(
    swept: Path, line: bytes, reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.jsonl"
    content = (swept / FILE_NAME).read_bytes().splitlines()[0] + b"\n" + line + b"\n"
    path.write_bytes(content)
    assert main(["--compare", str(path), str(swept / FILE_NAME)]) == 1
    said = refused(capsys)
    assert said.startswith(f"{path} line 2 is no benchmark record (")
    assert reason in said
    assert path.read_bytes() == content


def test_missing_records_file_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 1
    assert refused(capsys) == f"no such records file: {tmp_path / 'a'}"


def test_no_model_is_wrong_usage() -> None:
    with pytest.raises(SystemExit) as end:
        main([])
    assert end.value.code == 2


# Sensors


@pytest.fixture
def simulated_rapl(tmp_path: Path) -> Path:
    """A powercap tree as Intel's driver shows it, with one package."""
    zone = tmp_path / "powercap" / "intel-rapl:0"
    zone.mkdir(parents=True)
    (zone / "name").write_text("package-0\n")
    (zone / "energy_uj").write_text("1000000000\n")
    (zone / "max_energy_range_uj").write_text("262143328850\n")
    return zone


@pytest.mark.skipif(sys.platform == "win32", reason="RAPL is read on Linux")
def test_energy_is_read_from_the_package_counter_and_named(simulated_rapl: Path) -> None:
    meter = energy.open_meter(simulated_rapl.parent)
    assert meter.source == "RAPL package-0"
    (simulated_rapl / "energy_uj").write_text("1012500000\n")
    assert meter.read_j() == pytest.approx(12.5)
    assert meter.read_j() == 0


@pytest.mark.skipif(sys.platform == "win32", reason="RAPL is read on Linux")
def test_absent_sensor_has_a_reason_and_no_figure(tmp_path: Path, swept: Path) -> None:
    with pytest.raises(DeviceError, match="this machine shows no RAPL energy counter"):
        energy.open_meter(tmp_path / "nothing")
    for record in read(swept / FILE_NAME):
        if record["status"] == "ok" and record["energy_source"].startswith("not available: "):
            assert "energy_per_token_j" not in record


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


def test_peak_memory_is_this_process_s_own() -> None:
    ballast = np.ones(40_000_000)
    child = subprocess.run(
        [sys.executable, "-c", "from ov_afm.bench.run import peak_rss_bytes; print(peak_rss_bytes())"],
        capture_output=True,
        check=True,
    )
    assert ballast.nbytes > int(child.stdout)


def test_bandwidth_is_that_of_a_plain_sum() -> None:
    buffer = np.ones(8 << 20, np.uint64)
    seconds = []
    for _ in range(10):
        begin = time.perf_counter()
        np.add.reduce(buffer)
        seconds.append(time.perf_counter() - begin)
    expected = buffer.nbytes / min(seconds)
    # A wrong unit or a buffer counted twice would be a factor of at least 2 to 1000; a busy machine makes less.
    assert read_bandwidth(1, buffer_bytes=buffer.nbytes, seconds=0.3) == pytest.approx(expected, rel=0.45)


def test_weights_of_a_token_leave_out_the_looked_up_table(tiny_model: Path) -> None:
    size = (tiny_model / "openvino_model.bin").stat().st_size
    assert size - 512 * 67 - 2048 < weight_bytes_per_token(tiny_model) < size - 512 * 64


# Statistics


def test_spread_of_runs() -> None:
    found = spread([3.0, None, 1.0, 2.0])
    assert found is not None
    assert (found.median, found.least, found.most, found.runs, found.noise) == (2.0, 1.0, 3.0, 3, 1.0)
    assert spread([None]) is None


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (3e-8, "3e-08"), (0.000123456, "0.000123"), (0.98, "0.980"), (7.389, "7.39"), (2548.4, "2548")],
)
def test_numbers_have_three_digits(value: float, text: str) -> None:
    assert number(value) == text


# Peers


@pytest.mark.skipif(sys.platform == "win32", reason="a shell script stands in for another Python")
def test_peers_take_turns_and_an_absent_one_is_a_row(tiny_model: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    script = Path(manifest.__file__).parents[2] / "benchmarks" / "peers.py"
    few = ["--runs", "2", "--new-tokens", "4", "--prompt-tokens", "32", "--threads", "2"]
    # A Python without site-packages has no llama-cpp-python, whatever this one has.
    bare = tmp_path / "bare-python"
    bare.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "$@"\n')
    bare.chmod(0o755)
    files = ["--gguf", str(tmp_path / "peer.gguf"), "--llama-python", str(bare), "--report", str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, str(script), str(tiny_model), *few, *files], capture_output=True, text=True, check=True
    )
    assert "ov_afm against openvino-genai, prompt by prompt: decode speed " in done.stdout
    assert "| llama.cpp | not run: llama.cpp ended with status 1: ModuleNotFoundError" in done.stdout
    records = [json.loads(line) for line in (tmp_path / "out" / "peers.jsonl").read_text().splitlines()]
    assert [record["engine"] for record in records] == ["ov_afm", "openvino-genai", "openvino-genai", "ov_afm"]
    assert {record["generated_tokens"] for record in records} == {4}


def test_peer_gguf_has_the_model_s_geometry(tiny_model: Path, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    random_gguf = importlib.machinery.SourceFileLoader(
        "random_gguf", str(Path(manifest.__file__).parents[2] / "benchmarks" / "random_gguf.py")
    ).load_module()
    random_gguf.write_gguf(ModelDirectory.open(tiny_model), tmp_path / "peer.gguf", "int4")
    reader = gguf.GGUFReader(tmp_path / "peer.gguf")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert len(tensors) == 3 + 2 * 8
    assert tensors["blk.1.ffn_up.weight"].shape.tolist() == [64, 128]
    assert tensors["blk.1.ffn_up.weight"].tensor_type.name == "Q4_0"
    assert tensors["output.weight"].tensor_type.name == "Q8_0"
    weights = gguf.dequantize(tensors["blk.0.ffn_down.weight"].data, tensors["blk.0.ffn_down.weight"].tensor_type)
    assert 0.015 < weights.std() < 0.03
    assert reader.fields["arcee.attention.head_count_kv"].contents() == 2
