"""Memory that this process has taken, from the counters of the system."""

from __future__ import annotations

import re
import sys
from pathlib import Path

__all__ = ["drm_bytes", "peak_rss_bytes"]

PROC = Path("/proc/self")
UNITS = {"": 1, "KiB": 1 << 10, "MiB": 1 << 20}


def peak_rss_bytes() -> int:
    """Most resident memory that this process ever had.

    On Linux from VmHWM: `getrusage` would report the parent's peak where that was larger, because it
    is carried over `exec`.
    """
    if sys.platform == "linux":
        found = re.search(r"VmHWM:\s+(\d+) kB", (PROC / "status").read_text(encoding="utf-8"))
        if found:
            return int(found[1]) * 1024
    import psutil

    memory = psutil.Process().memory_info()
    return int(getattr(memory, "peak_wset", memory.rss))


def drm_bytes(proc: Path = PROC) -> int | None:
    """Graphics and NPU memory that this process holds, as the kernel's drivers account it.

    Returns:
        Bytes over all of the process's clients of such drivers; None where no driver tells.
    """
    clients: dict[str, int] = {}
    folder = proc / "fdinfo"
    for path in folder.iterdir() if folder.is_dir() else ():
        try:
            text = path.read_text(encoding="utf-8", errors="replace")
        except OSError:
            continue  # closed meanwhile
        # https://docs.kernel.org/gpu/drm-usage-stats.html
        client = re.search(r"^drm-client-id:\s*(\S+)", text, re.MULTILINE)
        device = re.search(r"^drm-pdev:\s*(\S+)", text, re.MULTILINE)
        regions = re.findall(r"^drm-(?:resident|memory)-\w+:\s*(\d+)\s*(KiB|MiB|)$", text, re.MULTILINE)
        if client and regions:
            # Several descriptors may belong to one client, which is counted once.
            name = f"{device[1] if device else ''}/{client[1]}"
            clients[name] = sum(int(amount) * UNITS[unit] for amount, unit in regions)
    return sum(clients.values()) if clients else None
