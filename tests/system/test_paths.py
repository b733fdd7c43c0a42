"""Where ov_afm keeps its files, and cache entries that are whole or absent."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ov_afm.system import paths


@pytest.mark.parametrize(
    ("folder", "own", "xdg", "mac"),
    [
        (paths.cache_dir, "OV_AFM_CACHE", "XDG_CACHE_HOME", "Library/Caches/ov_afm"),
        (paths.data_dir, "OV_AFM_DATA", "XDG_DATA_HOME", "Library/Application Support/ov_afm"),
    ],
    ids=["cache", "data"],
)
def test_folder_follows_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: Callable[[], Path], own: str, xdg: str, mac: str
) -> None:
    monkeypatch.setenv(own, str(tmp_path / "own"))
    assert folder() == tmp_path / "own"
    monkeypatch.setenv(own, "~/own")
    assert folder() == Path.home() / "own"
    monkeypatch.delenv(own)
    monkeypatch.setenv(xdg, str(tmp_path / "xdg"))
    windows = Path.home() / "AppData" / "Local" / "ov_afm"
    assert folder() == {"win32": windows, "darwin": Path.home() / mac}.get(sys.platform, tmp_path / "xdg" / "ov_afm")
    assert not (tmp_path / "xdg").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="XDG's defaults")
def test_folders_without_any_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OV_AFM_CACHE", "OV_AFM_DATA", "XDG_CACHE_HOME", "XDG_DATA_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert paths.cache_dir() == Path.home() / ".cache" / "ov_afm"
    assert paths.data_dir() == Path.home() / ".local" / "share" / "ov_afm"


def test_cache_entry_is_whole_or_absent(tmp_path: Path) -> None:
    entry = tmp_path / "cache" / "entry"
    with pytest.raises(RuntimeError), paths.cached(entry) as work:
        (work / "half").write_text("x")
        raise RuntimeError
    assert list(entry.parent.iterdir()) == []
    with paths.cached(entry) as first, paths.cached(entry) as second:
        (first / "who").write_text("first")
        (second / "who").write_text("second")
    assert (entry / "who").read_text() == "second"
    assert list(entry.parent.iterdir()) == [entry]
