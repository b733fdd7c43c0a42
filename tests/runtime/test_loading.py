"""A device that fails is left for the next one, with the reason said once. The failing devices are simulated."""

from __future__ import annotations

import logging
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support import simulated_faults

from ov_afm.errors import ConfigError, DeviceError
from ov_afm.model_dir import manifest
from ov_afm.model_dir.model_directory import ModelDirectory
from ov_afm.pipeline import Params, Pipeline, Use
from ov_afm.runtime import device_cache, devices, loading, self_test
from ov_afm.serve.batching import BatchingEngine, load_request
from ov_afm.serve.messages import EngineSpec
from ov_afm.system import control_groups


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OV_AFM_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with recorded answers, whatever export did."""
    copy = tmp_path_factory.mktemp("golden") / "model"
    shutil.copytree(tiny_model, copy)
    contents = manifest.read(copy)
    assert contents is not None
    contents.checks["golden"] = self_test.make_golden(copy)
    manifest.write(copy, contents)
    return copy


def simulate_gpu(monkeypatch: pytest.MonkeyPatch, fault: str, memory_bytes: int | None = None) -> None:
    """A GPU that is listed, and behaves as `simulated_faults` says when it is tried."""
    gpu = devices.DeviceInfo("GPU", "Simulated Arc", "1.0", memory_bytes, ("FP16",))
    cpu = devices.DeviceInfo("CPU", "CPU", None, None, ("FP32",))
    monkeypatch.setattr(devices, "inventory", lambda: devices.Inventory((cpu, gpu)))
    simulated_faults.replace(monkeypatch, self_test, "answers", getattr(simulated_faults, fault))


@pytest.mark.slow
@pytest.mark.parametrize("asked", ["AUTO", "GPU"])
@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("device_that_crashes", "ended by SIGSEGV"),
        ("device_that_talks_nonsense", "where the model says"),
        # It passes in the child; then the load itself fails, because there is no such device.
        ("device_that_answers_as_recorded", "GPU"),
    ],
)
def test_failing_device_falls_back_to_the_cpu_with_the_reason_said_once(
    model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, asked: str, fault: str, reason: str
) -> None:
    simulate_gpu(monkeypatch, fault)
    with caplog.at_level(logging.WARNING), Pipeline(model, asked, warm_up=False) as pipeline:
        assert pipeline.device == "CPU"
        assert reason in pipeline.device_note
        assert pipeline.generate("hi", Params(max_new_tokens=3, ignore_eos=True)).metrics.new_tokens == 3
    (record,) = caplog.records
    assert record.getMessage().startswith("using CPU, because GPU: ")
    assert reason in record.getMessage()


@pytest.mark.slow
def test_answers_that_export_did_not_record_are_recorded_once_when_a_device_needs_them(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    copy = Path(shutil.copytree(model, tmp_path / "model"))
    contents = manifest.read(copy)
    assert contents is not None
    recorded = contents.checks.pop("golden")
    manifest.write(copy, contents)
    simulate_gpu(monkeypatch, "device_that_talks_nonsense")
    steps: list[str] = []
    for _ in range(2):
        with Pipeline(copy, "GPU", warm_up=False, on_phase=lambda name, _: steps.append(name)) as pipeline:
            assert "where the model says" in pipeline.device_note
        device_cache.remember("verdicts", loading.verdict_key(ModelDirectory.open(copy).key, "GPU"), None)
    assert [name for name in steps if name.startswith("recording answers")] == steps[:1]
    (known,) = device_cache.read("golden").values()
    assert [prompt["tokens"] for prompt in known["prompts"]] == [prompt["tokens"] for prompt in recorded["prompts"]]


@pytest.mark.slow
def test_hanging_device_counts_as_failed(
    model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    simulate_gpu(monkeypatch, "device_that_hangs")
    real_run = self_test.run
    monkeypatch.setattr(self_test, "run", lambda *arguments: real_run(*arguments, timeout_s=2))
    with Pipeline(model, "AUTO", warm_up=False) as pipeline:
        assert pipeline.device == "CPU"
    assert "no answer within 2 s" in caplog.text


def test_without_fallback_a_failing_device_is_an_error(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    simulate_gpu(monkeypatch, "device_that_crashes")
    with pytest.raises(DeviceError, match=r"could not be loaded: GPU: self-test of .* failed: .*SIGSEGV"):
        Pipeline(model, "GPU", fallback=False)


@pytest.mark.slow
def test_verdict_is_remembered_until_the_driver_changes(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    simulate_gpu(monkeypatch, "device_that_crashes")
    tested: list[Any] = []
    real_run = self_test.run
    monkeypatch.setattr(self_test, "run", lambda *arguments: tested.append(1) or real_run(*arguments))
    for _ in range(2):
        Pipeline(model, "AUTO", warm_up=False).close()
    assert len(tested) == 1
    newer = devices.DeviceInfo("GPU", "Simulated Arc", "2.0", None, ("FP16",))
    monkeypatch.setattr(devices, "inventory", lambda: devices.Inventory((newer,)))
    with pytest.raises(DeviceError):
        Pipeline(model, "GPU", fallback=False)
    assert len(tested) == 2


def test_model_too_big_for_a_device_falls_back_before_it_is_tried(
    model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    simulate_gpu(monkeypatch, "device_that_hangs", memory_bytes=1000)
    with Pipeline(model, "AUTO", warm_up=False) as pipeline:
        assert pipeline.device == "CPU"
    assert "GPU: GPU has 0.00 GB; the model needs" in caplog.text


def test_measured_speeds_of_this_machine_order_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    simulate_gpu(monkeypatch, "device_that_hangs")
    assert [each.device for each in devices.choose("AUTO", speeds={"CPU": 50.0})] == ["GPU", "CPU"]
    choices = devices.choose("AUTO", speeds={"CPU": 50.0, "GPU": 100.0})
    assert [each.device for each in choices] == ["CPU", "GPU"]
    assert choices[0].why == "AUTO (measured here: CPU 20.0 tokens/s, GPU 10.0 tokens/s)"


def test_prompt_lookup_on_npu_is_refused(model: Path) -> None:
    with pytest.raises(DeviceError, match="emulated NPU: prompt lookup is not available"):
        Pipeline(model, "NPU-EMULATED", prompt_lookup=True)


@pytest.mark.slow
def test_use_reaches_the_engine(model: Path) -> None:
    with Pipeline(model, "NPU-EMULATED", use=Use(prompt_tokens=128, new_tokens=32)) as pipeline:
        assert (pipeline.max_prompt_tokens, pipeline.context_length) == (128, 160)


@pytest.mark.slow
def test_cpu_and_emulation_leave_no_compiled_model_behind(model: Path) -> None:
    Pipeline(model).close()
    Pipeline(model, "NPU-EMULATED").close()
    assert device_cache.clear() == 0


@pytest.mark.slow
def test_emulated_npu_writes_a_blob_and_reads_it_again(model: Path, tmp_path: Path) -> None:
    blob = tmp_path / "tiny.blob"
    answers, written = [], []
    for _ in range(2):
        with Pipeline(model, "NPU-EMULATED", use=Use(prompt_tokens=128, new_tokens=128, blob=blob)) as pipeline:
            answers.append(pipeline.generate("hi", Params(max_new_tokens=8, greedy=True, ignore_eos=True)).text)
        written.append(blob.stat().st_mtime_ns)
    assert answers[0] == answers[1]
    assert written[0] == written[1]
    assert blob.stat().st_size > 0


@pytest.mark.slow
def test_a_blob_of_something_else_is_refused_before_it_is_read(model: Path, tmp_path: Path) -> None:
    def refusal(model: Path, blob: Path, prompt_tokens: int = 128) -> str:
        with pytest.raises(ConfigError) as caught:
            Pipeline(model, "NPU-EMULATED", use=Use(prompt_tokens=prompt_tokens, blob=blob))
        return str(caught.value)

    blob = tmp_path / "tiny.blob"
    Pipeline(model, "NPU-EMULATED", use=Use(prompt_tokens=128, blob=blob)).close()
    other = Path(shutil.copytree(model, tmp_path / "other"))
    contents = manifest.read(other)
    assert contents is not None
    contents.files["openvino_model.bin"]["sha256"] = "0" * 64
    manifest.write(other, contents)
    assert (
        refusal(other, blob) == f"{blob} was compiled for something else: another model; name another file or delete it"
    )
    assert "another properties;" in refusal(model, blob, prompt_tokens=64)
    blob.with_suffix(".blob.json").write_text("{")
    assert refusal(model, blob) == (
        f"{blob} has no tiny.blob.json beside it: it was not finished, or not written here; delete it"
    )
    assert refusal(model, tmp_path / "no" / "x.blob") == f"no folder {tmp_path / 'no'} to write x.blob to"


def test_the_cpu_says_once_that_it_answers_as_recorded(model: Path) -> None:
    steps: list[str] = []
    for _ in range(2):
        Pipeline(model, on_phase=lambda name, _: steps.append(name)).close()
    assert [name for name in steps if "warming up" in name] == [
        "warming up CPU and comparing its first answer",
        "warming up CPU",
    ]


@pytest.mark.parametrize("batch", [False, True], ids=["alone", "batched"])
def test_a_cpu_that_answers_something_else_is_refused(model: Path, tmp_path: Path, batch: bool) -> None:
    copy = Path(shutil.copytree(model, tmp_path / "model"))
    contents = manifest.read(copy)
    assert contents is not None
    short = contents.checks["golden"]["prompts"][0]
    short["steps"] = [f"{token}:-0.010" for token in short["tokens"]]
    manifest.write(copy, contents)
    with pytest.raises(DeviceError, match=r"gives wrong answers on this CPU: short prompt: the prob.* \(KL\)"):
        BatchingEngine(EngineSpec(copy, cache_size_gb=0.02)) if batch else Pipeline(copy)


def test_a_cache_smaller_than_the_recorded_prompt_is_warmed_up_without_it(model: Path) -> None:
    engine = BatchingEngine(EngineSpec(model, cache_size_gb=1.1e-5))
    assert engine.session.cache_tokens == engine.session.context_length == 32


def test_model_that_the_control_group_has_no_memory_for_is_refused_with_figures(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control_groups, "memory", lambda: control_groups.Memory(200_000_000, 50_000_000))
    with pytest.raises(DeviceError) as caught:
        Pipeline(tiny_model)
    assert "needs about 300" in str(caught.value)
    assert "50.0 MB are free of the 200.0 MB that this control group (container) may have" in str(caught.value)


@pytest.mark.skipif(sys.platform != "linux", reason="locks Linux's memory")
def test_memory_is_locked_while_a_model_is_loaded(tiny_model: Path) -> None:
    script = f"""
import re, sys; sys.path[:] = {sys.path!r}
from pathlib import Path
from ov_afm import Pipeline
from ov_afm.pipeline import Use
pipeline = Pipeline({str(tiny_model)!r}, use=Use(lock_memory=True))
assert pipeline.generate("Hello").text is not None
print(re.findall(r"VmLck:.*", Path("/proc/self/status").read_text())[0].split()[1])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    if "lock-refused" in done.stderr or "cannot be locked" in done.stderr:
        pytest.skip("this process may not lock memory")
    # What OpenVINO repacked and all else that the process allocated.
    assert int(done.stdout) * 1024 > (tiny_model / "openvino_model.bin").stat().st_size


def test_a_server_locks_the_memory_of_its_engines(tiny_model: Path) -> None:
    assert load_request(EngineSpec(tiny_model, lock_memory=True)).use.lock_memory
