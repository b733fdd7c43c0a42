"""Devices are probed where they can do no harm, and refused before they can."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from ov_afm.errors import DeviceError
from ov_afm.presets import RECIPES, Recipe
from ov_afm.runtime import devices

INT4_ASYM = Recipe("asym", weight_format="int4", sym=False, group_size=128)


@pytest.fixture(autouse=True)
def fresh_inventory() -> Iterator[None]:
    devices.inventory.cache_clear()
    yield
    devices.inventory.cache_clear()


def simulate(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    monkeypatch.setattr(devices, "PROBE", f"simulated_faults:{fault}")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1] / "support"))


def pretend(monkeypatch: pytest.MonkeyPatch, *names: str, **faults: str) -> None:
    """Stand in for physical devices that this machine does not have."""
    found = tuple(devices.DeviceInfo(name, name, "1.0", None, ()) for name in names)
    monkeypatch.setattr(devices, "inventory", lambda: devices.Inventory(found, faults))


def test_the_cpu_is_found_by_a_real_probe() -> None:
    cpu = next(device for device in devices.available() if device.name == "CPU")
    assert cpu.memory_bytes is not None
    assert cpu.memory_bytes > 1e9
    assert "FP32" in cpu.capabilities


def test_unknown_device_lists_those_available() -> None:
    with pytest.raises(DeviceError, match="^device 'FOO' is not here; available: CPU"):
        devices.choose("foo")


def test_simulated_driver_crash_while_probing_costs_only_that_device(monkeypatch: pytest.MonkeyPatch) -> None:
    simulate(monkeypatch, "npu_driver_kills_the_process")
    found = devices.inventory()
    assert [device.name for device in found.devices] == ["CPU"]
    assert "SIGSEGV" in found.faults["NPU"]
    with pytest.raises(DeviceError, match="^device 'NPU' could not be asked .*SIGSEGV.*available: CPU"):
        devices.choose("NPU")


def test_simulated_driver_hang_while_probing_falls_back_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    simulate(monkeypatch, "gpu_driver_hangs")
    monkeypatch.setattr(devices, "PROBE_TIMEOUT_S", 15.0)
    choices = devices.choose("AUTO")
    assert [choice.device for choice in choices] == ["CPU"]
    assert "GPU: gpu driver hangs: no answer within 15 s" in choices[0].why


@pytest.mark.parametrize("name", ["int4-npu", "int4-npu-g128", "fp16"])
def test_npu_recipes_run_on_npu(name: str) -> None:
    devices.check(RECIPES[name], "NPU")


@pytest.mark.parametrize(
    ("recipe", "found"),
    [
        (RECIPES["int8"], "weight format int8"),
        (INT4_ASYM, "asymmetric int4"),
        (RECIPES["int4-quality"], "group size 64"),
        (RECIPES["int4"], "backup precision int8_asym"),
        (replace(RECIPES["int4-npu"], kinds=(("attention", "int8"),)), "attention=int8"),
        (replace(RECIPES["int4"], kinds=(("embedding", "int4"),)), "backup precision int8_asym"),
    ],
    ids=["int8", "asymmetric", "mixed", "backup", "kind", "backup-of-head"],
)
@pytest.mark.parametrize("device", ["NPU", "npu", "NPU.0"])
def test_what_the_npu_cannot_run_is_refused_by_name(recipe: Recipe, found: str, device: str) -> None:
    with pytest.raises(
        DeviceError, match=f"^{device} cannot run recipe {recipe.name!r} .*{found}.*use recipe int4-npu"
    ):
        devices.check(recipe, device)


def test_npu_takes_tables_in_four_bits() -> None:
    devices.check(replace(RECIPES["int4"], kinds=(("embedding", "int4"), ("head", "int4"))), "NPU")


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
@pytest.mark.parametrize("device", ["CPU", "GPU", "GPU.1", "AUTO"])
def test_cpu_and_gpu_run_every_named_recipe(recipe: Recipe, device: str) -> None:
    devices.check(recipe, device)


def test_auto_takes_the_gpu_first(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, "CPU", "GPU.0", "GPU.1", "NPU")
    choices = devices.choose("AUTO", RECIPES["int4-npu"])
    assert [choice.device for choice in choices] == ["GPU.0", "GPU.1", "NPU", "CPU"]


def test_auto_passes_over_a_device_that_cannot_run_the_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, "CPU", "NPU")
    (choice,) = devices.choose("AUTO", INT4_ASYM)
    assert choice.device == "CPU"
    assert choice.why == "AUTO (GPU: not here; NPU: cannot run asymmetric int4, backup precision int8_asym)"


def test_named_device_that_cannot_run_the_recipe_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, "CPU", "NPU")
    with pytest.raises(DeviceError, match="^NPU cannot run recipe 'asym'"):
        devices.choose("NPU", INT4_ASYM)


def test_gpu_means_the_first_of_several(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, "CPU", "GPU.0", "GPU.1")
    assert devices.choose("GPU")[0].device == "GPU"
    with pytest.raises(DeviceError, match="available: CPU, GPU.0, GPU.1"):
        devices.choose("GPU.7")


def test_every_rule_says_where_it_comes_from() -> None:
    assert all(rule.source.startswith("https://") for rule in devices.RULES)


def test_list_names_every_kind_of_device(capsys: pytest.CaptureFixture[str]) -> None:
    assert devices.main([]) == 0
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
    assert devices.main([str(tiny_model), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    (row,) = report["devices"]
    assert row["recipes"] == ["fp32", "fp16", "int4-npu", "int4-npu-g128"]
    assert "genai/issues/2846" in row["driver_faults"][0]["source"]
    assert row["model"]["refused"] == ["weight format int8"]
    assert row["model"]["properties"]["MAX_PROMPT_LEN"] == 1024
    assert report["not_usable"] == {"GPU": "it crashed"}
    assert devices.main([str(tiny_model)]) == 0
    shown = capsys.readouterr().out
    assert "this model: cannot run (weight format int8)" in shown
    assert "known fault of this driver: creating a language model pipeline ends the process" in shown
    assert "GPU: could not be asked: it crashed" in shown


def test_self_test_command_judges_and_labels_the_emulation(
    tiny_model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("OV_AFM_CACHE", str(tmp_path))
    assert devices.main(["--test", str(tiny_model), "--device", "CPU", "NPU-EMULATED"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(": ")[0] for line in lines] == ["CPU", "emulated NPU"]
    assert all(": passed: " in line for line in lines)


def test_failed_self_test_is_status_1_and_shown_in_the_list(
    tiny_model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("OV_AFM_CACHE", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1] / "support"))
    monkeypatch.setattr("ov_afm.runtime.self_test.TRIAL", "simulated_faults:device_that_crashes")
    assert devices.main(["--test", str(tiny_model), "--device", "CPU"]) == 1
    assert "CPU: FAILED: loading and asking it in a child process failed" in capsys.readouterr().out
    assert devices.main([str(tiny_model)]) == 0
    assert "self-test FAILED on" in capsys.readouterr().out
    assert devices.main(["--clear-cache"]) == 0
    capsys.readouterr()
    assert devices.main([str(tiny_model)]) == 0
    assert "self-test" not in capsys.readouterr().out


def test_unknown_device_and_wrong_usage_of_the_command(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert devices.main(["--test", str(tiny_model), "--device", "FOO"]) == 1
    assert capsys.readouterr().err.startswith("ov-afm: error: device 'FOO' is not here; available: CPU")
    with pytest.raises(SystemExit) as end:
        devices.main(["--device", "CPU"])
    assert end.value.code == 2
