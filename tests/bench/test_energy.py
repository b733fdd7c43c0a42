"""The energy counter, or the reason why there is none."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from ov_afm.bench import energy
from ov_afm.bench.records import FILE_NAME, read
from ov_afm.errors import DeviceError


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
