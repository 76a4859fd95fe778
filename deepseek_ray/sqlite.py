"""SQLite files: opened by those who only read without a trace, and written without pauses."""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Sequence
from contextlib import ExitStack, closing, suppress
from pathlib import Path

WAL_PAGES = 25_000
"""A writer beside a :class:`Checkpointer` lets its log grow to so many pages (100 MiB) before it helps."""


def read_uri(file: Path) -> str:
    """The ``file:`` URI that opens a database to read, for ``sqlite3.connect(..., uri=True)``.

    A write-ahead log needs an index file beside it, which a read-only folder does not let anyone make. With an empty
    log all is in the database itself, and it can be read as one that nobody changes
    (https://www.sqlite.org/wal.html#read_only_databases).
    """
    log = file.with_name(f"{file.name}-wal")
    alone = not os.access(file.parent, os.W_OK) and not (log.exists() and log.stat().st_size)
    return f"{file.absolute().as_uri()}?{'immutable=1' if alone else 'mode=ro'}"


class Checkpointer:
    """Moves write-ahead logs into their databases on a thread of its own, so that no writer stops to do it.

    By itself SQLite has the writer do that, with two fsyncs, whenever its log has grown by 4 MiB
    (https://www.sqlite.org/wal.html#ckpt). A passive checkpoint makes nobody wait. It cannot catch up with a writer
    that never rests: that one still does the little that is left when the log has ``WAL_PAGES``.

    Args:
        files: databases; one that is not there yet, or cannot be opened, is tried again.
        every_s: how often.
    """

    def __init__(self, files: Sequence[Path], every_s: float = 0.5) -> None:
        self._files, self._every_s = tuple(files), every_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="checkpointer", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def close(self, timeout_s: float = 10.0) -> None:
        """Stop."""
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join(timeout_s)

    def _run(self) -> None:
        with ExitStack() as opened:
            connections: dict[Path, sqlite3.Connection] = {}
            while not self._stop.wait(self._every_s):
                for file in self._files:
                    # locked, full or missing: who writes hears of it, and the log only grows meanwhile
                    with suppress(sqlite3.Error):
                        if file not in connections and file.exists():
                            connections[file] = opened.enter_context(closing(sqlite3.connect(file, timeout=0)))
                        if file in connections:
                            connections[file].execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()
