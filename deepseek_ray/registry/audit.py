"""Append-only table of promotions: who became champion, when, by which numbers.

SQLite in the run folder. Its write lock also makes alias moves one at a time, over all processes.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from deepseek_ray.errors import RegistryUnavailableError
from deepseek_ray.sqlite import read_uri

_SCHEMA = """
CREATE TABLE IF NOT EXISTS audit (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    at TEXT NOT NULL,
    name TEXT NOT NULL,
    action TEXT NOT NULL CHECK (action IN ('promote', 'refuse', 'rollback', 'delete')),
    version TEXT NOT NULL,
    champion_before TEXT,
    champion_after TEXT,
    decision TEXT NOT NULL,
    note TEXT NOT NULL
);
CREATE TRIGGER IF NOT EXISTS audit_keeps_rows BEFORE DELETE ON audit
BEGIN SELECT RAISE(ABORT, 'the audit table is append-only'); END;
CREATE TRIGGER IF NOT EXISTS audit_keeps_values BEFORE UPDATE ON audit
BEGIN SELECT RAISE(ABORT, 'the audit table is append-only'); END;
"""

_COLUMNS = "id, at, name, action, version, champion_before, champion_after, decision, note"


@dataclass(frozen=True, kw_only=True)
class AuditEntry:
    """One line of the history.

    Args:
        name: registered model.
        action: promote, refuse, rollback or delete.
        version: the version it was about.
        champion_before: champion when it began; None when there was none.
        champion_after: champion when it ended.
        decision: the gate's decision as JSON; "{}" for a rollback or a deletion.
        note: why, in words.
        id: position in the table, given by it.
        at: UTC time in ISO 8601, given by it.
    """

    name: str
    action: str
    version: str
    champion_before: str | None
    champion_after: str | None
    decision: str = "{}"
    note: str = ""
    id: int = 0
    at: str = ""


class Audit:
    """The table in one file.

    Args:
        path: SQLite file, made when absent.
        timeout_s: longest wait for another process's alias move.
    """

    def __init__(self, path: Path, timeout_s: float) -> None:
        self.path = path
        self.timeout_s = timeout_s

    @contextmanager
    def transaction(self) -> Iterator[AuditTransaction]:
        """Hold the lock of alias moves; rows are kept only when the body ends well.

        Raises:
            RegistryUnavailableError: the table is locked too long or cannot be written.
        """
        with self._connected(self.path.absolute().as_uri()) as connection:
            if not _is_made(connection):
                connection.executescript(_SCHEMA)
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield AuditTransaction(connection)
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise

    def entries(self, name: str) -> list[AuditEntry]:
        """All lines about a model, oldest first."""
        with self.reading() as connection:
            made = connection is not None and _is_made(connection)
            return AuditTransaction(connection).entries(name) if connection is not None and made else []

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection | None]:
        """The file, to read it; None when it is not made yet.

        Raises:
            RegistryUnavailableError: it cannot be read.
        """
        if not self.path.exists():
            yield None
            return
        with self._connected(read_uri(self.path)) as connection:
            yield connection

    @contextmanager
    def _connected(self, uri: str) -> Iterator[sqlite3.Connection]:
        try:
            with closing(sqlite3.connect(uri, uri=True, timeout=self.timeout_s, isolation_level=None)) as connection:
                yield connection
        except sqlite3.Error as error:
            raise RegistryUnavailableError(
                f"The audit table {str(self.path)!r} cannot be used: {error}.",
                fix="let the other promotion end, or make the run folder writable",
            ) from error


def _is_made(connection: sqlite3.Connection) -> bool:
    found = connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'audit_keeps_values'").fetchone()
    return found is not None


class AuditTransaction:
    """An open transaction on the table."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self.connection = connection

    def append(self, entry: AuditEntry) -> None:
        """Add one line; its id and time are given here."""
        at = datetime.now(UTC).isoformat(timespec="milliseconds")
        row = {**asdict(entry), "at": at}
        names = [name for name in _COLUMNS.split(", ") if name != "id"]
        statement = f"INSERT INTO audit ({', '.join(names)}) VALUES ({', '.join('?' * len(names))})"
        self.connection.execute(statement, [row[name] for name in names])

    def entries(self, name: str) -> list[AuditEntry]:
        """All lines about a model, oldest first."""
        rows = self.connection.execute(f"SELECT {_COLUMNS} FROM audit WHERE name = ? ORDER BY id", (name,))
        return [AuditEntry(**dict(zip(_COLUMNS.split(", "), row, strict=True))) for row in rows]
