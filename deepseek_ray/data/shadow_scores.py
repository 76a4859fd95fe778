"""What a shadow scored beside the version that answered: a bounded table of its own, never the prediction log."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from deepseek_ray.errors import EnvironmentProblemError
from deepseek_ray.sqlite import read_uri

_SCHEMA = """
CREATE TABLE IF NOT EXISTS scores (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    prediction_id TEXT NOT NULL, version TEXT NOT NULL, probability REAL NOT NULL, review INTEGER NOT NULL,
    served_version TEXT NOT NULL, served_probability REAL NOT NULL, served_review INTEGER NOT NULL,
    UNIQUE (version, prediction_id)) STRICT
"""
_PAIRS = (
    "SELECT s.probability, s.served_probability, s.review != s.served_review, f.is_fraud FROM scores s "
    "LEFT JOIN log.feedback f USING (prediction_id) WHERE s.version = ? ORDER BY s.seq"
)
_BESIDE = (
    "SELECT s.probability, s.served_probability, p.card_id FROM scores s JOIN log.predictions p USING (prediction_id) "
    "WHERE s.version = ? AND s.served_version = ? ORDER BY s.seq DESC LIMIT ?"
)
_SCORED = "SELECT COUNT(*) FROM scores WHERE version = ? AND served_version = ?"
_APART = (
    "SELECT p.card_id, f.is_fraud, s.review != f.is_fraud FROM scores s JOIN log.feedback f USING (prediction_id) "
    "JOIN log.predictions p USING (prediction_id) "
    "WHERE s.version = ? AND s.served_version = ? AND s.review != s.served_review ORDER BY f.seq"
)


class ShadowScore(NamedTuple):
    """One decision, scored twice."""

    prediction_id: str
    version: str
    probability: float
    review: bool
    served_version: str
    served_probability: float
    served_review: bool


class Pairs(NamedTuple):
    """Scores of the same decisions, arrays of n.

    Attributes:
        shadow: float64, the shadow's probabilities.
        served: float64, those that were answered.
        differs: bool, where the two decisions differ.
        label: int8, 1 fraud, 0 genuine, -1 unknown.
    """

    shadow: npt.NDArray[np.float64]
    served: npt.NDArray[np.float64]
    differs: npt.NDArray[np.bool_]
    label: npt.NDArray[np.int8]


class Mistake(NamedTuple):
    """A decision on which shadow and champion differ, and one of them was wrong."""

    card_id: str
    is_fraud: bool
    shadow_wrong: bool


class Beside(NamedTuple):
    """A shadow beside one champion.

    Attributes:
        scored: decisions that both scored.
        pairs: (shadow's probability, champion's, card) of the newest of them.
        mistakes: in the order in which the truth came.
    """

    scored: int
    pairs: list[tuple[float, float, str]]
    mistakes: list[Mistake]


class ShadowScores:
    """The writer; for one thread.

    Args:
        path: SQLite file, made when missing.
        keep: newest rows that stay.

    Raises:
        EnvironmentProblemError: the file cannot be used.
    """

    def __init__(self, path: Path, keep: int) -> None:
        self._path, self._keep = path, keep
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(path, timeout=5.0, check_same_thread=False)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=OFF")  # a lost comparison costs nothing
            self._db.execute(_SCHEMA)
        except (OSError, sqlite3.Error) as error:
            raise _unusable(path, error) from error

    def add(self, rows: Sequence[ShadowScore]) -> None:
        """Write rows, and forget the oldest beyond ``keep``; raises like the constructor."""
        names, marks = ", ".join(ShadowScore._fields), ", ".join("?" * len(ShadowScore._fields))
        try:
            with self._db:
                self._db.executemany(f"INSERT OR IGNORE INTO scores ({names}) VALUES ({marks})", rows)
                self._db.execute("DELETE FROM scores WHERE seq <= (SELECT MAX(seq) FROM scores) - ?", (self._keep,))
        except sqlite3.Error as error:
            raise _unusable(self._path, error) from error

    def close(self) -> None:
        """Release the file."""
        self._db.close()


def read_pairs(path: Path, log_path: Path, version: str) -> Pairs:
    """A shadow version's scores beside the served ones, with the labels known by now.

    Raises:
        EnvironmentProblemError: a file cannot be read.
    """
    with _reading(path, log_path) as reader:
        rows = reader.execute(_PAIRS, (version,)).fetchall()
    columns = list(zip(*rows, strict=True)) or [(), (), (), ()]
    label = [-1 if value is None else int(value) for value in columns[3]]
    return Pairs(
        np.array(columns[0], np.float64),
        np.array(columns[1], np.float64),
        np.array(columns[2], np.bool_),
        np.array(label, np.int8),
    )


def read_beside(path: Path, log_path: Path, version: str, champion: str, newest: int) -> Beside:
    """What there is to judge a shadow by beside one champion; raises like :func:`read_pairs`.

    Args:
        path: the shadow's scores.
        log_path: the prediction log.
        version: the shadow.
        champion: version that answered.
        newest: most pairs of scores.
    """
    key = (version, champion)
    with _reading(path, log_path) as reader:
        scored = reader.execute(_SCORED, key).fetchone()[0]
        pairs = reader.execute(_BESIDE, (*key, newest)).fetchall()
        apart = reader.execute(_APART, key).fetchall()
    return Beside(scored, pairs, [Mistake(card, bool(fraud), bool(wrong)) for card, fraud, wrong in apart])


@contextmanager
def _reading(path: Path, log_path: Path) -> Iterator[sqlite3.Connection]:
    try:
        with closing(sqlite3.connect(read_uri(path), uri=True)) as reader:
            reader.execute("ATTACH ? AS log", (read_uri(log_path),))
            yield reader
    except sqlite3.Error as error:
        raise _unusable(path, error) from error


def _unusable(path: Path, error: Exception) -> EnvironmentProblemError:
    return EnvironmentProblemError(
        f"The shadow's scores {str(path)!r} cannot be used: {error}.", fix="free space or make the folder writable"
    )
