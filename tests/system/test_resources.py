"""What the machine has left, told in figures, and logs that do not pile up."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ov_afm.errors import ConfigError, OVAFMError
from ov_afm.system import resources


@pytest.fixture
def group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A control group of version 2, two levels deep, in a folder that stands in for /sys/fs/cgroup."""
    own = resources._group_memory.__globals__
    inner = tmp_path / "slice" / "job"
    inner.mkdir(parents=True)
    cgroup = tmp_path / "self"
    cgroup.write_text("0::/slice/job\n")
    monkeypatch.setitem(own, "GROUP_FILES", {"": (tmp_path, "memory.max", "memory.current", "file")})
    monkeypatch.setitem(own, "Path", lambda name: cgroup if name == "/proc/self/cgroup" else Path(name))
    return inner


def limit(group: Path, maximum: str, used: int = 0, cached: int = 0) -> None:
    (group / "memory.max").write_text(f"{maximum}\n")
    (group / "memory.current").write_text(f"{used}\n")
    (group / "memory.stat").write_text(f"anon 5\nfile {cached}\nfile_dirty 7\n")


def test_limit_of_the_control_group_counts_and_file_pages_are_free(group: Path) -> None:
    limit(group, "50000000", used=30_000_000, cached=10_000_000)
    assert resources.free_memory() == 30_000_000


def test_limit_of_an_outer_group_counts_where_the_own_has_none(group: Path) -> None:
    limit(group, "max", used=30_000_000)
    limit(group.parent, "40000000", used=30_000_000)
    assert resources.free_memory() == 10_000_000


def test_group_above_its_limit_has_nothing_free(group: Path) -> None:
    limit(group, "1000", used=5000)
    assert resources.free_memory() == 0


def test_without_a_limit_the_machine_counts(group: Path) -> None:
    limit(group, "max")
    assert resources.free_memory() > 50_000_000


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
    for number in range(30):
        path = tmp_path / "logs" / f"export-{number}.log"
        path.touch()
        os.utime(path, (number, number))
    log = resources.log_file("export-x")
    assert log.parent == tmp_path / "logs"
    assert not log.exists()
    kept = {path.name for path in (tmp_path / "logs").iterdir()}
    assert kept == {f"export-{number}.log" for number in range(30 - resources.LOGS_KEPT, 30)}


def test_missing_extra_is_named_with_the_command() -> None:
    resources.require("export", "json", "importlib.metadata")
    with pytest.raises(ConfigError) as caught:
        resources.require("export", "no_such_module", "json", "no_such_package.part")
    assert str(caught.value) == (
        "no_such_module, no_such_package.part not installed; run: pip install 'ov-afm[export]'"
    )
