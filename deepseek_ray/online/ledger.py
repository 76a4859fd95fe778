"""Which label trained which version: every label counts once in the model that serves, whatever is killed in between.

A line is written before its version is promoted. What a version has been trained on is what stands on the way from it
back to the version that was trained from scratch; so a version that never became champion counts nothing, one that is
rolled back counts no more, and no crash needs repair: the alias in the registry is the only switch.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from deepseek_ray.errors import EnvironmentProblemError

LEDGER = "ledger.db"
_SCHEMA = """
CREATE TABLE IF NOT EXISTS updates (
    version TEXT PRIMARY KEY, base TEXT NOT NULL, run_id TEXT NOT NULL,
    root_until_us INTEGER NOT NULL, made_us INTEGER NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS labels (
    version TEXT NOT NULL REFERENCES updates (version), prediction_id TEXT NOT NULL,
    is_fraud INTEGER NOT NULL, told INTEGER NOT NULL, PRIMARY KEY (version, prediction_id)) STRICT, WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS set_aside (
    prediction_id TEXT PRIMARY KEY, reason TEXT NOT NULL, at_us INTEGER NOT NULL) STRICT, WITHOUT ROWID;
"""
_PATH = """
WITH RECURSIVE path (version, base, root_until_us, depth) AS (
    SELECT version, base, root_until_us, 0 FROM updates WHERE version = ?
    UNION ALL
    SELECT u.version, u.base, u.root_until_us, depth + 1 FROM updates u JOIN path ON u.version = path.base)
SELECT version, base, root_until_us FROM path ORDER BY depth DESC
"""


@dataclass(frozen=True)
class Counted:
    """How a decision was counted.

    Args:
        is_fraud: the label that was trained on.
        told: the label was sent; else the decision counted as genuine because none came within the delay.
    """

    is_fraud: bool
    told: bool


@dataclass(frozen=True)
class Descent:
    """How a version came to be.

    Args:
        root: the version that was trained from scratch.
        root_until_us: event time of its last training row; None where no update is known, so that the root is asked.
        steps: versions of the updates since, oldest first.
    """

    root: str
    root_until_us: int | None
    steps: tuple[str, ...]


class Ledger:
    """The table in a run's folder of updates. Any number may read; whoever writes holds the folder's lock.

    Args:
        folder: made when missing.

    Raises:
        EnvironmentProblemError: the file cannot be used.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / LEDGER
        folder.mkdir(parents=True, exist_ok=True)
        with self._connected() as db:
            db.executescript(f"PRAGMA journal_mode = WAL; {_SCHEMA}")

    def write(self, version: str, base: str, labels: Mapping[str, Counted], *, run_id: str, root_until_us: int) -> None:
        """Durably note what a version that is not promoted yet was trained on.

        Args:
            version: the challenger.
            base: the champion that it was trained from.
            labels: by prediction id.
            run_id: the MLflow run that made it.
            root_until_us: see :class:`Descent`.
        """
        rows = [(version, name, int(one.is_fraud), int(one.told)) for name, one in labels.items()]
        with self._connected() as db, db:
            made = (version, base, run_id, root_until_us, time.time_ns() // 1_000)
            db.execute("INSERT INTO updates VALUES (?, ?, ?, ?, ?)", made)
            db.executemany("INSERT INTO labels VALUES (?, ?, ?, ?)", rows)

    def descent(self, version: str) -> Descent:
        """The way from the version that was trained from scratch to this one."""
        with self._connected() as db:
            steps = db.execute(_PATH, (version,)).fetchall()
        if not steps:
            return Descent(version, None, ())
        return Descent(steps[0][1], steps[0][2], tuple(step[0] for step in steps))

    def labels_of(self, version: str) -> dict[str, Counted]:
        """What one update trained on, by prediction id."""
        query = "SELECT prediction_id, is_fraud, told FROM labels WHERE version = ?"
        with self._connected() as db:
            return {name: Counted(bool(fraud), bool(told)) for name, fraud, told in db.execute(query, (version,))}

    def counted(self, version: str) -> dict[str, Counted]:
        """All that a version was trained on since the one from scratch; a later update's word stands."""
        known: dict[str, Counted] = {}
        for step in self.descent(version).steps:
            known |= self.labels_of(step)
        return known

    def set_aside(self, prediction_ids: Iterable[str], reason: str) -> int:
        """Let no update train on these decisions, whose labels may be wrong; returns how many are new here."""
        rows = [(name, reason, time.time_ns() // 1_000) for name in prediction_ids]
        with self._connected() as db, db:
            before = db.execute("SELECT COUNT(*) FROM set_aside").fetchone()[0]
            db.executemany("INSERT OR IGNORE INTO set_aside VALUES (?, ?, ?)", rows)
            return int(db.execute("SELECT COUNT(*) FROM set_aside").fetchone()[0]) - int(before)

    def ids_set_aside(self) -> set[str]:
        """Decisions that no update trains on."""
        with self._connected() as db:
            return {row[0] for row in db.execute("SELECT prediction_id FROM set_aside")}

    @contextmanager
    def _connected(self) -> Iterator[sqlite3.Connection]:
        try:
            with closing(sqlite3.connect(self.path, timeout=10.0)) as db:
                db.execute("PRAGMA synchronous = FULL")
                yield db
        except sqlite3.Error as error:
            raise EnvironmentProblemError(
                f"The ledger of updates {str(self.path)!r} cannot be used: {error}.",
                fix="free space, or make the run folder writable",
            ) from error
