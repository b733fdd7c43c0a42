"""Make a directory or a file whole or not at all.

A file is written under a hidden name beside its own and renamed when it is complete (`replacing`, `write_text`); a
rename within one folder is atomic. A directory (`staging`) is made in a hidden sibling, `.NAME.PID.ov-afm.partial`, and
renamed likewise. A lock that the operating system drops with the process keeps a second writer out, so what a killed
run left behind is recognised and cleared. The hidden name is each process's own, so that a child that outlives a
killed run by a moment writes nowhere else.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ..errors import ConfigError, OVAFMError

__all__ = ["disk_full_as_error", "replacing", "staging", "write_bytes", "write_json", "write_text"]

NO_SPACE = {errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)}
# Less free than this when a native writer fails is a full disk.
FULL_BYTES = 1_000_000
# Long enough to look again where the last holder was just deleting the lock's file.
LOCK_TIMEOUT_S = 0.2


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield the name of a temporary file that takes the place of `path` if the block ends without an exception.

    The name keeps the suffix of `path` and is this thread's own. Nobody sees a file that is half written.
    """
    temporary = path.with_name(f".{os.getpid()}-{threading.get_ident()}.{path.name}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file, replacing an older one in a single step."""
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file as it is given, replacing an older one in a single step."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any, *, indent: int | None = 2) -> None:
    """Write a value as JSON with a newline at its end, replacing an older file in a single step."""
    write_text(path, json.dumps(value, indent=indent, ensure_ascii=False) + "\n")


@contextmanager
def staging(output: Path, *, replace: bool = False, check: Callable[[Path], None] | None = None) -> Iterator[Path]:
    """Yield an empty work directory that becomes `output` when the block ends without an exception.

    Args:
        output: Final directory. It must not exist, or be empty, unless `replace`.
        replace: Put the new directory in the place of an existing one.
        check: Raises for an existing directory that must not be replaced; called again before it is.

    Raises:
        ConfigError: `output` is a file or a directory that must not be replaced, or cannot be created.
        OVAFMError: Another process is writing `output`.
    """
    output = output.resolve()
    _check_target(output, replace, check)
    new_parents = [folder for folder in output.parents if not folder.exists()]
    lock = FileLock(output.with_name(f".{output.name}.ov-afm.lock"), timeout=LOCK_TIMEOUT_S)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout as error:
        raise OVAFMError(
            f"another process is writing {output}; wait for it, or choose another output directory", code="output-busy"
        ) from error
    except OSError as error:
        reason = "it is a file" if isinstance(error, FileExistsError) else error.strerror
        raise ConfigError(
            f"cannot write to {output.parent} ({reason}); choose another output directory", code="output-unwritable"
        ) from error
    partial = output.with_name(f".{output.name}.{os.getpid()}.ov-afm.partial")
    old = output.with_name(f".{output.name}.ov-afm.old")
    try:
        _clear_leftovers(output, old)
        _check_target(output, replace, check)
        partial.mkdir()
        yield partial
        # Work takes long; meanwhile somebody may have put something there.
        _check_target(output, replace, check)
        if output.exists():
            output.rename(old)
        partial.rename(output)
    finally:
        with suppress(OSError):
            _clear_leftovers(output, old)
        if sys.platform != "win32":  # where the release deletes it
            Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()
        # What holds the output, or anything else by now, stays.
        with suppress(OSError):
            for folder in new_parents:
                folder.rmdir()


def _clear_leftovers(output: Path, old: Path) -> None:
    """Undo what a run that failed or was killed left: put back the directory to be replaced, delete the rest."""
    if old.exists() and not output.exists():
        old.rename(output)
    # Not those of an output whose name begins alike, such as `model.new` beside `model`.
    partial = re.compile(rf"\.{re.escape(output.name)}\.\d+\.ov-afm\.partial")
    for leftover in (old, *(path for path in output.parent.iterdir() if partial.fullmatch(path.name))):
        shutil.rmtree(leftover, ignore_errors=True)


def _check_target(output: Path, replace: bool, check: Callable[[Path], None] | None) -> None:
    if output.exists() and not output.is_dir():
        raise ConfigError(f"{output} is a file; choose another output directory", code="output-is-file")
    if not output.exists() or not any(output.iterdir()):
        return
    if not replace:
        advice = ", or replace it with --force" if check is None or _passes(check, output) else ""
        raise ConfigError(f"{output} is not empty; choose another output directory{advice}", code="output-not-empty")
    if output in (_home(), Path.cwd(), *Path.cwd().parents):
        raise ConfigError(
            f"{output} holds your home or the current folder and will not be replaced; choose another directory",
            code="output-protected",
        )
    if check is not None:
        check(output)


def _passes(check: Callable[[Path], None], output: Path) -> bool:
    try:
        check(output)
    except ConfigError:
        return False
    return True


def _home() -> Path | None:
    """The user's home folder; None where there is none, as for a user id without a name in a container."""
    try:
        return Path.home().resolve()
    except RuntimeError:
        return None


@contextmanager
def disk_full_as_error(folder: Path) -> Iterator[None]:
    """Turn "no space left" into one line with the figure.

    Native writers do not say why they failed: a `RuntimeError` on a full disk is taken for that too.

    Raises:
        OVAFMError: The disk that holds `folder` is full.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        free = shutil.disk_usage(folder).free
        if getattr(error, "errno", None) not in NO_SPACE and (isinstance(error, OSError) or free > FULL_BYTES):
            raise
        # A staging or work folder is not a name that the user knows.
        hidden = (path.parent for path in (folder, *folder.parents) if path.name.endswith(".ov-afm.partial"))
        place = next(hidden, folder.parent if folder.name.startswith("ov_afm-") else folder)
        raise OVAFMError(
            f"the disk that holds {place} is full ({free / 1e6:.0f} MB free); free some space or use another folder",
            code="disk-full",
        ) from error
