"""What the operating system refuses is one line that names the path."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from ov_afm.errors import ConfigError
from ov_afm.system import paths
from ov_afm.system.child_process import ChildProcess, run_in_child
from ov_afm.system.os_errors import explained


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (errno.EACCES, "no-permission"),
        (errno.EROFS, "read-only"),
        (errno.ENOTDIR, "path-through-file"),
        (errno.ELOOP, "link-circle"),
        (errno.ENOSPC, "disk-full"),
        (errno.EDQUOT, "disk-full"),
        (errno.ENAMETOOLONG, "name-too-long"),
        (errno.ENOENT, "file-missing"),
        (errno.EBUSY, "system-error"),
    ],
    ids=errno.errorcode.get,
)
def test_refusal_names_the_path_and_what_to_do(number: int, code: str) -> None:
    error = explained(OSError(number, os.strerror(number), "/data/model.bin"))
    assert error is not None
    assert error.code == code
    assert "/data/model.bin" in str(error)
    assert "; " in str(error)


def test_full_disk_is_found_where_the_write_does_not_name_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OV_AFM_CACHE", str(tmp_path / "not" / "made" / "yet"))
    monkeypatch.setattr("ov_afm.system.os_errors._free", lambda folder: 0 if folder == paths.cache_dir() else 10**9)
    error = explained(OSError(errno.ENOSPC, "No space left on device"))
    assert error is not None
    assert f"the disk of {tmp_path / 'not' / 'made' / 'yet'} is full" in str(error)
    monkeypatch.setattr("ov_afm.system.os_errors._free", lambda folder: 10**9)
    assert "a disk, or the user's share of it, is full" in str(explained(OSError(errno.ENOSPC, "No space left")))


def test_missing_temporary_folder_says_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setattr("tempfile._candidate_tempdir_list", lambda: ["/nowhere"])
    with pytest.raises(FileNotFoundError) as caught:
        ChildProcess().run(os.getpid)
    error = explained(caught.value)
    assert error is not None
    assert (error.code, "TMPDIR" in str(error)) == ("no-temporary-folder", True)


def test_errors_of_libraries_are_not_taken_for_the_systems() -> None:
    assert explained(OSError("Can't load the configuration of 'x'")) is None


def test_refusal_in_a_child_arrives_with_its_path(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        run_in_child(os.listdir, str(tmp_path / "none"))
    assert caught.value.filename == str(tmp_path / "none")


def chatter(size: int) -> int:
    print("x" * size, flush=True)
    return size


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_work_goes_on_where_the_disk_of_its_log_is_full() -> None:
    assert ChildProcess(log=Path("/dev/full")).run(chatter, 100_000) == 100_000
    with pytest.raises(RuntimeError, match="ValueError: invalid literal"):
        ChildProcess(log=Path("/dev/full")).run(int, "x")


def test_home_folder_of_nobody_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody(*_: object) -> None:
        raise KeyError

    for name in (
        "HOME",
        "USERPROFILE",
        "OV_AFM_CACHE",
        "OV_AFM_DATA",
        "XDG_CACHE_HOME",
        "XDG_DATA_HOME",
        "LOCALAPPDATA",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", nobody)
    monkeypatch.setattr("pwd.getpwnam", nobody)
    for folder, variable in ((paths.cache_dir, "OV_AFM_CACHE"), (paths.data_dir, "OV_AFM_DATA")):
        with pytest.raises(ConfigError, match=f"HOME is not set.*; set {variable} ") as caught:
            folder()
        assert caught.value.code == "home-missing"
    with pytest.raises(ConfigError, match="^~nobody/model lies in a home folder that is not known"):
        paths.expanded("~nobody/model")
