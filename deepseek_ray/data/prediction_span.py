"""A stretch of event time out of the prediction log and its archive: few columns, a bounded number of rows.

``prediction_archive.read_predictions`` reads all that was ever logged. What looks at the newest days again and again
asks here: files are read column by column, and of too many rows every k-th is taken, by its row number.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass

import polars as pl

from deepseek_ray.data.prediction_archive import Kind, read_manifest
from deepseek_ray.data.prediction_log import BUSY_TIMEOUT_S
from deepseek_ray.errors import EnvironmentProblemError
from deepseek_ray.paths import RunPaths
from deepseek_ray.sqlite import read_uri

COLUMNS: dict[str, pl.DataType] = {
    "seq": pl.Int64(), "prediction_id": pl.String(), "order_us": pl.Int64(), "card_id": pl.String(),
    "probability": pl.Float64(), "threshold": pl.Float64(), "decision": pl.String(), "model_version": pl.String(),
    "feature_digest": pl.String(),
}  # fmt: skip
_VECTORS: dict[str, pl.DataType] = {**COLUMNS, "feature_values": pl.Binary()}
_LABELS: dict[str, pl.DataType] = {
    "seq": pl.Int64(), "prediction_id": pl.String(), "is_fraud": pl.Int64(), "known_us": pl.Int64()
}  # fmt: skip
_NEWEST_ROWS = 1_000


@dataclass(frozen=True)
class Span:
    """Decisions of a stretch of time.

    Args:
        rows: ``COLUMNS``, and ``feature_values`` or ``is_fraud`` (null while unknown) where asked for; oldest first.
        step: every step-th decision was taken; 1: all of them.
    """

    rows: pl.DataFrame
    step: int


def newest_us(paths: RunPaths) -> int | None:
    """Event time of the newest decision, microseconds; None where none is logged.

    Looked for among the last rows only: events come nearly in order, and the log may be long.
    """
    if not paths.prediction_log.exists():
        return None
    with closing(_open(paths)) as db:
        query = f"SELECT MAX(order_us) FROM (SELECT order_us FROM predictions ORDER BY seq DESC LIMIT {_NEWEST_ROWS})"
        found = _ask(paths, db, query).item()
    return None if found is None else int(found)


def read_vectors(paths: RunPaths, start_us: int, end_us: int, max_rows: int) -> Span:
    """Decisions with ``start_us <= order_us < end_us`` and the vectors that they were made from.

    Raises:
        EnvironmentProblemError: the log cannot be read.
    """
    step = _step(paths, start_us, end_us, max_rows)
    query = (
        f"SELECT {', '.join(COLUMNS)}, feature_values FROM predictions JOIN vectors USING (seq) "
        f"WHERE seq > ? AND order_us >= {start_us} AND order_us < {end_us} AND seq % {step} = 0"
    )
    return Span(_read(paths, "predictions", query, _VECTORS, _within(start_us, end_us, step)), step)


def read_labelled(paths: RunPaths, start_us: int, end_us: int, max_rows: int) -> Span:
    """Decisions with ``start_us <= order_us < end_us`` and the labels that came in for them so far; raises as above."""
    step = _step(paths, start_us, end_us, max_rows)
    query = (
        f"SELECT {', '.join(COLUMNS)} FROM predictions "
        f"WHERE seq > ? AND order_us >= {start_us} AND order_us < {end_us} AND seq % {step} = 0"
    )
    rows = _read(paths, "predictions", query, COLUMNS, _within(start_us, end_us, step))
    query = f"SELECT {', '.join(_LABELS)} FROM feedback WHERE seq > ? AND known_us >= {start_us}"
    labels = _read(paths, "feedback", query, _LABELS, pl.col("known_us") >= start_us)  # not before its event
    labels = labels.select("prediction_id", "is_fraud")
    return Span(rows.join(labels, on="prediction_id", how="left", maintain_order="left"), step)


def _step(paths: RunPaths, start_us: int, end_us: int, max_rows: int) -> int:
    query = f"SELECT seq FROM predictions WHERE seq > ? AND order_us >= {start_us} AND order_us < {end_us}"
    found = _read(paths, "predictions", query, {"seq": pl.Int64()}, _within(start_us, end_us, 1))
    return max(1, -(-found.height // max_rows))


def _within(start_us: int, end_us: int, step: int) -> pl.Expr:
    return pl.col("order_us").is_between(start_us, end_us, closed="left") & (pl.col("seq") % step == 0)


def _read(paths: RunPaths, kind: Kind, query: str, columns: dict[str, pl.DataType], wanted: pl.Expr) -> pl.DataFrame:
    # The log first and the manifest second, as in prediction_archive.py: a row that moves in between is counted once.
    fresh = pl.DataFrame(schema=columns)
    if paths.prediction_log.exists():
        with closing(_open(paths)) as db:
            start = read_manifest(paths.prediction_archive).last(kind)
            fresh = _ask(paths, db, query, (start,), columns)
    manifest = read_manifest(paths.prediction_archive)
    files = [paths.prediction_archive / part.file for part in manifest.parts(kind)]
    old = [pl.scan_parquet(files).filter(wanted).select(list(columns)).collect()] if files else []
    return pl.concat([*old, fresh.filter(pl.col("seq") > manifest.last(kind))]).sort("seq")


def _open(paths: RunPaths) -> sqlite3.Connection:
    try:
        return sqlite3.connect(read_uri(paths.prediction_log), uri=True, timeout=BUSY_TIMEOUT_S)
    except sqlite3.Error as error:
        raise _unreadable(paths, error) from error


def _ask(
    paths: RunPaths,
    db: sqlite3.Connection,
    query: str,
    values: Sequence[int] = (),
    columns: dict[str, pl.DataType] | None = None,
) -> pl.DataFrame:
    try:
        rows = db.execute(query, values).fetchall()
    except sqlite3.Error as error:
        raise _unreadable(paths, error) from error
    return pl.DataFrame(rows, schema=columns or ["value"], orient="row")


def _unreadable(paths: RunPaths, error: sqlite3.Error) -> EnvironmentProblemError:
    return EnvironmentProblemError(
        f"The prediction log {str(paths.prediction_log)!r} cannot be read: {error}.", fix="see that the file is whole"
    )
