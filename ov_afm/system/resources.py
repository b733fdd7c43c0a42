"""What the machine has left: disk and memory checked before work starts, logs kept after it."""

from __future__ import annotations

import contextlib
import importlib.util
import re
import shutil
import time
from collections.abc import Mapping
from pathlib import Path

from ..errors import ConfigError, OVAFMError
from . import control_groups
from .console import human_bytes
from .paths import cache_dir

__all__ = ["check_disk", "check_memory", "free_memory", "log_file", "require"]

LOGS_KEPT = 20
LOG_NAME = re.compile(r".+-\d{8}-\d{6}\.log")
# Of the output's name: a file name may have 255 bytes, and a character up to 4.
LOG_NAME_CHARACTERS = 50


def free_memory() -> int:
    """Bytes that this process may still take: what the machine has, or what its control groups leave, if less."""
    import psutil

    free, group = int(psutil.virtual_memory().available), control_groups.memory()
    return free if group is None else min(free, group.left)


def check_memory(
    need: float,
    purpose: str,
    *,
    remedy: str = "close other programs or use a machine with more memory",
    error: type[OVAFMError] = OVAFMError,
) -> None:
    """Refuse work that cannot fit, instead of being killed in the middle of it.

    Args:
        need: Bytes.
        purpose: What needs them, for the message.
        remedy: What to do where the machine's memory is what is short.
        error: What to raise.

    Raises:
        OVAFMError: Less is free; with code `memory-short`.
    """
    free = free_memory()
    if need <= free:
        return
    where, group = "", control_groups.memory()
    if group is not None and group.left <= free:
        where = f" of the {human_bytes(group.limit)} that this control group (container) may have"
        remedy = f"raise its limit, or {remedy}"
    raise error(
        f"{purpose} needs about {human_bytes(need)} of memory, {human_bytes(free)} are free{where}; {remedy}",
        code="memory-short",
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
        ConfigError: The cache folder cannot be made or written.
    """
    folder = cache_dir() / "logs"
    path = folder / f"{name[:LOG_NAME_CHARACTERS]}-{time.strftime('%Y%m%d-%H%M%S')}.log"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path.touch()
    except OSError as error:
        raise ConfigError(
            f"cannot write logs to {folder} ({error.strerror}); set OV_AFM_CACHE to a folder that can be written",
            code="cache-unwritable",
        ) from error
    with contextlib.suppress(OSError):
        # Another process may be deleting them, too; and the user may keep logs of other programs there.
        logs = [each for each in folder.glob("*.log") if LOG_NAME.fullmatch(each.name)]
        for old in sorted(logs, key=lambda each: each.stat().st_mtime)[:-LOGS_KEPT]:
            old.unlink(missing_ok=True)
    return path


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
