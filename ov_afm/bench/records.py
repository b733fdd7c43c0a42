"""Records of a comparison: JSON lines, one a run, each complete in itself.

A line is written when its run ends, so an interrupted sweep keeps what it measured. All lines of a
file belong to one sweep: the same settings, models, versions and machine, named by a digest.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..system.atomic import write_bytes
from ..system.json_text import parse
from .plan import Combination

__all__ = ["FILE_NAME", "Record", "Store", "group", "read"]

FILE_NAME = "records.jsonl"
SCHEMA = 1
# Of every record, a half-written one included.
BEGIN = b'{"schema": '
STATUSES = ("ok", "cannot run", "failed")
Record = dict[str, Any]


def read(path: Path) -> list[Record]:
    """The records of a file.

    Raises:
        ConfigError: There is no such file, or a line of it is no record; the line is named.
    """
    if not path.is_file():
        raise ConfigError(f"no such records file: {path}", code="records-missing")
    records = _records(path, path.read_bytes())
    if not records:
        raise ConfigError(f"{path} has no records")
    return records


def _records(path: Path, data: bytes) -> list[Record]:
    records = []
    for number, line in enumerate(data.splitlines(), 1):
        try:
            records.append(_check(parse(line.decode())))
        except (ValueError, KeyError, TypeError) as error:
            reason = f"lacks {error}" if isinstance(error, KeyError) else str(error)
            raise ConfigError(
                f"{path} line {number} is no benchmark record ({reason}); delete that line or use another file",
                code="record-unreadable",
            ) from error
    return records


def _check(record: Any) -> Record:
    if not isinstance(record, dict):
        raise TypeError(f"found {type(record).__name__}, not an object")
    Combination.from_record(record)
    if record["schema"] > SCHEMA:
        raise ValueError(f"layout {record['schema']}, this ov_afm reads up to {SCHEMA}")
    if record["status"] not in STATUSES:
        raise ValueError(f"status {record['status']!r}")
    if record["status"] == "ok":
        for name in ("run", "ttft_ms", "tpot_ms", "total_tokens_per_s", "peak_rss_bytes", "load_s"):
            float(record[name])
    return record


def group(records: Iterable[Record]) -> dict[Combination, list[Record]]:
    """Records by combination, in the order in which they came."""
    groups: dict[Combination, list[Record]] = {}
    for record in records:
        groups.setdefault(Combination.from_record(record), []).append(record)
    return groups


class Store:
    """The records file of a report folder.

    Args:
        folder: The report folder, created where it is missing. None keeps records in memory only.
        sweep: Digest of the sweep that is to be written.

    Raises:
        ConfigError: The folder exists and holds something else than a report of this sweep.

    Attributes:
        records: All records, those of the file included.
    """

    def __init__(self, folder: Path | None, sweep: str) -> None:
        self.records: list[Record] = []
        self._path = None if folder is None else folder / FILE_NAME
        if folder is None or self._path is None:
            return
        if folder.exists() and not folder.is_dir():
            raise ConfigError(f"{folder} is a file; name a folder for the report")
        if self._path.exists():
            self._resume(self._path, sweep)
        elif folder.exists() and any(folder.iterdir()):
            raise ConfigError(
                f"{folder} exists and holds no {FILE_NAME}; name another folder, nothing in it was changed",
                code="report-folder",
            )
        folder.mkdir(parents=True, exist_ok=True)

    def _resume(self, path: Path, sweep: str) -> None:
        # A killed process may leave half a line; the run it belongs to is measured again.
        data = path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if not whole and data[: len(BEGIN)] != BEGIN[: len(data)]:
            raise ConfigError(f"{path} holds no benchmark records; name another folder", code="report-folder")
        if whole:
            records = _records(path, whole)
            if any(record.get("sweep") != sweep for record in records):
                raise ConfigError(
                    f"{path.parent} holds another sweep (other settings, models, versions or machine); "
                    "name another folder, or give that sweep's options to continue it",
                    code="other-sweep",
                )
            self.records = records
        # Only now that the file is known to be this sweep's.
        if whole != data:
            write_bytes(path, whole)

    def done(self, combination: Combination, runs: int) -> bool:
        """Whether all runs of a combination are recorded."""
        statuses = [record["status"] for record in group(self.records).get(combination, [])]
        return statuses.count("ok") >= runs

    def drop(self, combination: Combination) -> None:
        """Remove the records of a combination that is about to be measured again."""
        kept = [record for record in self.records if Combination.from_record(record) != combination]
        if len(kept) != len(self.records):
            self.records = kept
            if self._path:
                write_bytes(self._path, b"".join(map(_line, kept)))

    def add(self, combination: Combination, fields: Mapping[str, Any]) -> Record:
        """Append a record."""
        record = {"schema": SCHEMA, **asdict(combination), **fields}
        self.records.append(record)
        if self._path:
            with self._path.open("ab") as stream:
                stream.write(_line(record))
        return record


def _line(record: Record) -> bytes:
    return (json.dumps(record, ensure_ascii=False) + "\n").encode()
