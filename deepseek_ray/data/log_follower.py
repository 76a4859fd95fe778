"""Follows the prediction log from outside its writer: what was decided and labelled since a moment, each row once."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

from deepseek_ray.data.prediction_log import BUSY_TIMEOUT_S
from deepseek_ray.errors import EnvironmentProblemError
from deepseek_ray.sqlite import read_uri

CHUNK = 1_000
"""Rows read at once: few, for the readers that share their process with the service."""
MOST = 300_000
"""Rows looked back at when following begins; older ones are left out."""
_DECISIONS = (
    "SELECT seq, prediction_id, card_id, model_version, probability, decision, logged_us FROM predictions "
    "WHERE seq > ? ORDER BY seq LIMIT ?"
)
_LABELS = (
    "SELECT f.seq, p.prediction_id, p.card_id, p.model_version, p.probability, p.decision, p.logged_us, f.is_fraud "
    "FROM feedback f JOIN predictions p USING (prediction_id) "
    "WHERE f.seq > ? AND p.seq > ? ORDER BY f.seq LIMIT ?"
)


class Decided(NamedTuple):
    """A decision, without its inputs."""

    prediction_id: str
    card_id: str
    version: str
    probability: float
    review: bool
    logged_us: int


class Labelled(NamedTuple):
    """A decision with the truth about it."""

    decided: Decided
    is_fraud: bool


class LogFollower:
    """Reads on from where it stopped. For one thread.

    Args:
        path: the log.
        since_us: decisions logged before are left out, and labels of those decisions too.
    """

    def __init__(self, path: Path, since_us: int) -> None:
        self._path = path
        self._since_us = since_us
        self._first: int | None = None
        self._decided = self._labelled = 0

    def decisions(self) -> Iterator[list[Decided]]:
        """New decisions in chunks, oldest first.

        Raises:
            EnvironmentProblemError: the log cannot be read.
        """
        self._place()
        while rows := self._read(_DECISIONS, self._decided, CHUNK):
            self._decided = rows[-1][0]
            yield [_decided(row) for row in rows]

    def labels(self) -> Iterator[list[Labelled]]:
        """New labels in chunks, in the order in which they came; raises like :meth:`decisions`."""
        first = self._place()
        while rows := self._read(_LABELS, self._labelled, first, CHUNK):
            self._labelled = rows[-1][0]
            yield [Labelled(_decided(row), bool(row[7])) for row in rows]

    def _place(self) -> int:
        """Row number before the first decision that counts; found once."""
        if self._first is None:
            self._first = self._decided = self._last_before("predictions")
            self._labelled = self._last_before("feedback")
        return self._first

    def _last_before(self, table: str) -> int:
        # row numbers and logging times rise together, and only row numbers have an index
        high = int(self._read(f"SELECT COALESCE(MAX(seq), 0) FROM {table}")[0][0])
        low = max(0, high - MOST)
        query = f"SELECT logged_us FROM {table} WHERE seq <= ? ORDER BY seq DESC LIMIT 1"
        while low < high:
            middle = (low + high + 1) // 2
            row = self._read(query, middle)
            if not row or row[0][0] < self._since_us:
                low = middle
            else:
                high = middle - 1
        return low

    def _read(self, query: str, *values: int) -> list[tuple[Any, ...]]:
        try:
            with closing(sqlite3.connect(read_uri(self._path), uri=True, timeout=BUSY_TIMEOUT_S)) as reader:
                return reader.execute(query, values).fetchall()
        except sqlite3.Error as error:
            raise EnvironmentProblemError(
                f"The prediction log {str(self._path)!r} cannot be followed: {error}.", fix="see that the file is there"
            ) from error


def _decided(row: tuple[Any, ...]) -> Decided:
    return Decided(row[1], row[2], row[3], row[4], row[5] == "review", row[6])
