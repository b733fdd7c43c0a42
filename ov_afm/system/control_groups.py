"""What the control groups of Linux allow this process: memory, and processor time.

A container, a systemd unit and a Kubernetes pod are control groups. The machine's own figures say nothing about them:
in a container with 4 GB on a machine with 64, `free` shows 64, and whoever takes more than 4 is killed. Groups nest,
and every limit from the process's own group up to the root holds. Both versions of the interface are read, wherever
they are mounted (https://docs.kernel.org/admin-guide/cgroup-v2.html, .../cgroup-v1/memory.html).
"""

from __future__ import annotations

import contextlib
import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

__all__ = ["Memory", "cpu_quota", "memory", "oom_kills", "quota_threads"]

PROC = Path("/proc")
# Version 1 writes "no limit" as the largest multiple of a page.
NO_LIMIT = 1 << 60


@dataclass(frozen=True, slots=True)
class Memory:
    """The group that leaves the least memory.

    Attributes:
        limit: Bytes that it may have.
        left: Bytes that it may still take; page cache that can be given back counts as free.
    """

    limit: int
    left: int


def memory() -> Memory | None:
    """The tightest memory limit of this process; None where there is none."""
    found = [each for each in map(_memory_of, _groups("memory")) if each is not None]
    return min(found, key=lambda each: each.left, default=None)


def cpu_quota() -> float | None:
    """Processors' worth of time that this process may use, such as 1.5; None where nothing limits it."""
    return min((each for each in map(_quota_of, _groups("cpu")) if each is not None), default=None)


def quota_threads() -> int | None:
    """Threads that the control groups' CPU quota keeps busy; None where they may use every processor of this process.

    What computes takes its number of threads from the processors, of which a quota hides none: a container with 2 of
    64 would run 64 threads, and all of them stand still for most of each period.
    """
    quota = cpu_quota()
    if quota is None:
        return None
    affinity = getattr(os, "sched_getaffinity", None)
    processors = len(affinity(0)) if affinity else os.cpu_count() or 1
    threads = math.ceil(quota)
    return threads if threads < processors else None


def oom_kills() -> int | None:
    """How many processes of this one's group, or of groups in it, the kernel has killed for memory.

    A group counts its processes that die, whichever limit was reached, also the machine's. Outside any group the
    machine's count stands in for it.

    Returns:
        The count; None where the system does not count.
    """
    for group in _groups("memory"):
        for name in ("memory.events", "memory.oom_control"):
            kills = _table(group / name).get("oom_kill")
            if kills is not None:
                return kills
    return _table(PROC / "vmstat").get("oom_kill")


def _memory_of(group: Path) -> Memory | None:
    """Limit and rest of one group; None where it has no limit."""
    statistics = _table(group / "memory.stat")
    if (used := _number(group / "memory.current")) is not None:
        limits = [_number(group / "memory.max"), _number(group / "memory.high")]
        prefix = ""
    elif (used := _number(group / "memory.usage_in_bytes")) is not None:
        # The second covers groups above the ones that a container sees.
        limits = [_number(group / "memory.limit_in_bytes"), statistics.get("hierarchical_memory_limit")]
        prefix = "total_"
    else:
        return None
    limit = min((each for each in limits if each is not None and 0 <= each < NO_LIMIT), default=None)
    if limit is None:
        return None
    # Neither tmpfs nor locked pages are on these two lists.
    cache = sum(statistics.get(f"{prefix}{kind}_file", 0) for kind in ("active", "inactive"))
    return Memory(limit, max(0, limit - max(0, used - cache)))


def _quota_of(group: Path) -> float | None:
    """Processors' worth of time of one group; None where it has no limit."""
    quota, period = _number(group / "cpu.cfs_quota_us"), _number(group / "cpu.cfs_period_us")
    with contextlib.suppress(OSError, ValueError):
        quota, period = map(int, (group / "cpu.max").read_text(encoding="utf-8").split())
    return quota / period if quota is not None and period is not None and quota > 0 and period > 0 else None


def _groups(controller: str) -> Iterator[Path]:
    """Folders of the groups that hold this process, from its own up to the root: version 1's, then version 2's."""
    mounts = _mounts()
    for line in _lines(PROC / "self" / "cgroup"):
        number, _, rest = line.partition(":")
        controllers, _, own = rest.partition(":")
        wanted = controller if controller in controllers.split(",") else "" if number == "0" else None
        if wanted is None or wanted not in mounts:
            continue
        root, place = mounts[wanted]
        # A container sees its own group as the root of the mount. A path that does not lie there is another's.
        inside = PurePosixPath(own).relative_to(root) if PurePosixPath(own).is_relative_to(root) else PurePosixPath()
        folder = place if ".." in inside.parts else place / inside
        yield from (each for each in (folder, *folder.parents) if each.is_relative_to(place) and each.is_dir())


def _mounts() -> dict[str, tuple[PurePosixPath, Path]]:
    """Group at the root of each mount, and where it is, by controller; version 2 is ""."""
    mounts: dict[str, tuple[PurePosixPath, Path]] = {}
    for line in _lines(PROC / "self" / "mountinfo"):
        fields, _, kind = line.partition(" - ")
        root, place = (re.sub(r"\\(\d{3})", lambda code: chr(int(code[1], 8)), each) for each in fields.split()[3:5])
        entry = PurePosixPath(root), Path(place)
        if kind.startswith("cgroup2 "):
            mounts.setdefault("", entry)
        elif kind.startswith("cgroup "):
            for option in kind.split()[-1].split(","):
                mounts.setdefault(option, entry)
    return mounts


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # Not Linux, or a group that has gone
        return []


def _table(path: Path) -> Mapping[str, int]:
    """Lines of a name and a number."""
    pairs = (line.split() for line in _lines(path))
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdigit()}


def _number(path: Path) -> int | None:
    """The number in a file; None where there is none, as for "max"."""
    with contextlib.suppress(OSError, ValueError):
        return int(path.read_text(encoding="utf-8"))
    return None
