"""SQLite files: opened by those who only read without a trace, and written without pauses, many rows at once."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Sequence
from contextlib import ExitStack, closing, suppress
from functools import lru_cache
from itertools import chain
from pathlib import Path

from deepseek_ray.periodic import Periodic

WAL_PAGES = 25_000
"""A writer beside a :class:`Checkpointer` lets its log grow to so many pages (100 MiB) before it helps."""

CACHE_KIB = 32 << 10
"""Of pages that a writer keeps: with SQLite's 2 MiB it read six pages a decision again."""


def read_uri(file: Path) -> str:
    """The ``file:`` URI that opens a database to read, for ``sqlite3.connect(..., uri=True)``.

    A write-ahead log needs an index file beside it, which a read-only folder does not let anyone make. With an empty
    log all is in the database itself, and it can be read as one that nobody changes
    (https://www.sqlite.org/wal.html#read_only_databases).
    """
    log = file.with_name(f"{file.name}-wal")
    alone = not os.access(file.parent, os.W_OK) and not (log.exists() and log.stat().st_size)
    return f"{file.absolute().as_uri()}?{'immutable=1' if alone else 'mode=ro'}"


def prepare_writer(db: sqlite3.Connection) -> None:
    """Set a connection up to write much, beside a :class:`Checkpointer`."""
    db.execute(f"PRAGMA wal_autocheckpoint={WAL_PAGES}")
    db.execute(f"PRAGMA cache_size=-{CACHE_KIB}")


_MOST_ROWS = 64
"""In one statement; times the columns below SQLite's 32,766 variables."""


def insert_rows(db: sqlite3.Connection, head: str, rows: Sequence[Sequence[object]], tail: str = "") -> int:
    """Insert rows by a few statements, of 64 rows, 32 and so on, within the caller's transaction.

    ``executemany`` runs a statement a row, and each lets Python's interpreter lock go: beside a busy event loop every
    row then waits to have it back.

    Args:
        head: up to the word VALUES, which it leaves out.
        rows: of equal lengths.
        tail: what follows the values.

    Returns:
        The row number of the last row, 0 without rows. Those of a table without deletions are consecutive.
    """
    first, last = 0, 0
    while first < len(rows):
        count = min(_MOST_ROWS, 1 << (len(rows) - first).bit_length() - 1)
        some = rows[first : first + count]
        cursor = db.execute(_insert(head, tail, len(some[0]), count), tuple(chain.from_iterable(some)))
        first, last = first + count, cursor.lastrowid or 0
    return last


@lru_cache(maxsize=128)
def _insert(head: str, tail: str, num_columns: int, num_rows: int) -> str:
    marks = f"({', '.join('?' * num_columns)})"
    return f"{head} VALUES {', '.join([marks] * num_rows)} {tail}"


class Checkpointer(Periodic):
    """Moves write-ahead logs into their databases on a thread of its own, so that no writer stops to do it.

    By itself SQLite has the writer do that, with two fsyncs, whenever its log has grown by 4 MiB
    (https://www.sqlite.org/wal.html#ckpt). A passive checkpoint makes nobody wait. It cannot catch up with a writer
    that never rests: that one still does the little that is left when the log has ``WAL_PAGES``.

    Args:
        files: databases; one that is not there yet, or cannot be opened, is tried again.
        every_s: how often.
    """

    def __init__(self, files: Sequence[Path], every_s: float = 0.5) -> None:
        super().__init__("moving write-ahead logs", every_s, self._move)
        self._files = tuple(files)
        self._opened = ExitStack()
        self._connections: dict[Path, sqlite3.Connection] = {}

    def _move(self) -> None:
        for file in self._files:
            # locked, full or missing: who writes hears of it, and the log only grows meanwhile
            with suppress(sqlite3.Error):
                if file not in self._connections and file.exists():
                    connection = closing(sqlite3.connect(file, timeout=0))
                    self._connections[file] = self._opened.enter_context(connection)
                if file in self._connections:
                    self._connections[file].execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()

    def _run(self) -> None:
        with self._opened:  # closed by the thread that opened them
            super()._run()
