"""What the machine has left, told in figures, and logs that do not pile up."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ov_afm.errors import ConfigError, OVAFMError
from ov_afm.system import resources


def test_too_little_memory_is_refused_with_both_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "free_memory", lambda: 3_000_000_000)
    resources.check_memory(3e9, "this")
    with pytest.raises(OVAFMError) as caught:
        resources.check_memory(9.24e9, "this export")
    assert str(caught.value) == (
        "this export needs about 9.24 GB of memory, 3.00 GB are free; "
        "close other programs or use a machine with more memory"
    )


def test_too_little_disk_is_refused_with_every_figure(tmp_path: Path) -> None:
    partial = tmp_path / ".m.1.partial"
    partial.mkdir()
    resources.check_disk(partial, {"a": 1.0})
    with pytest.raises(OVAFMError) as caught:
        resources.check_disk(partial, {"the IR": 1e15, "the model": 2e15})
    message = str(caught.value)
    assert message.startswith(f"the disk of {tmp_path} has ")
    assert message.endswith(
        " free, 1000000.00 GB for the IR and 2000000.00 GB for the model are needed; free some or use another disk"
    )


def test_oldest_logs_are_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OV_AFM_CACHE", str(tmp_path))
    (tmp_path / "logs").mkdir()
    for number in range(10, 40):
        for name in (f"export-20261127-1200{number}.log", f"of-another-program-{number}.log"):
            (tmp_path / "logs" / name).touch()
            os.utime(tmp_path / "logs" / name, (number, number))
    log = resources.log_file("export-x" * 100)
    assert log.parent == tmp_path / "logs"
    left = sorted(path.name for path in log.parent.glob("export-20261127-1200*"))
    assert left == [f"export-20261127-1200{number}.log" for number in range(41 - resources.LOGS_KEPT, 40)]
    assert len(list(log.parent.glob("of-another-program-*"))) == 30


def test_log_folder_that_cannot_be_written_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OV_AFM_CACHE", str(tmp_path))
    (tmp_path / "logs").touch()
    with pytest.raises(ConfigError) as caught:
        resources.log_file("export-x")
    assert caught.value.code == "cache-unwritable"
    assert str(tmp_path / "logs") in str(caught.value)


def test_missing_extra_is_named_with_the_command() -> None:
    resources.require("export", "json", "importlib.metadata")
    with pytest.raises(ConfigError) as caught:
        resources.require("export", "no_such_module", "json", "no_such_package.part")
    assert str(caught.value) == (
        "no_such_module, no_such_package.part not installed; run: pip install 'ov-afm[export]'"
    )
