"""How a SQLite file is opened by those who only read it: nothing is written, not even beside it."""

from __future__ import annotations

import os
from pathlib import Path


def read_uri(file: Path) -> str:
    """The ``file:`` URI that opens a database to read, for ``sqlite3.connect(..., uri=True)``.

    A write-ahead log needs an index file beside it, which a read-only folder does not let anyone make. With an empty
    log all is in the database itself, and it can be read as one that nobody changes
    (https://www.sqlite.org/wal.html#read_only_databases).
    """
    log = file.with_name(f"{file.name}-wal")
    alone = not os.access(file.parent, os.W_OK) and not (log.exists() and log.stat().st_size)
    return f"{file.absolute().as_uri()}?{'immutable=1' if alone else 'mode=ro'}"
