"""The device cache keeps its entries and survives damaged or unwritable files."""

from __future__ import annotations

from pathlib import Path

import pytest

from ov_afm.runtime import device_cache
from ov_afm.runtime.driver_faults import FAULTS, known_faults


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OV_AFM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_entries_are_read_back() -> None:
    device_cache.remember("load_s", "model/loading", 2.5)
    device_cache.remember("load_s", "model/warming up", 0.5)
    device_cache.remember("tpot_ms", "model/CPU", 147.0)
    device_cache.remember("tpot_ms", "other/GPU", 20.0)
    assert device_cache.read("load_s") == {"model/loading": 2.5, "model/warming up": 0.5}
    assert device_cache.speeds("model") == {"CPU": 147.0}


def test_damaged_device_cache_counts_as_empty(cache: Path) -> None:
    device_cache.remember("load_s", "a", 1)
    (cache / "devices.json").write_text("{")
    assert device_cache.read("load_s") == {}
    device_cache.remember("load_s", "b", 2)
    assert device_cache.read("load_s") == {"b": 2}


def test_cache_that_cannot_be_written_stops_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("OV_AFM_CACHE", str(tmp_path / "file"))
    device_cache.remember("load_s", "a", 1)
    assert device_cache.read("load_s") == {}


def test_clear_deletes_compiled_models_and_verdicts() -> None:
    folder = device_cache.compiled_dir(device_cache.state_key("m", "Arc 140V", "1", {}))
    foreign = folder.with_name("thesis")
    for each in (folder, foreign):
        each.mkdir(parents=True)
    (folder / "x.blob").write_bytes(b"12345")
    device_cache.remember("verdicts", "a", {})
    assert device_cache.clear() == 5
    assert not folder.exists()
    assert foreign.exists()
    assert device_cache.read("verdicts") == {}


def test_compiled_model_has_a_key_of_its_own_for_all_it_depends_on() -> None:
    def key(model: str = "m", device: str = "Arc 140V", driver: str = "1", **properties: object) -> str:
        return device_cache.state_key(model, device, driver, properties)

    keys = [key(), key(model="n"), key(device="Arc B580"), key(driver="2"), key(MAX_PROMPT_LEN=2048)]
    assert len(set(keys)) == len(keys)
    assert key(CACHE_DIR="elsewhere") == key()


def test_driver_with_a_known_fault_is_found() -> None:
    (fault,) = known_faults("NPU", "32.0.100.4239")
    assert "genai/issues/2846" in fault.source
    assert known_faults("NPU", "32.0.100.9999") == []
    assert known_faults("GPU", "32.0.100.4239") == []
    assert known_faults("NPU", None) == []


def test_every_fault_has_advice_and_a_source() -> None:
    assert all(fault.advice and fault.source.startswith("https://") for fault in FAULTS)
