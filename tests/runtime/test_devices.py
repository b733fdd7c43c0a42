"""Devices are probed where they can do no harm, and refused before they can."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
from support import simulated_faults

from ov_afm.errors import DeviceError
from ov_afm.presets import RECIPES, Recipe
from ov_afm.runtime import devices, rules

INT4_ASYM = Recipe("asym", weight_format="int4", sym=False, group_size=128)


@pytest.fixture(autouse=True)
def fresh_inventory() -> Iterator[None]:
    devices.inventory.cache_clear()
    yield
    devices.inventory.cache_clear()


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
    with pytest.raises(DeviceError, match="^device 'FOO' is not here; available: CPU") as caught:
        devices.choose("foo")
    assert caught.value.code == "device-missing"


@pytest.mark.slow
def test_simulated_driver_crash_while_probing_costs_only_that_device(monkeypatch: pytest.MonkeyPatch) -> None:
    simulated_faults.replace(monkeypatch, devices, "enumerate_devices", simulated_faults.npu_driver_kills_the_process)
    found = devices.inventory()
    assert [device.name for device in found.devices] == ["CPU"]
    assert "SIGSEGV" in found.faults["NPU"]
    with pytest.raises(DeviceError, match="NPU.*SIGSEGV.*available: CPU") as caught:
        devices.choose("NPU")
    assert caught.value.code == "device-faulty"


@pytest.mark.slow
def test_simulated_driver_hang_while_probing_falls_back_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    simulated_faults.replace(monkeypatch, devices, "enumerate_devices", simulated_faults.gpu_driver_hangs)
    monkeypatch.setattr(devices, "PROBE_TIMEOUT_S", 15.0)
    choices = devices.choose("AUTO")
    assert [choice.device for choice in choices] == ["CPU"]
    assert "GPU: gpu driver hangs: no answer within 15 s" in choices[0].why


@pytest.mark.parametrize("name", ["int4-npu", "int4-npu-g128", "fp16"])
def test_npu_recipes_run_on_npu(name: str) -> None:
    rules.check(RECIPES[name], "NPU")


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
        rules.check(recipe, device)


@pytest.mark.parametrize("device", ["TPU", "", "CPU,GPU", "GPU.x", "NPU.", "CUDA:0"])
def test_device_that_does_not_exist_anywhere_is_refused_with_the_list(device: str) -> None:
    with pytest.raises(DeviceError, match=r"CPU, GPU \(GPU.1, .*NPU, and AUTO or NPU-EMULATED") as caught:
        rules.check(RECIPES["int8"], device)
    assert caught.value.code == "device-unknown"
    assert repr(device) in str(caught.value)


def test_npu_takes_tables_in_four_bits() -> None:
    rules.check(replace(RECIPES["int4"], kinds=(("embedding", "int4"), ("head", "int4"))), "NPU")


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
@pytest.mark.parametrize("device", ["CPU", "GPU", "GPU.1", "AUTO"])
def test_cpu_and_gpu_run_every_named_recipe(recipe: Recipe, device: str) -> None:
    rules.check(recipe, device)


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
    assert all(rule.source.startswith("https://") for rule in rules.RULES)
