"""The prediction log: what was decided, from which inputs, by which version; durable before the answer leaves.

SQLite in WAL mode with synchronous=FULL: a commit returns after the log file has reached the disk
(https://www.sqlite.org/pragma.html#pragma_synchronous; with NORMAL a power cut may take back
decisions that a client has already acted on). One commit carries a whole batch, so the price of
the disk is shared. One process writes predictions and feedback; any number may read.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from deepseek_ray.data.events import Decision, Reason, Transaction, to_us
from deepseek_ray.errors import DataError, EnvironmentProblemError
from deepseek_ray.sqlite import insert_rows, prepare_writer, read_uri

SCHEMA_VERSION = 1
BUSY_TIMEOUT_S = 10.0
_LOOKUP_CHUNK = 500
DROP_VECTORS = "DELETE FROM vectors WHERE seq IN (SELECT seq FROM vectors WHERE seq <= ? ORDER BY seq LIMIT ?)"

_SCHEMA = """
CREATE TABLE IF NOT EXISTS predictions (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    prediction_id TEXT NOT NULL UNIQUE,
    transaction_id TEXT NOT NULL UNIQUE,
    event_time TEXT NOT NULL, event_us INTEGER NOT NULL, order_us INTEGER NOT NULL,
    card_id TEXT NOT NULL, terminal_id TEXT NOT NULL, amount_cents INTEGER NOT NULL, device_id TEXT NOT NULL,
    channel TEXT NOT NULL, country TEXT NOT NULL, merchant_category TEXT NOT NULL,
    probability REAL NOT NULL, threshold REAL NOT NULL, decision TEXT NOT NULL,
    cold TEXT NOT NULL, reasons TEXT NOT NULL,
    model_name TEXT NOT NULL, model_version TEXT NOT NULL, run_id TEXT NOT NULL,
    feature_service TEXT NOT NULL, feature_digest TEXT NOT NULL,
    latency_ms REAL NOT NULL, logged_us INTEGER NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS vectors (
    seq INTEGER PRIMARY KEY,
    feature_values BLOB NOT NULL, sequence BLOB NOT NULL, sequence_len INTEGER NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS feedback (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    prediction_id TEXT NOT NULL UNIQUE REFERENCES predictions (prediction_id),
    is_fraud INTEGER NOT NULL,
    observed_us INTEGER NOT NULL, known_us INTEGER NOT NULL,
    after_seq INTEGER NOT NULL, logged_us INTEGER NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS thresholds (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    model_version TEXT NOT NULL, threshold REAL NOT NULL, logged_us INTEGER NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS meta (name TEXT PRIMARY KEY, value INTEGER NOT NULL) STRICT, WITHOUT ROWID;
"""
_INDEX = "CREATE INDEX IF NOT EXISTS predictions_by_order ON predictions (order_us)"
"""Older releases neither make it nor mind it, so the schema keeps its version."""


@dataclass(frozen=True)
class LoggedPrediction:
    """One decision with the inputs that it was made from.

    Attributes:
        values: float64[F], the served feature vector.
        sequence: float64[N, C], the card's recent events, newest first.
        order_us: position of the event in the time line of its card, terminal and device.
        latency_ms: from the arrival of the request to the writing of this row.
        seq: row number; 0 before it is written.
    """

    prediction_id: str
    transaction: Transaction
    order_us: int
    values: npt.NDArray[np.float64]
    sequence: npt.NDArray[np.float64]
    probability: float
    threshold: float
    decision: Decision
    cold: tuple[str, ...]
    reasons: tuple[Reason, ...]
    model_name: str
    model_version: str
    run_id: str
    feature_service: str
    feature_digest: str
    latency_ms: float
    logged_us: int
    seq: int = 0


@dataclass(frozen=True)
class LoggedFeedback:
    """The truth about one decision.

    Attributes:
        observed_us: when the label became known, as its sender says.
        known_us: when it became usable: not before any event that had been served by then.
        after_seq: row number of the last prediction made before it arrived.
    """

    prediction_id: str
    is_fraud: bool
    observed_us: int
    known_us: int
    after_seq: int
    logged_us: int
    seq: int = 0


@dataclass(frozen=True)
class LabelTarget:
    """What is needed to apply a label to the feature state, and the label already held."""

    prediction_id: str
    card_id: str
    terminal_id: str
    device_id: str
    event_us: int
    order_us: int
    is_fraud: bool | None


class PredictionLog:
    """The writer, and point look-ups. Not for use by several threads at once.

    Args:
        path: database file; made when missing.
        synchronous: FULL survives a power cut; NORMAL only a crash of the process.
        read_only: only look something up: nothing is written, and the folder may be read-only.

    Raises:
        EnvironmentProblemError: the file cannot be opened, is locked or is not such a log.
    """

    def __init__(self, path: Path, *, synchronous: Literal["FULL", "NORMAL"] = "FULL", read_only: bool = False) -> None:
        self.path = path
        self._db = _open_to_read(path) if read_only else _open(path, synchronous)

    def close(self) -> None:
        """Release the file."""
        self._db.close()

    def commit(
        self,
        predictions: Sequence[LoggedPrediction] = (),
        feedback: Sequence[LoggedFeedback] = (),
        *,
        applied_predictions: int | None = None,
        applied_feedback: int | None = None,
    ) -> tuple[int, int]:
        """Write a batch in one durable transaction: all of it or nothing.

        Args:
            predictions: rows with new prediction and transaction ids.
            feedback: rows with logged predictions and no earlier feedback.
            applied_predictions: highest ``seq`` whose event is in the feature store, see ``applied``.
            applied_feedback: the same for labels.

        Returns:
            The highest ``seq`` of predictions and of feedback written, 0 where none.

        Raises:
            EnvironmentProblemError: the disk is full or read-only, or another process holds the lock.
            DataError: an id is already in the log.
        """
        try:
            with self._db:
                last = self._insert_predictions(predictions)
                last_feedback = self._insert_feedback(feedback)
                self._set_meta("applied_predictions", applied_predictions)
                self._set_meta("applied_feedback", applied_feedback)
        except sqlite3.IntegrityError as error:
            raise DataError(f"The prediction log refused a row: {error}.", fix="send each id once") from error
        except sqlite3.Error as error:
            raise _unusable(self.path, error) from error
        return last, last_feedback

    def _insert_predictions(self, rows: Sequence[LoggedPrediction]) -> int:
        last = insert_rows(self._db, _INSERT_PREDICTION, [_prediction_values(row) for row in rows])
        first = last - len(rows) + 1  # in one transaction of the only writer AUTOINCREMENT counts on by one
        vectors = [(n, _blob(r.values), _blob(r.sequence), len(r.sequence)) for n, r in enumerate(rows, first)]
        insert_rows(self._db, "INSERT INTO vectors", vectors)
        return last

    def _insert_feedback(self, rows: Sequence[LoggedFeedback]) -> int:
        values = [(r.prediction_id, int(r.is_fraud), r.observed_us, r.known_us, r.after_seq, r.logged_us) for r in rows]
        return insert_rows(self._db, f"INSERT INTO feedback ({_FEEDBACK_NAMES})", values)

    def _set_meta(self, name: str, value: int | None) -> None:
        if value is not None:
            self._db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (name, value))

    def _meta(self, name: str) -> int:
        row = self._db.execute("SELECT value FROM meta WHERE name = ?", (name,)).fetchone()
        return int(row[0]) if row else 0

    def drop_vectors(self, last: int, limit: int) -> int:
        """Forget the vectors of at most ``limit`` rows up to row number ``last``, which the archive holds.

        Returns:
            How many were dropped, 0 when none is left. The rest of each row stays, to recognise a repeated transaction.
        """
        try:
            with self._db:
                return self._db.execute(DROP_VECTORS, (last, limit)).rowcount
        except sqlite3.Error as error:
            raise _unusable(self.path, error) from error

    @property
    def applied(self) -> tuple[int, int]:
        """Highest ``seq`` of predictions and of feedback that the feature store is known to hold."""
        return self._meta("applied_predictions"), self._meta("applied_feedback")

    def horizon(self) -> tuple[int, int]:
        """Latest ``order_us`` ever served and the last row number, zeros in an empty log."""
        # one MAX a query: SQLite takes two of them from a scan of all rows
        query = "SELECT (SELECT MAX(order_us) FROM predictions), (SELECT MAX(seq) FROM predictions)"
        row = self._db.execute(query).fetchone()
        return int(row[0] or 0), int(row[1] or 0)

    def last_rows(self) -> tuple[int, int]:
        """Row numbers of the last decision and the last label, zeros where there is none."""
        query = "SELECT (SELECT COALESCE(MAX(seq), 0) FROM predictions), (SELECT COALESCE(MAX(seq), 0) FROM feedback)"
        decisions, labels = self._db.execute(query).fetchone()
        return int(decisions), int(labels)

    def by_transaction(self, transaction_ids: Sequence[str]) -> dict[str, LoggedPrediction]:
        """Decisions already made for these transactions, without their vectors."""
        found = self._select("transaction_id", transaction_ids)
        return {row.transaction.transaction_id: row for row in found}

    def get(self, prediction_id: str) -> LoggedPrediction | None:
        """One decision; its vectors are empty when they have been moved to the archive."""
        rows = list(self._select("prediction_id", [prediction_id]))
        return self._with_vectors(rows[0]) if rows else None

    def _select(self, column: str, keys: Sequence[str]) -> Iterable[LoggedPrediction]:
        for start in range(0, len(keys), _LOOKUP_CHUNK):
            chunk = keys[start : start + _LOOKUP_CHUNK]
            marks = ", ".join("?" * len(chunk))
            query = f"SELECT {_NAMES}, seq FROM predictions WHERE {column} IN ({marks})"
            yield from (_from_row(row) for row in self._db.execute(query, chunk))

    def _with_vectors(self, row: LoggedPrediction) -> LoggedPrediction:
        query = "SELECT feature_values, sequence, sequence_len FROM vectors WHERE seq = ?"
        found = self._db.execute(query, (row.seq,)).fetchone()
        if found is None:
            return row
        return LoggedPrediction(**{**row.__dict__, "values": unpack(found[0]), "sequence": unpack(found[1], found[2])})

    def label_targets(self, prediction_ids: Sequence[str]) -> dict[str, LabelTarget]:
        """Where the labels of these predictions go; unknown ids are missing from the answer."""
        targets: dict[str, LabelTarget] = {}
        for start in range(0, len(prediction_ids), _LOOKUP_CHUNK):
            chunk = prediction_ids[start : start + _LOOKUP_CHUNK]
            query = (
                "SELECT p.prediction_id, card_id, terminal_id, device_id, event_us, order_us, is_fraud "
                "FROM predictions p LEFT JOIN feedback f USING (prediction_id) "
                f"WHERE p.prediction_id IN ({', '.join('?' * len(chunk))})"
            )
            for *ids, event_us, order_us, label in self._db.execute(query, chunk):
                known = None if label is None else bool(label)
                targets[ids[0]] = LabelTarget(ids[0], ids[1], ids[2], ids[3], event_us, order_us, known)
        return targets

    def last_service(self) -> str:
        """Feature service of the newest decision, "" in an empty log."""
        row = self._db.execute("SELECT feature_service FROM predictions ORDER BY seq DESC LIMIT 1").fetchone()
        return str(row[0]) if row else ""

    def events_after(self, seq: int, limit: int = -1) -> list[tuple[int, Transaction, int]]:
        """``(seq, transaction, order_us)`` of the decisions after a row number, oldest first; all, or ``limit``."""
        query = f"SELECT {_NAMES}, seq FROM predictions WHERE seq > ? ORDER BY seq LIMIT ?"
        rows = map(_from_row, self._db.execute(query, (seq, limit)))
        return [(row.seq, row.transaction, row.order_us) for row in rows]

    def labels_after(self, seq: int, limit: int = -1) -> list[tuple[int, LabelTarget, LoggedFeedback]]:
        """``(seq, target, feedback)`` of the labels after a row number, oldest first; all, or ``limit``."""
        query = f"SELECT {_FEEDBACK_NAMES}, seq FROM feedback WHERE seq > ? ORDER BY seq LIMIT ?"
        rows = [LoggedFeedback(r[0], bool(r[1]), *r[2:]) for r in self._db.execute(query, (seq, limit))]
        targets = self.label_targets([row.prediction_id for row in rows])
        return [(row.seq, targets[row.prediction_id], row) for row in rows]

    def labels_of(self, feature_digest: str, after_us: int, before_us: int) -> dict[str, bool]:
        """``is_fraud`` by id of the labelled decisions of a vector, with ``after_us < order_us < before_us``."""
        query = (
            "SELECT prediction_id, is_fraud FROM feedback JOIN predictions p USING (prediction_id) "
            "WHERE feature_digest = ? AND p.order_us > ? AND p.order_us < ?"
        )
        rows = self._db.execute(query, (feature_digest, after_us, before_us))
        return {name: bool(is_fraud) for name, is_fraud in rows}

    def times_of(self, feature_digest: str, after_us: int, before_us: int) -> dict[str, int]:
        """``order_us`` by id of the decisions served from a vector, with ``after_us < order_us < before_us``."""
        query = (
            "SELECT prediction_id, order_us FROM predictions WHERE feature_digest = ? AND order_us > ? AND order_us < ?"
        )
        return dict(self._db.execute(query, (feature_digest, after_us, before_us)))

    def set_threshold(self, model_version: str, threshold: float, logged_us: int) -> None:
        """Record a version's decision threshold; the history stays."""
        try:
            with self._db:
                self._db.execute(
                    "INSERT INTO thresholds (model_version, threshold, logged_us) VALUES (?, ?, ?)",
                    (model_version, threshold, logged_us),
                )
        except sqlite3.Error as error:
            raise _unusable(self.path, error) from error

    def threshold(self, model_version: str) -> float | None:
        """The threshold last set for a version, or None. Safe to call from any thread."""
        query = "SELECT threshold FROM thresholds WHERE model_version = ? ORDER BY seq DESC LIMIT 1"
        with closing(sqlite3.connect(self.path, timeout=BUSY_TIMEOUT_S)) as reader:
            row = reader.execute(query, (model_version,)).fetchone()
        return None if row is None else float(row[0])


def unpack(blob: bytes, rows: int | None = None) -> npt.NDArray[np.float64]:
    """A logged vector: float64[F], or float64[rows, C] when ``rows`` is given."""
    flat = np.frombuffer(blob, dtype="<f8")
    if rows is None:
        return flat
    return flat.reshape(rows, -1) if rows else flat.reshape(0, 0)


def _blob(array: npt.NDArray[np.float64]) -> bytes:
    return np.ascontiguousarray(array, dtype="<f8").tobytes()


_FEEDBACK_NAMES = "prediction_id, is_fraud, observed_us, known_us, after_seq, logged_us"
_NAMES = (
    "prediction_id, transaction_id, event_time, event_us, order_us, card_id, terminal_id, amount_cents, device_id, "
    "channel, country, merchant_category, probability, threshold, decision, cold, reasons, model_name, model_version, "
    "run_id, feature_service, feature_digest, latency_ms, logged_us"
)
_INSERT_PREDICTION = f"INSERT INTO predictions ({_NAMES})"


def _prediction_values(row: LoggedPrediction) -> tuple[object, ...]:
    event = row.transaction
    reasons = json.dumps([[r.feature, r.value, r.contribution] for r in row.reasons]) if row.reasons else "[]"
    cold = json.dumps(row.cold) if row.cold else "[]"
    return (
        *(row.prediction_id, event.transaction_id, event.event_time.isoformat(), to_us(event.event_time), row.order_us),
        *(event.card_id, event.terminal_id, event.amount_cents, event.device_id, event.channel, event.country),
        *(event.merchant_category, row.probability, row.threshold, row.decision, cold, reasons),
        *(row.model_name, row.model_version, row.run_id, row.feature_service, row.feature_digest),
        *(row.latency_ms, row.logged_us),
    )


def _from_row(row: Sequence[object]) -> LoggedPrediction:
    field = dict(zip([*_NAMES.split(", "), "seq"], row, strict=True))
    event = Transaction.model_validate({name: field[name] for name in Transaction.model_fields})
    reasons = tuple(Reason(feature=f, value=v, contribution=c) for f, v, c in json.loads(str(field["reasons"])))
    rest = {name: value for name, value in field.items() if name in LoggedPrediction.__dataclass_fields__}
    return LoggedPrediction(
        **{
            **rest,
            "transaction": event,
            "reasons": reasons,
            "cold": tuple(json.loads(str(field["cold"]))),
            "values": np.empty(0),
            "sequence": np.empty((0, 0)),
        }  # type: ignore[arg-type]
    )


def _open(path: Path, synchronous: str) -> sqlite3.Connection:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        db = sqlite3.connect(path, timeout=BUSY_TIMEOUT_S, check_same_thread=False)
        db.execute("PRAGMA journal_mode=WAL")
        db.execute(f"PRAGMA synchronous={synchronous}")
        prepare_writer(db)
        _check_schema(db, path)
        with db:
            db.execute(_INDEX)  # a log of an older release gets it here, once
    except (OSError, sqlite3.Error) as error:
        raise _unusable(path, error) from error
    return db


def _open_to_read(path: Path) -> sqlite3.Connection:
    try:
        db = sqlite3.connect(read_uri(path), uri=True, timeout=BUSY_TIMEOUT_S)
        _check_schema(db, path)
    except sqlite3.Error as error:
        raise _unusable(path, error) from error
    return db


def _check_schema(db: sqlite3.Connection, path: Path) -> None:
    version = db.execute("PRAGMA user_version").fetchone()[0]
    if version not in (0, SCHEMA_VERSION):
        db.close()
        raise EnvironmentProblemError(
            f"The prediction log {str(path)!r} has schema version {version}; this program knows {SCHEMA_VERSION}.",
            fix="use the release that wrote it, or another run folder",
        )
    if version == 0:
        with db:
            db.executescript(f"BEGIN IMMEDIATE; {_SCHEMA} PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;")


def _unusable(path: Path, error: Exception) -> EnvironmentProblemError:
    return EnvironmentProblemError(
        f"The prediction log {str(path)!r} cannot be used: {error}.",
        fix="stop the other writer, free space, or make the folder writable",
    )
