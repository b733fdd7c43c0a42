"""Make a directory whole or not at all.

Work happens in a hidden sibling, `.NAME.partial`, and is renamed to its final name when it is
finished; a rename within one folder is atomic. A lock that the operating system drops with the
process keeps a second writer out, so what a killed run left behind is recognised and cleared.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from .errors import ConfigError, OVAFMError

__all__ = ["disk_full_as_error", "staging"]


@contextmanager
def staging(output: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield an empty work directory that becomes `output` when the block ends without an exception.

    Args:
        output: Final directory. It must not exist, or be empty, unless `replace`.
        replace: Put the new directory in the place of an existing one.

    Raises:
        ConfigError: `output` is a file or a directory that must not be replaced, or cannot be created.
        OVAFMError: Another process is writing `output`.
    """
    output = output.absolute()
    _check_target(output, replace)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        lock = _lock(output.with_name(f".{output.name}.lock"))
    except OSError as error:
        msg = f"cannot write to {output.parent} ({error.strerror}); choose another output directory"
        raise ConfigError(msg) from error
    partial = output.with_name(f".{output.name}.partial")
    old = output.with_name(f".{output.name}.old")
    try:
        _check_target(output, replace)
        for leftover in (partial, old):
            shutil.rmtree(leftover, ignore_errors=True)
        partial.mkdir()
        yield partial
        if output.exists():
            output.rename(old)
        partial.rename(output)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        _unlock(lock)


def _check_target(output: Path, replace: bool) -> None:
    if output.exists() and not output.is_dir():
        msg = f"{output} is a file; choose another output directory"
        raise ConfigError(msg)
    if not output.exists() or not any(output.iterdir()):
        return
    if not replace:
        msg = f"{output} is not empty; choose another output directory, or replace it with --force"
        raise ConfigError(msg)
    if output == Path.home() or output in (Path.cwd(), *Path.cwd().parents):
        msg = f"{output} holds your home or the current folder and will not be replaced; choose another directory"
        raise ConfigError(msg)


def _lock(path: Path) -> IO[bytes]:
    while True:
        handle = path.open("a+b")
        try:
            _lock_file(handle)
        except OSError as error:
            handle.close()
            name = path.name[1 : -len(".lock")]
            msg = f"another process is writing {path.with_name(name)}; wait for it, or choose another output directory"
            raise OVAFMError(msg) from error
        # The last holder may have removed the file between our open and our lock.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle.fileno()), path.stat()):
                return handle
        handle.close()


def _unlock(handle: IO[bytes]) -> None:
    if sys.platform != "win32":
        Path(handle.name).unlink(missing_ok=True)
    handle.close()
    if sys.platform == "win32":
        with contextlib.suppress(OSError):
            Path(handle.name).unlink()


if sys.platform == "win32":
    import msvcrt

    def _lock_file(handle: IO[bytes]) -> None:
        msvcrt.locking(handle.fileno(), msvcrt.LK_NBLCK, 1)
else:
    import fcntl

    def _lock_file(handle: IO[bytes]) -> None:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


@contextmanager
def disk_full_as_error(folder: Path) -> Iterator[None]:
    """Turn "no space left" into one line with the figure.

    Raises:
        OVAFMError: The disk that holds `folder` is full.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT if hasattr(errno, "EDQUOT") else errno.ENOSPC):
            raise
        free = shutil.disk_usage(folder).free
        msg = f"the disk that holds {folder} is full ({free / 1e6:.0f} MB free); free some space or use another folder"
        raise OVAFMError(msg) from error
