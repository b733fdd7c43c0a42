"""Files are read ahead and locked: checked with what the kernel says of their pages."""

from __future__ import annotations

import ctypes
import mmap
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from ov_afm.errors import DeviceError
from ov_afm.system import resident

SIZE = 4 << 20
linux = pytest.mark.skipif(sys.platform != "linux", reason="asks Linux about pages")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file on the disk that is not in the page cache."""
    path = tmp_path / "weights.bin"
    with path.open("wb") as stream:
        stream.write(b"w" * SIZE)
        stream.flush()
        os.fsync(stream.fileno())
    evict(path)
    if resident_share(path) > 0:
        pytest.skip("this file system keeps its pages")
    return path


def evict(path: Path) -> None:
    with path.open("rb") as stream:
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def resident_share(path: Path) -> float:
    """Share of a file's pages that are in memory."""
    with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as mapping:
        pages = np.zeros(-(-len(mapping) // mmap.PAGESIZE), np.uint8)
        begin = np.frombuffer(mapping, np.uint8).ctypes.data
        assert ctypes.CDLL(None).mincore(ctypes.c_void_p(begin), ctypes.c_size_t(len(mapping)), pages.ctypes) == 0
    return float((pages & 1).mean())


def locked_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return int(re.findall(r"VmLck:\s+(\d+) kB", status)[0]) * 1024


@linux
def test_file_is_read_ahead_in_whole(file: Path) -> None:
    resident.read_ahead(file)
    deadline = time.monotonic() + 10
    while resident_share(file) < 1 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert resident_share(file) == 1


def test_a_file_that_is_gone_is_not_read_ahead(tmp_path: Path) -> None:
    resident.read_ahead(tmp_path / "none")


@linux
def test_locked_file_stays_until_it_is_closed(file: Path) -> None:
    before = locked_bytes()
    mapping = resident.lock_file(file)
    assert locked_bytes() == before + SIZE
    evict(file)
    assert resident_share(file) == 1
    mapping.close()
    assert locked_bytes() == before
    evict(file)
    assert resident_share(file) == 0


@linux
def test_own_memory_is_locked_and_can_still_be_allocated() -> None:
    script = f"""
import sys; sys.path[:0] = {sys.path!r}
from ov_afm.system import resident
from test_resident import locked_bytes
weights = bytearray(b"w" * {SIZE})
assert resident.lock_own_memory() >= {SIZE}
assert locked_bytes() >= {SIZE}
more = bytearray(b"m" * {SIZE})
"""
    folder = str(Path(__file__).parent)
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60, env={**os.environ, "PYTHONPATH": folder})


WITHOUT_RIGHTS = """
import ctypes, resource, sys; sys.path[:0] = {path!r}
from pathlib import Path
from ov_afm.errors import DeviceError
from ov_afm.system import resident
# capset(2): no capability, so that the limit holds for root too.
ctypes.CDLL(None).capset((ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)())
resource.setrlimit(resource.RLIMIT_MEMLOCK, ({limit}, {limit}))
for call, argument in ((resident.check_lock, {size}), (resident.lock_file, Path({file!r}))):
    try:
        call(argument)
    except DeviceError as error:
        print(error.code, error)
"""


@linux
@pytest.mark.parametrize("limit", [1 << 20, 0], ids=["too low", "none"])
def test_limit_of_locked_memory_is_told_with_figures_and_the_way_out(file: Path, limit: int) -> None:
    script = WITHOUT_RIGHTS.format(path=sys.path, limit=limit, size=SIZE, file=str(file))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    figure = "1.0 MB" if limit else "0 B"
    for line in done.stdout.splitlines():
        assert line.startswith("lock-refused 4.2 MB of memory cannot be locked (")
        assert f": the limit is {figure}; raise it (ulimit -l, LimitMEMLOCK=" in line
    assert len(done.stdout.splitlines()) == 2


def test_other_systems_refuse_the_lock_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(DeviceError, match="on Linux only, this is win32; leave --lock-memory out") as caught:
        resident.check_lock(SIZE)
    assert caught.value.code == "lock-unavailable"
