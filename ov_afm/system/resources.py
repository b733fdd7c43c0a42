"""What the machine has left: disk and memory checked before work starts, logs kept after it."""

from __future__ import annotations

import contextlib
import importlib.util
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from ..errors import ConfigError, OVAFMError
from .console import human_bytes
from .paths import cache_dir

__all__ = ["check_disk", "check_memory", "free_memory", "log_file", "require"]

# Control groups: mount point below /sys/fs/cgroup, then the files for limit, use and file pages (version 2, version 1).
CGROUPS = Path("/sys/fs/cgroup")
GROUP_FILES = {
    "": (CGROUPS, "memory.max", "memory.current", "file"),
    "memory": (CGROUPS / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_cache"),
}
LOGS_KEPT = 20


def free_memory() -> int:
    """Bytes that this process may still take: what the machine has, or what its control group allows."""
    import psutil

    free = int(psutil.virtual_memory().available)
    return max(0, min([free, *_group_memory()]))


def _group_memory() -> Iterator[int]:
    """Bytes left in each control group that holds this process, from its own up to the root."""
    try:
        lines = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, own = line.split(":", 2)
        if controllers not in GROUP_FILES:
            continue
        root, limit_file, use_file, pages = GROUP_FILES[controllers]
        group = root / own.lstrip("/")
        for path in (group, *group.parents):
            if not path.is_relative_to(root):
                break
            limit, used = _number(path / limit_file), _number(path / use_file)
            if limit is None or used is None:  # "max", or the root group
                continue
            # File pages are given back when memory is short.
            statistics = (path / "memory.stat").read_text(encoding="utf-8")
            yield limit - used + int(dict(line.split() for line in statistics.splitlines()).get(pages, 0))


def _number(path: Path) -> int | None:
    with contextlib.suppress(OSError, ValueError):
        return int(path.read_text(encoding="utf-8"))
    return None


def check_memory(need: float, purpose: str) -> None:
    """Refuse work that cannot fit.

    Raises:
        OVAFMError: Less memory is free than `need` bytes.
    """
    free = free_memory()
    if need > free:
        raise OVAFMError(
            f"{purpose} needs about {human_bytes(need)} of memory, {human_bytes(free)} are free; "
            "close other programs or use a machine with more memory"
        )


def check_disk(folder: Path, needs: Mapping[str, float]) -> None:
    """Refuse work that the disk of `folder` cannot hold.

    Args:
        folder: Existing folder that will be written to.
        needs: What is written, and its bytes.

    Raises:
        OVAFMError: Less is free than the sum of `needs`.
    """
    free, need = shutil.disk_usage(folder).free, sum(needs.values())
    if need > free:
        parts = " and ".join(f"{human_bytes(size)} for {what}" for what, size in needs.items())
        place = folder.parent if folder.name.endswith(".partial") else folder
        raise OVAFMError(
            f"the disk of {place} has {human_bytes(free)} free, {parts} are needed; free some or use another disk"
        )


def log_file(name: str) -> Path:
    """A new log file in the cache folder; the oldest are deleted.

    Raises:
        ConfigError: The cache folder cannot be made.
    """
    folder = cache_dir() / "logs"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"cannot write logs to {folder} ({error.strerror}); set OV_AFM_CACHE to a folder that can be written"
        ) from error
    with contextlib.suppress(FileNotFoundError):
        # Another process may be deleting them, too.
        for old in sorted(folder.glob("*.log"), key=lambda path: path.stat().st_mtime)[:-LOGS_KEPT]:
            old.unlink(missing_ok=True)
    return folder / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}.log"


def require(extra: str, *modules: str) -> None:
    """Refuse work whose optional packages are not installed.

    Raises:
        ConfigError: A module is missing; the message says what to install.
    """
    missing = [name for name in modules if not _installed(name)]
    if missing:
        raise ConfigError(f"{', '.join(missing)} not installed; run: pip install 'ov-afm[{extra}]'")


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the parent package of a dotted name
        return False
