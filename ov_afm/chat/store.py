"""Conversations between runs: one small SQLite file for each user of the machine."""

from __future__ import annotations

import contextlib
import json
import sqlite3
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..errors import OVAFMError
from ..system import paths
from .conversation import Conversation, Turn, title_of

__all__ = ["Entry", "Store", "data_dir"]

LAYOUT = 1
TABLES = """
CREATE TABLE IF NOT EXISTS conversation (
    id INTEGER PRIMARY KEY, owner TEXT NOT NULL, title TEXT NOT NULL, system TEXT NOT NULL, changed REAL NOT NULL
);
CREATE TABLE IF NOT EXISTS turn (
    conversation INTEGER NOT NULL REFERENCES conversation(id) ON DELETE CASCADE,
    place INTEGER NOT NULL, role TEXT NOT NULL, content TEXT NOT NULL, figures TEXT,
    PRIMARY KEY (conversation, place)
);
"""


def data_dir() -> Path:
    """`paths.data_dir`, made if it does not exist; only this user may read it.

    Raises:
        OVAFMError: It cannot be made.
    """
    folder = paths.data_dir()
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise OVAFMError(f"{folder} cannot be made: {error.strerror}; name another folder with OV_AFM_DATA") from error
    return folder


@dataclass(frozen=True, slots=True)
class Entry:
    """A conversation in a list.

    Attributes:
        id: Its number.
        name: Its title, or the beginning of its first question.
    """

    id: int
    name: str


class Store:
    """Conversations on disk; usable from every thread.

    Args:
        path: The file; made if it is not there.

    Raises:
        OVAFMError: It cannot be read or written, or a newer ov_afm made it.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        if not path.exists():
            with contextlib.suppress(OSError):
                path.touch(mode=0o600)
        try:
            self._connection = sqlite3.connect(path, check_same_thread=False, timeout=10)
            self._connection.execute("PRAGMA foreign_keys = ON")
            layout = self._connection.execute("PRAGMA user_version").fetchone()[0]
            if layout <= LAYOUT:
                self._connection.executescript(TABLES)
                self._connection.execute(f"PRAGMA user_version = {LAYOUT}")
        except sqlite3.Error as error:
            raise OVAFMError(
                f"the conversations in {path} cannot be read: {error}; move that file away, or set OV_AFM_DATA"
            ) from error
        if layout > LAYOUT:
            raise OVAFMError(f"{path} has layout {layout}, this ov_afm reads up to {LAYOUT}; upgrade it")

    def close(self) -> None:
        """Close the file."""
        self._connection.close()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            try:
                with self._connection:
                    yield self._connection
            except sqlite3.Error as error:
                raise OVAFMError(
                    f"{self._path} cannot be used: {error}; make room there, or name another folder with OV_AFM_DATA"
                ) from error

    def add(self, owner: str, conversation: Conversation) -> int:
        """Keep a new conversation; returns its number."""
        with self._writing() as connection:
            row = connection.execute(
                "INSERT INTO conversation (owner, title, system, changed) VALUES (?, ?, ?, ?)",
                (owner, conversation.title, conversation.system, time.time()),
            )
            assert row.lastrowid is not None
            self._write_turns(connection, row.lastrowid, conversation)
            return row.lastrowid

    def save(self, owner: str, number: int, conversation: Conversation) -> None:
        """Replace what is kept of a conversation; nothing where it was deleted meanwhile."""
        with self._writing() as connection:
            changed = connection.execute(
                "UPDATE conversation SET title = ?, system = ?, changed = ? WHERE id = ? AND owner = ?",
                (conversation.title, conversation.system, time.time(), number, owner),
            )
            if changed.rowcount:
                connection.execute("DELETE FROM turn WHERE conversation = ?", (number,))
                self._write_turns(connection, number, conversation)

    @staticmethod
    def _write_turns(connection: sqlite3.Connection, number: int, conversation: Conversation) -> None:
        rows = [
            (number, place, turn.role, turn.content, json.dumps(turn.figures) if turn.figures else None)
            for place, turn in enumerate(conversation.turns)
        ]
        connection.executemany("INSERT INTO turn VALUES (?, ?, ?, ?, ?)", rows)

    def delete(self, owner: str, number: int) -> None:
        """Forget a conversation."""
        with self._writing() as connection:
            connection.execute("DELETE FROM conversation WHERE id = ? AND owner = ?", (number, owner))

    def get(self, owner: str, number: int) -> Conversation | None:
        """A conversation; None if this owner has none of that number."""
        with self._writing() as connection:
            query = "SELECT title, system FROM conversation WHERE id = ? AND owner = ?"
            row = connection.execute(query, (number, owner)).fetchone()
            if row is None:
                return None
            query = "SELECT role, content, figures FROM turn WHERE conversation = ? ORDER BY place"
            rows = connection.execute(query, (number,))
            turns = [Turn(role, content, json.loads(figures or "null")) for role, content, figures in rows]
            return Conversation(row[0], row[1], turns)

    def entries(self, owner: str) -> list[Entry]:
        """The conversations of an owner, the last changed first."""
        first = "SELECT content FROM turn WHERE conversation = id AND place = 0"
        query = f"SELECT id, title, ({first}) FROM conversation WHERE owner = ? ORDER BY changed DESC, id DESC"
        with self._writing() as connection:
            rows = connection.execute(query, (owner,)).fetchall()
        return [Entry(number, title or title_of(first or "")) for number, title, first in rows]
