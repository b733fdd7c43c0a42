"""Where ov_afm keeps what it can fetch or make again."""

from __future__ import annotations

import os
import sys
from pathlib import Path

__all__ = ["cache_dir"]


def cache_dir() -> Path:
    r"""The cache folder, not created: `$OV_AFM_CACHE`, else what the platform calls its cache.

    Returns:
        `%LOCALAPPDATA%\\ov_afm` on Windows, `~/Library/Caches/ov_afm` on macOS, and `$XDG_CACHE_HOME/ov_afm`
        or `~/.cache/ov_afm` elsewhere.
    """
    chosen = os.environ.get("OV_AFM_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    if sys.platform == "win32":
        local = os.environ.get("LOCALAPPDATA")
        return (Path(local) if local else Path.home() / "AppData" / "Local") / "ov_afm"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "ov_afm"
    xdg = os.environ.get("XDG_CACHE_HOME")
    return (Path(xdg) if xdg else Path.home() / ".cache") / "ov_afm"
