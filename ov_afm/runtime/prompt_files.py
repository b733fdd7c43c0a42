"""Computed prompts on disk: the KV state of a prompt's tokens in one file, and folders of such files with a bound.

A file belongs to one model as it was loaded on one machine (its `identity`). Its name is the identity and a digest of
the tokens; it holds the blocks of each layer's cache as bytes, the tokens, and a description of both as JSON with a
checksum of each.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
import time
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from ..errors import ConfigError, SourceError
from ..system.atomic import replacing

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["PromptFile", "PromptFolder", "common_length", "digest"]

logger = logging.getLogger(__name__)

MAGIC = b"OVAFMKV1"
SUFFIX = ".kv"
NAME_DIGITS = 16
# At the end of a file: length of the description, and its checksum.
TAIL_BYTES = 16
# A file that is being written is younger.
LEFTOVER_S = 3600


def digest(value: Any) -> str:
    """A short digest of a JSON value or of bytes."""
    data = value if isinstance(value, bytes) else json.dumps(value, sort_keys=True).encode()
    return hashlib.sha256(data).hexdigest()[:NAME_DIGITS]


def common_length(left: NDArray[np.int64], right: NDArray[np.int64]) -> int:
    """Number of tokens that two sequences begin with alike."""
    count = min(len(left), len(right))
    different = (left[:count] != right[:count]).nonzero()[0]
    return int(different[0]) if len(different) else count


@dataclass(frozen=True, slots=True)
class PromptFile:
    """The file of a computed prompt, its description read and found whole.

    Attributes:
        path: The file.
        identity: Digest of the model and of all that its states depend on.
        tokens: The prompt's tokens whose states it holds.
        tensors: Name, shape, place and checksum of each layer's keys and values.
    """

    path: Path
    identity: str
    tokens: NDArray[np.int64]
    tensors: Sequence[dict[str, Any]]

    @classmethod
    def write(
        cls, path: Path, identity: str, tokens: NDArray[np.int64], states: Iterable[tuple[str, NDArray[np.uint8]]]
    ) -> None:
        """Write a file whole or not at all.

        Args:
            path: The file; an older one is replaced.
            identity: See `PromptFile`.
            tokens: The tokens.
            states: Name of each layer's keys or values, and their blocks (blocks, bytes).

        Raises:
            OSError: The disk is full, or the folder cannot be written.
        """
        with replacing(path) as temporary, temporary.open("wb") as file:
            file.write(MAGIC)
            described = [_write_tensor(file, name, values) for name, values in states]
            ids = tokens.astype("<i4").tobytes()
            fields = {"identity": identity, "tensors": described, "tokens": [file.tell(), len(ids), zlib.crc32(ids)]}
            file.write(ids)
            description = json.dumps(fields).encode()
            tail = len(description).to_bytes(8, "little") + zlib.crc32(description).to_bytes(8, "little")
            file.write(description + tail)

    @classmethod
    def read(cls, path: Path) -> PromptFile:
        """Read the description and the tokens, and check them.

        Raises:
            SourceError: With code `prompt-damaged`: it is no such file, or not a whole one.
        """
        import numpy as np

        try:
            with path.open("rb") as file:
                whole = file.read(len(MAGIC)) == MAGIC and file.seek(-TAIL_BYTES, os.SEEK_END)
                if not whole:
                    raise ValueError("it does not begin as one")
                tail = file.read()
                length, checksum = (int.from_bytes(part, "little") for part in (tail[:8], tail[8:]))
                file.seek(-TAIL_BYTES - length, os.SEEK_END)
                description = file.read(length)
                if zlib.crc32(description) != checksum:
                    raise ValueError("its description is damaged")
                fields = json.loads(description)
                begin, size, checksum = fields["tokens"]
                file.seek(begin)
                ids = file.read(size)
                if zlib.crc32(ids) != checksum:
                    raise ValueError("its tokens are damaged")
        except (OSError, ValueError, KeyError, TypeError) as error:
            if isinstance(error, OSError) and error.filename is not None:
                raise SourceError(f"{path} cannot be read: {error.strerror}", code="prompt-unreadable") from error
            raise damaged(path, str(error) or "it is cut off") from error
        return cls(path, fields["identity"], np.frombuffer(ids, "<i4").astype(np.int64), fields["tensors"])

    def states(self, blocks: int) -> Iterator[tuple[str, NDArray[np.uint8]]]:
        """The first blocks of each layer's keys and values, checked whole.

        Args:
            blocks: Number of blocks.

        Raises:
            SourceError: With code `prompt-damaged`: they are not as they were written.
        """
        import numpy as np

        with self.path.open("rb") as file:
            for tensor in self.tensors:
                file.seek(tensor["offset"])
                data = file.read(tensor["shape"][0] * tensor["shape"][1])
                if zlib.crc32(data) != tensor["crc32"]:
                    raise damaged(self.path, f"{tensor['name']} has changed")
                yield tensor["name"], np.frombuffer(data, np.uint8).reshape(tensor["shape"])[:blocks]


def damaged(path: Path, reason: str) -> SourceError:
    """The error for a file that is not as it was written."""
    return SourceError(f"{path} is no computed prompt, or a damaged one: {reason}", code="prompt-damaged")


def _write_tensor(file: BinaryIO, name: str, blocks: NDArray[np.uint8]) -> dict[str, Any]:
    data, offset = blocks.tobytes(), file.tell()
    file.write(data)
    return {"name": name, "shape": list(blocks.shape), "offset": offset, "crc32": zlib.crc32(data)}


class PromptFolder:
    """Files of computed prompts in a folder; the least recently used ones make room for new ones.

    Several processes may use a folder at once.

    Args:
        folder: The folder; made if there is none.
        limit_bytes: Most bytes of all files together.
        identity: See `PromptFile`.

    Raises:
        ConfigError: The folder cannot be made or written.
    """

    def __init__(self, folder: Path, limit_bytes: float, identity: str) -> None:
        self._folder, self._limit_bytes, self._identity = folder, limit_bytes, identity
        self._known: dict[tuple[str, int], PromptFile | None] = {}
        try:
            # Prompts may be nobody else's business.
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise ConfigError(
                f"{folder} cannot keep prompts ({error.strerror}); give another folder", code="prompt-folder"
            ) from error
        self._clear_leftovers()

    def best(self, tokens: NDArray[np.int64]) -> tuple[PromptFile, int] | None:
        """The file that has most of a prompt's first tokens, and their number; None if no file has any."""
        matches = [(common_length(file.tokens, tokens), file) for file in self._files()]
        length, file = max(matches, key=lambda match: match[0], default=(0, None))
        return (file, length) if file is not None and length else None

    def used(self, file: PromptFile) -> None:
        """Note that a file was used just now."""
        with suppress(OSError):
            os.utime(file.path)

    def remove(self, file: PromptFile) -> None:
        """Delete a file, if another process does not keep it."""
        with suppress(OSError):
            file.path.unlink(missing_ok=True)

    def keep(self, tokens: NDArray[np.int64], states: Iterable[tuple[str, NDArray[np.uint8]]]) -> None:
        """Add a prompt; files that it covers are deleted, then the least recently used ones beyond the bound.

        Raises:
            OSError: The disk is full, or the folder cannot be written.
        """
        path = self._folder / f"{self._identity}-{digest(tokens.tobytes())}{SUFFIX}"
        covered = [file for file in self._files() if common_length(file.tokens, tokens) == len(file.tokens)]
        PromptFile.write(path, self._identity, tokens, states)
        for file in covered:
            if file.path != path:
                self.remove(file)
        self._evict()

    def _clear_leftovers(self) -> None:
        """Delete what killed processes left half written."""
        for path, stat in self._stats(f".*{SUFFIX}").items():
            if stat.st_mtime < time.time() - LEFTOVER_S:
                with suppress(OSError):
                    path.unlink(missing_ok=True)

    def _evict(self) -> None:
        by_age = sorted(self._stats(f"[!.]*{SUFFIX}").items(), key=lambda entry: entry[1].st_mtime_ns)
        total = sum(stat.st_size for _, stat in by_age)
        for path, stat in by_age:
            if total <= self._limit_bytes:
                return
            logger.info("deleting the computed prompt %s: %s is full", path.name, self._folder)
            with suppress(OSError):
                path.unlink(missing_ok=True)
            total -= stat.st_size

    def _stats(self, pattern: str) -> dict[Path, os.stat_result]:
        found = {}
        for path in self._folder.glob(pattern):
            with suppress(OSError):
                found[path] = path.stat()
        return found

    def _files(self) -> list[PromptFile]:
        """The whole files of this identity; damaged ones are deleted."""
        stats = self._stats(f"{self._identity}-*{SUFFIX}")
        known = {}
        for path, stat in stats.items():
            # Not its time, which each use changes.
            key = (path.name, stat.st_size)
            known[key] = self._known[key] if key in self._known else self._read(path)
        self._known = known
        return [file for file in known.values() if file is not None]

    def _read(self, path: Path) -> PromptFile | None:
        try:
            file = PromptFile.read(path)
        except SourceError as error:
            logger.warning("%s; it is computed again", error)
            if error.code == "prompt-damaged":
                with suppress(OSError):
                    path.unlink(missing_ok=True)
            return None
        return file if file.identity == self._identity else None
