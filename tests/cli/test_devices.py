"""`ov-afm devices` lists devices, shows how a model would be loaded, and runs the self-test."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import simulated_faults

from ov_afm.cli.devices import main
from ov_afm.runtime import devices, self_test


@pytest.fixture(autouse=True)
def fresh_inventory() -> Iterator[None]:
    listed = devices.inventory
    listed.cache_clear()
    yield
    listed.cache_clear()


def test_list_names_every_kind_of_device(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("CPU: ")
    assert "  recipes: fp32, fp16, int8, int4" in shown
    assert shown.endswith("NPU: not here\n")


def test_list_tells_what_a_model_would_be_loaded_with(
    tiny_model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("OV_AFM_CACHE", str(tmp_path))
    faulty = devices.DeviceInfo("NPU", "Simulated NPU", "32.0.100.4239", 8 << 30, ("FP16",))
    monkeypatch.setattr(devices, "inventory", lambda: devices.Inventory((faulty,), {"GPU": "it crashed"}))
    assert main([str(tiny_model), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    (row,) = report["devices"]
    assert row["recipes"] == ["fp32", "fp16", "int4-npu", "int4-npu-g128"]
    assert "genai/issues/2846" in row["driver_faults"][0]["source"]
    assert row["model"]["refused"] == ["weight format int8"]
    assert row["model"]["properties"]["MAX_PROMPT_LEN"] == 1024
    assert report["not_usable"] == {"GPU": "it crashed"}
    assert main([str(tiny_model)]) == 0
    shown = capsys.readouterr().out
    assert "this model: cannot run (weight format int8)" in shown
    assert "known fault of this driver: creating a language model pipeline ends the process" in shown
    assert "GPU: could not be probed: it crashed" in shown


@pytest.mark.slow
def test_self_test_command_judges_and_labels_the_emulation(
    tiny_model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("OV_AFM_CACHE", str(tmp_path))
    assert main(["--test", str(tiny_model), "--device", "CPU", "NPU-EMULATED"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(": ")[0] for line in lines] == ["CPU", "emulated NPU"]
    assert all(": passed: " in line for line in lines)


def test_failed_self_test_is_status_1_and_shown_in_the_list(
    tiny_model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("OV_AFM_CACHE", str(tmp_path))
    simulated_faults.replace(monkeypatch, self_test, "answers", simulated_faults.device_that_crashes)
    assert main(["--test", str(tiny_model), "--device", "CPU"]) == 1
    assert "CPU: FAILED: loading and asking it in a child process failed" in capsys.readouterr().out
    assert main([str(tiny_model)]) == 0
    assert "self-test FAILED on" in capsys.readouterr().out
    assert main(["--clear-cache"]) == 0
    capsys.readouterr()
    assert main([str(tiny_model)]) == 0
    assert "self-test" not in capsys.readouterr().out


def test_unknown_device_and_wrong_usage_of_the_command(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--test", str(tiny_model), "--device", "FOO"]) == 1
    assert capsys.readouterr().err.startswith("ov-afm: error: device 'FOO' is not here; available: CPU")
    with pytest.raises(SystemExit) as end:
        main(["--device", "CPU"])
    assert end.value.code == 2
