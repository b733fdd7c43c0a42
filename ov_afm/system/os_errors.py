"""What the operating system refuses, as one line: which file, why, and what to do about it.

Code that knows what it was about to do says it better. This is for the rest: a disk that fills up, a folder of another
user, a file system that is read-only may meet any read and any write.
"""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from ..errors import ConfigError, OVAFMError
from .atomic import FULL_BYTES, NO_SPACE
from .paths import cache_dir, temporary_dir

__all__ = ["explained"]

FOLDERS = "OV_AFM_CACHE names the cache folder, TMPDIR the one for temporary files"
# errno → (code, what to do). The reason itself is the system's own text.
ADVICE = {
    errno.EACCES: ("no-permission", "ask its owner for access, or name another one"),
    errno.EPERM: ("no-permission", "ask its owner for access, or name another one"),
    errno.EROFS: ("read-only", f"name a folder that can be written ({FOLDERS})"),
    errno.ENOENT: ("file-missing", "it was moved or deleted meanwhile, or a folder of its path is not there"),
    errno.ENOTDIR: ("path-through-file", "a part of this path is a file; check the path"),
    errno.EISDIR: ("file-is-folder", "name a file"),
    errno.ELOOP: ("link-circle", "its links lead in a circle; name the folder itself"),
    errno.ENAMETOOLONG: ("name-too-long", "choose a shorter name"),
    errno.EMFILE: ("too-many-files", "allow more open files with: ulimit -n 4096"),
    errno.ENFILE: ("too-many-files", "close other programs"),
    errno.EIO: ("disk-faulty", "the disk or the network drive has a fault; use another one"),
}


def explained(error: OSError) -> OVAFMError | None:
    """An error of the operating system with one line for the user; None for one that is not from there."""
    if error.errno is None:
        return None
    if error.errno in NO_SPACE:
        return OVAFMError(f"{_full_place(error)} is full; free some space or use another disk", code="disk-full")
    if error.filename is None and "No usable temporary directory" in str(error):
        return ConfigError(
            "there is no folder for temporary files that can be written; set TMPDIR to one", code="no-temporary-folder"
        )
    code, advice = ADVICE.get(error.errno, ("system-error", "check it and run the same command again"))
    reason = error.strerror or type(error).__name__
    place = _name(error.filename) if error.filename is not None else "a file or folder"
    return OVAFMError(f"{place}: {reason}; {advice}", code=code)


def _name(filename: object) -> str:
    return filename.decode(errors="replace") if isinstance(filename, bytes) else str(filename)


def _full_place(error: OSError) -> str:
    """The disk that is full. A failed write does not say which, so those that may be meant are asked."""
    if error.filename is not None:
        return f"the disk of {_name(error.filename)}"
    full = [str(folder) for folder in _written() if _free(folder) < FULL_BYTES]
    return f"the disk of {' and of '.join(dict.fromkeys(full))}" if full else "a disk, or the user's share of it,"


def _written() -> Iterator[Path]:
    for folder in (Path.cwd, cache_dir, temporary_dir):
        with suppress(OSError, ConfigError):
            yield folder()


def _free(folder: Path) -> int:
    existing = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    return shutil.disk_usage(existing).free
