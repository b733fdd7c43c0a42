"""Where ov_afm keeps its files, and cache entries that are whole or absent."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import platformdirs

from ..errors import ConfigError
from .atomic import disk_full_as_error

__all__ = ["cache_dir", "cached", "data_dir", "expanded", "temporary_dir"]

STALE_S = 24 * 3600


def cache_dir() -> Path:
    r"""The cache folder, not created: `$OV_AFM_CACHE`, else what the platform calls its cache.

    Returns:
        `%LOCALAPPDATA%\ov_afm` on Windows, `~/Library/Caches/ov_afm` on macOS, and `$XDG_CACHE_HOME/ov_afm`
        or `~/.cache/ov_afm` elsewhere.

    Raises:
        ConfigError: It would lie in a home folder, and there is none.
    """
    return _chosen("OV_AFM_CACHE", lambda: platformdirs.user_cache_path("ov_afm", appauthor=False, opinion=False))


def data_dir() -> Path:
    r"""The folder for what the user would miss, not created: `$OV_AFM_DATA`, else the platform's.

    Returns:
        `%LOCALAPPDATA%\ov_afm` on Windows, `~/Library/Application Support/ov_afm` on macOS, and
        `$XDG_DATA_HOME/ov_afm` or `~/.local/share/ov_afm` elsewhere.

    Raises:
        ConfigError: It would lie in a home folder, and there is none.
    """
    return _chosen("OV_AFM_DATA", lambda: platformdirs.user_data_path("ov_afm", appauthor=False))


def temporary_dir() -> Path:
    """The folder for temporary files.

    Raises:
        FileNotFoundError: None of those that the platform has can be written.
    """
    return Path(tempfile.gettempdir())


def expanded(path: str | Path) -> Path:
    """A path with `~` or `~user` at its beginning replaced by that home folder.

    Raises:
        ConfigError: There is no such home folder.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ConfigError(
            f"{path} lies in a home folder that is not known; write the path in full", code="home-missing"
        ) from error


def _chosen(variable: str, default: Callable[[], Path]) -> Path:
    """The folder that an environment variable names, else a default.

    Raises:
        ConfigError: It lies in a home folder, and there is none, as for a user id without a name in a container.
    """
    try:
        chosen = os.environ.get(variable)
        folder = Path(chosen).expanduser() if chosen else default().expanduser()
    except RuntimeError as error:
        raise ConfigError(
            f"there is no home folder (HOME is not set); set {variable} to a folder that can be written",
            code="home-missing",
        ) from error
    return folder


@contextmanager
def cached(final: Path) -> Iterator[Path]:
    """Yield an empty folder that becomes `final` if the block ends without an exception.

    Two processes may fill the same cache entry at once: each works on its own, the first to end wins and
    the other's work is dropped. Nobody waits and nobody fails. What a killed process left is cleared a day later.

    Args:
        final: The cache entry; its contents are replaced by nobody once it exists.

    Raises:
        ConfigError: The cache folder cannot be written.
        OVAFMError: Its disk is full.
    """
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=".making-", dir=final.parent))
    except OSError as error:
        raise ConfigError(
            f"cannot write to {final.parent} ({error.strerror}); set OV_AFM_CACHE to a folder that can be written",
            code="cache-unwritable",
        ) from error
    for leftover in final.parent.glob(".making-*"):
        # Another process may have ended with it meanwhile.
        with suppress(FileNotFoundError):
            if time.time() - leftover.stat().st_mtime > STALE_S:
                shutil.rmtree(leftover, ignore_errors=True)
    try:
        with disk_full_as_error(final.parent):
            yield work
        try:
            work.rename(final)
        except OSError:
            if not final.is_dir():
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
