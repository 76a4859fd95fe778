"""Compaction: closed stretches of the prediction log become parquet parts, each row exactly once.

A part is a stretch of row numbers, written under a name that tells the stretch, flushed to disk and
only then named in the manifest, which is replaced in one step. Readers believe the manifest alone:
a part without an entry is the remains of a crash and is written anew. Rows after the manifest's
last number are still in the log. Hence a row is in one place for a reader at any moment.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import polars as pl

from deepseek_ray.data.prediction_log import BUSY_TIMEOUT_S, DROP_VECTORS, unpack
from deepseek_ray.errors import DataError, EnvironmentProblemError
from deepseek_ray.paths import RunPaths, exclusive, replace_text, sync
from deepseek_ray.sqlite import read_uri

MANIFEST = "manifest.json"
PART_ROWS = 50_000
_PRUNE_ROWS, _PRUNE_PAUSE_S = 200, 0.01

Kind = Literal["predictions", "feedback"]

_QUERIES: dict[Kind, str] = {
    "predictions": (
        "SELECT p.*, v.feature_values, v.sequence, v.sequence_len FROM predictions p LEFT JOIN vectors v USING (seq) "
        "WHERE seq > ? AND seq <= ? ORDER BY seq"
    ),
    "feedback": "SELECT * FROM feedback WHERE seq > ? AND seq <= ? ORDER BY seq",
}
_COLUMNS: dict[Kind, tuple[str, ...]] = {
    "predictions": (
        "seq", "prediction_id", "transaction_id", "event_time", "event_us", "order_us", "card_id",
        "terminal_id", "amount_cents", "device_id", "channel", "country", "merchant_category",
        "probability", "threshold", "decision", "cold", "reasons", "model_name", "model_version", "run_id",
        "feature_service", "feature_digest", "latency_ms", "logged_us", "feature_values", "sequence",
        "sequence_len",
    ),
    "feedback": ("seq", "prediction_id", "is_fraud", "observed_us", "known_us", "after_seq", "logged_us"),
}  # fmt: skip
_INTEGERS = (
    "seq", "event_us", "order_us", "amount_cents", "logged_us", "sequence_len", "observed_us", "known_us",
    "is_fraud", "after_seq",
)  # fmt: skip
_OTHERS = {name: pl.Float64() for name in ("probability", "threshold", "latency_ms")} | {
    name: pl.Binary() for name in ("feature_values", "sequence")
}
_TYPES: dict[str, pl.DataType] = {
    name: pl.Int64() if name in _INTEGERS else _OTHERS.get(name, pl.String())
    for names in _COLUMNS.values()
    for name in names
}


@dataclass(frozen=True)
class Part:
    """One parquet file: rows ``first`` to ``last`` (row numbers, gaps allowed), ``rows`` of them."""

    file: str
    first: int
    last: int
    rows: int


@dataclass
class Manifest:
    """The parts that count, in order."""

    predictions: list[Part] = field(default_factory=list)
    feedback: list[Part] = field(default_factory=list)

    def parts(self, kind: Kind) -> list[Part]:
        """Parts of one kind."""
        return self.predictions if kind == "predictions" else self.feedback

    def last(self, kind: Kind) -> int:
        """Highest row number in the archive."""
        parts = self.parts(kind)
        return parts[-1].last if parts else 0


def compact(paths: RunPaths, *, prune: bool = False) -> Manifest:
    """Move what the log holds now into parquet; safe to repeat, to interrupt and to run beside the service.

    Args:
        paths: the run.
        prune: also drop the vectors of archived rows from the log (they are nine tenths of its size);
            the rest of each row stays, so that repeated transactions are still recognised.

    Raises:
        EnvironmentProblemError: another compaction runs, or the log or the folder cannot be used.
    """
    if not paths.prediction_log.exists():
        return Manifest()
    paths.prediction_archive.mkdir(parents=True, exist_ok=True)
    running = f"Another compaction of {str(paths.prediction_archive)!r} is running."
    alone = exclusive(paths.prediction_archive, running, "wait for it to end")
    with alone, _connect(paths.prediction_log) as db:
        manifest = read_manifest(paths.prediction_archive)
        for kind in _QUERIES:
            while part := _write_part(db, paths.prediction_archive, kind, manifest.last(kind)):
                manifest.parts(kind).append(part)
                _write_manifest(paths.prediction_archive, manifest)
        _remove_strays(paths.prediction_archive, manifest)
        if prune:
            _prune(db, manifest.last("predictions"))
    return manifest


def read_predictions(paths: RunPaths, *, vectors: bool = True) -> pl.DataFrame:
    """Every decision ever logged, oldest first, with its label where there is one.

    Returns:
        One row a decision: the transaction's fields, ``event_us``, ``order_us``, ``probability``,
        ``threshold``, ``decision``, versions, ``latency_ms``, and from feedback ``is_fraud`` (null
        while unknown), ``observed_us``, ``known_us``. With ``vectors`` also ``feature_values``,
        ``sequence`` (bytes, see ``stack_values`` and ``stack_sequences``) and ``sequence_len``.
    """
    predictions = _read(paths, "predictions")
    feedback = _read(paths, "feedback").select("prediction_id", "is_fraud", "observed_us", "known_us")
    if not vectors:
        predictions = predictions.drop("feature_values", "sequence", "sequence_len")
    return predictions.join(feedback, on="prediction_id", how="left", maintain_order="left")


def read_newest(paths: RunPaths, num_rows: int) -> pl.DataFrame:
    """The newest decisions with their vectors and without labels, oldest first; as cheap on the longest log.

    Returns:
        At most ``num_rows`` rows with the columns of the log; see ``read_predictions``.
    """
    manifest = read_manifest(paths.prediction_archive)
    parts = [_empty("predictions")]
    if paths.prediction_log.exists():
        with _connect(paths.prediction_log, read_only=True) as db:
            last = int(db.execute("SELECT MAX(seq) FROM predictions").fetchone()[0] or 0)
            parts.append(_fetch(db, "predictions", max(manifest.last("predictions"), last - num_rows), last))
    for part in reversed(manifest.predictions):
        if sum(map(len, parts)) >= num_rows:
            break
        parts.insert(0, pl.read_parquet(paths.prediction_archive / part.file))
    return pl.concat(parts).filter(pl.col("feature_values").is_not_null()).tail(num_rows)


def stack_values(frame: pl.DataFrame) -> npt.NDArray[np.float64]:
    """Served feature vectors of ``read_predictions`` rows that share one feature service: float64[n, F]."""
    return _stack([unpack(blob) for blob in frame["feature_values"]], "feature vectors")


def stack_sequences(frame: pl.DataFrame) -> npt.NDArray[np.float64]:
    """Served sequences of ``read_predictions`` rows: float64[n, N, C]."""
    pairs = zip(frame["sequence"], frame["sequence_len"], strict=True)
    return _stack([unpack(blob, rows) for blob, rows in pairs], "sequences")


def read_manifest(folder: Path) -> Manifest:
    """The manifest of an archive; empty when there is none yet.

    Raises:
        DataError: the manifest is not readable.
    """
    path = folder / MANIFEST
    if not path.exists():
        return Manifest()
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        return Manifest(*([Part(**item) for item in tree[kind]] for kind in ("predictions", "feedback")))
    except (ValueError, KeyError, TypeError) as error:
        detail = f"The manifest {str(path)!r} cannot be read: {error}."
        raise DataError(detail, fix="restore it from a backup of the run folder") from error


def _stack(arrays: list[npt.NDArray[np.float64]], what: str) -> npt.NDArray[np.float64]:
    shapes = {array.shape for array in arrays}
    if len(shapes) > 1:
        raise DataError(f"The rows hold {what} of several shapes: {sorted(shapes)}.", fix="select one feature service")
    return np.stack(arrays) if arrays else np.empty((0, 0))


def _read(paths: RunPaths, kind: Kind) -> pl.DataFrame:
    # The log is read first and the manifest second: a row that moves in between is found in the
    # archive, and dropped from the log's share because its number is not above the manifest's.
    fresh = _empty(kind)
    if paths.prediction_log.exists():
        with _connect(paths.prediction_log, read_only=True) as db:
            start = read_manifest(paths.prediction_archive).last(kind)
            fresh = _fetch(db, kind, start, 2**62)
    manifest = read_manifest(paths.prediction_archive)
    parts = [pl.read_parquet(paths.prediction_archive / part.file) for part in manifest.parts(kind)]
    return pl.concat([*parts, fresh.filter(pl.col("seq") > manifest.last(kind))])


def _fetch(db: sqlite3.Connection, kind: Kind, after: int, last: int) -> pl.DataFrame:
    cursor = db.execute(_QUERIES[kind], (after, last))
    names = [column[0] for column in cursor.description]
    return pl.DataFrame(cursor.fetchall(), schema={name: _TYPES[name] for name in names}, orient="row")


def _empty(kind: Kind) -> pl.DataFrame:
    return pl.DataFrame(schema={name: _TYPES[name] for name in _COLUMNS[kind]})


def _write_part(db: sqlite3.Connection, folder: Path, kind: Kind, after: int) -> Part | None:
    stretch = f"SELECT seq FROM {kind} WHERE seq > ? ORDER BY seq LIMIT {PART_ROWS}"
    first, last, rows = db.execute(f"SELECT MIN(seq), MAX(seq), COUNT(*) FROM ({stretch})", (after,)).fetchone()
    if not rows:
        return None
    part = Part(f"{kind}-{first:012d}-{last:012d}.parquet", first, last, rows)
    frame = _fetch(db, kind, after, last)
    assert len(frame) == rows, f"{len(frame)} of {rows} rows"
    try:
        frame.write_parquet(folder / part.file, compression="zstd")
        sync(folder / part.file)
    except OSError as error:
        raise _unusable(folder, error) from error
    return part


def _write_manifest(folder: Path, manifest: Manifest) -> None:
    try:
        replace_text(folder / MANIFEST, json.dumps(asdict(manifest), indent=1))
    except OSError as error:
        raise _unusable(folder, error) from error


def _remove_strays(folder: Path, manifest: Manifest) -> None:
    known = {part.file for kind in _QUERIES for part in manifest.parts(kind)}
    for file in folder.glob("*.parquet"):
        if file.name not in known:
            file.unlink()


def _prune(db: sqlite3.Connection, last: int) -> None:
    while True:  # short transactions, and time between them: SQLite keeps no queue, the service would go on losing
        with db:
            if db.execute(DROP_VECTORS, (last, _PRUNE_ROWS)).rowcount == 0:
                return
        time.sleep(_PRUNE_PAUSE_S)


@contextmanager
def _connect(path: Path, *, read_only: bool = False) -> Iterator[sqlite3.Connection]:
    uri = read_uri(path) if read_only else path.absolute().as_uri()
    try:
        with closing(sqlite3.connect(uri, uri=True, timeout=BUSY_TIMEOUT_S)) as db:
            yield db
    except sqlite3.Error as error:
        raise _unusable(path, error) from error


def _unusable(path: Path, error: Exception) -> EnvironmentProblemError:
    return EnvironmentProblemError(
        f"{str(path)!r} cannot be used: {error}.", fix="free space, or make the run folder writable"
    )
