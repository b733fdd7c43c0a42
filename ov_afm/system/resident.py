"""Weights that stay in memory: read ahead while a model loads, and locked where the user asks for it.

Packed weights are used where the file is mapped, so the system may drop them when another program wants memory, or
after hours without a question, and the next answer reads them from disk again, page by page. Locking pages of the file
through a mapping of our own pins them for every mapping of it. What OpenVINO has repacked is no file any more, only
memory that could be swapped out; it is locked region by region.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import mmap
import os
import re
import sys
import threading
from pathlib import Path

from ..errors import DeviceError
from .console import human_bytes

__all__ = ["check_lock", "lock_file", "lock_own_memory", "read_ahead"]

# The kernel reads no more than this at once, however much is asked for (mm/readahead.c, `force_page_cache_ra`).
STEP_BYTES = 128 << 10
MLOCK_ONFAULT = 1
MAPS = Path("/proc/self/maps")
PRIVATE_MEMORY = re.compile(r"([0-9a-f]+)-([0-9a-f]+) rw-p \S+ \S+ 0\s*(?:\[heap\])?$", re.MULTILINE)


def read_ahead(path: Path) -> None:
    """Have the system read a file into its cache meanwhile; does nothing where it takes no such advice."""
    advise = getattr(os, "posix_fadvise", None)
    if advise is None:
        return

    def read() -> None:
        with contextlib.suppress(OSError), path.open("rb") as stream:
            for begin in range(0, path.stat().st_size, STEP_BYTES):
                advise(stream.fileno(), begin, STEP_BYTES, os.POSIX_FADV_WILLNEED)

    threading.Thread(target=read, name="ov_afm-read-ahead", daemon=True).start()


def check_lock(size: int) -> None:
    """Refuse at once what could not be locked later.

    Args:
        size: Bytes that will be locked.

    Raises:
        DeviceError: The system has no such lock (`lock-unavailable`), or allows less (`lock-refused`).
    """
    if sys.platform != "linux":
        raise DeviceError(
            f"memory can be locked on Linux only, this is {sys.platform}; leave --lock-memory out",
            code="lock-unavailable",
        )
    # Pages that nobody touches count towards the limit, and take no memory.
    with contextlib.suppress(OSError), mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as probe:
        _lock(_address(probe), size, MLOCK_ONFAULT)


def lock_file(path: Path) -> mmap.mmap:
    """Read a file into memory and keep it there.

    Returns:
        A mapping; the file's pages stay until it is closed.

    Raises:
        DeviceError: The system forbids it.
    """
    with path.open("rb") as stream:
        mapping = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    try:
        _lock(_address(mapping), len(mapping), 0)
    except DeviceError:
        mapping.close()
        raise
    return mapping


def lock_own_memory() -> int:
    """Keep what this process has allocated so far from being swapped out, until it is freed.

    Returns:
        Bytes of address space that are locked; pages that are not in use yet are locked when they are.

    Raises:
        DeviceError: The system forbids it.
    """
    total = 0
    for begin, end in PRIVATE_MEMORY.findall(MAPS.read_text(encoding="utf-8")):
        start, size = int(begin, 16), int(end, 16) - int(begin, 16)
        try:
            _lock(start, size, MLOCK_ONFAULT)
            total += size
        except DeviceError:
            # Another thread may have freed it meanwhile.
            if f"{begin}-{end} " in MAPS.read_text(encoding="utf-8"):
                raise
    return total


def _address(mapping: mmap.mmap) -> int:
    import numpy as np

    return int(np.frombuffer(mapping, np.uint8).ctypes.data)


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _lock(address: int, size: int, flags: int) -> None:
    arguments = ctypes.c_void_p(address), ctypes.c_size_t(size), ctypes.c_uint(flags)
    if _libc().mlock2(*arguments) == 0:
        return
    reason = os.strerror(ctypes.get_errno())
    import resource

    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    allowed = "any amount" if limit == resource.RLIM_INFINITY else human_bytes(limit)
    raise DeviceError(
        f"{human_bytes(size)} of memory cannot be locked ({reason}): the limit is {allowed}; raise it (ulimit -l, "
        "LimitMEMLOCK= of a systemd unit, --ulimit memlock=-1 of a container), or leave --lock-memory out",
        code="lock-refused",
    )
