"""The transactions table: schema, order of arrival, label positions, digest, atomic files.

Rows stand in order of arrival, (event_time, transaction_id). ``order_us`` strictly increases along the rows of one
card, one terminal and one device; between different keys two rows may share an ``order_us`` or step back by the few
microseconds that a tie was moved.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from deepseek_ray.data.events import CHANNELS, MAX_AMOUNT_CENTS, TRANSACTION_COLUMNS, delay_us
from deepseek_ray.errors import DataError, EnvironmentProblemError, SchemaError

UNKNOWN = "unknown"
"""Value of an optional attribute that was not given; an unknown device orders nothing."""

SCHEMA: dict[str, pl.DataType] = {
    "transaction_id": pl.String(),
    "event_time": pl.Datetime("us", "UTC"),
    "order_us": pl.Int64(),
    "card_id": pl.String(),
    "terminal_id": pl.String(),
    "amount_cents": pl.Int64(),
    "device_id": pl.String(),
    "channel": pl.String(),
    "country": pl.String(),
    "merchant_category": pl.String(),
    "is_fraud": pl.Int8(),
    "fraud_scenario": pl.Int8(),
    "label_us": pl.Int64(),
}
"""Polars types of TRANSACTION_COLUMNS, in the same order."""

assert tuple(SCHEMA) == tuple(TRANSACTION_COLUMNS)

REQUIRED = ("transaction_id", "event_time", "card_id", "terminal_id", "amount_cents")
NULLABLE = ("is_fraud", "label_us")
ORDER_KEYS = ("card_id", "terminal_id", "device_id")
_DEFAULTS: dict[str, Any] = {
    "device_id": UNKNOWN,
    "channel": UNKNOWN,
    "country": UNKNOWN,
    "merchant_category": UNKNOWN,
    "is_fraud": None,
    "fraud_scenario": 0,
    "label_us": None,
}
_MAX_SWEEPS = 32


def to_table(frame: pl.DataFrame, *, label_delay_days: float) -> pl.DataFrame:
    """Bring a frame into canonical form: types, defaults, order of arrival, label positions.

    Args:
        frame: at least the columns of ``REQUIRED``; ``event_time`` with a time zone, ``amount_cents`` integer. A
            ``label_us`` that is given is when the label became known; the delay is then a lower bound.
        label_delay_days: days between an event and the use of its label.

    Raises:
        SchemaError: a column is missing, has the wrong type or holds a value out of range.
    """
    missing = [name for name in REQUIRED if name not in frame.columns]
    if missing:
        raise SchemaError(
            f"Columns {missing} are missing; found {frame.columns}.", fix=f"give at least {list(REQUIRED)}"
        )
    absent = [pl.lit(value).alias(name) for name, value in _DEFAULTS.items() if name not in frame.columns]
    ordered = assign_order(_cast(frame.with_columns(absent)))
    return check(with_labels(ordered, label_delay_days=label_delay_days))


def _cast(frame: pl.DataFrame) -> pl.DataFrame:
    if not isinstance(frame.schema["event_time"], pl.Datetime) or frame.schema["event_time"].time_zone is None:
        found = frame.schema["event_time"]
        raise SchemaError(f"Column 'event_time' has type {found}.", fix="give a datetime with a time zone")
    if not frame.schema["amount_cents"].is_integer():
        raise SchemaError(f"Column 'amount_cents' has type {frame.schema['amount_cents']}.", fix="give integer cents")
    columns = [name for name in SCHEMA if name != "order_us"]
    utc = frame.with_columns(pl.col("event_time").dt.convert_time_zone("UTC"))
    try:
        return utc.select(pl.col(name).cast(SCHEMA[name]) for name in columns)
    except pl.exceptions.PolarsError as error:
        raise SchemaError(f"A column cannot be converted: {error}", fix=f"use the types {SCHEMA}") from error


def check(table: pl.DataFrame) -> pl.DataFrame:
    """Return the table when it is canonical.

    Raises:
        SchemaError: names the column, a wrong value and the fix.
    """
    if list(table.columns) != list(SCHEMA):
        raise SchemaError(f"Columns are {table.columns}.", fix=f"expected exactly {list(SCHEMA)}")
    for name, dtype in SCHEMA.items():
        if table.schema[name] != dtype:
            raise SchemaError(f"Column {name!r} has type {table.schema[name]}.", fix=f"cast it to {dtype}")
        if name not in NULLABLE and table[name].null_count():
            raise SchemaError(
                f"Column {name!r} has {table[name].null_count()} empty values.", fix="fill or drop these rows"
            )
    _check_values(table)
    return table


def _check_values(table: pl.DataFrame) -> None:
    rules = {
        "transaction_id": (pl.col("transaction_id").is_duplicated(), "make transaction ids unique"),
        "amount_cents": (~pl.col("amount_cents").is_between(0, MAX_AMOUNT_CENTS), f"give 0..{MAX_AMOUNT_CENTS} cents"),
        "channel": (~pl.col("channel").is_in(list(CHANNELS)), f"use one of {', '.join(CHANNELS)}"),
        "is_fraud": (~pl.col("is_fraud").is_between(0, 1), "use 0, 1 or null"),
        "order_us": (pl.col("order_us") < pl.col("event_time").dt.epoch("us"), "build the table with assign_order"),
    }
    for name, (wrong, fix) in rules.items():
        found = table.lazy().filter(wrong).select(name).head(1).collect()
        if found.height:
            raise SchemaError(f"Column {name!r} has the value {found[name][0]!r}.", fix=fix)


def assign_order(frame: pl.DataFrame) -> pl.DataFrame:
    """Sort by (event_time, transaction_id) and set ``order_us`` of each row.

    order_us = max(event time in us, 1 + order_us of the last row of the same card, terminal and known device): what
    the stream engine assigns when the rows arrive in this order.
    """
    rows = frame.sort("event_time", "transaction_id")
    event_us = rows["event_time"].dt.epoch("us").to_numpy()
    before = np.stack([_previous_row(rows[key], ignore=UNKNOWN if key == "device_id" else None) for key in ORDER_KEYS])
    order_us = pl.Series("order_us", settle_order(event_us, before), dtype=pl.Int64)
    with_order = rows.with_columns(order_us)
    return with_order.select([name for name in SCHEMA if name in with_order.columns])


def _previous_row(keys: pl.Series, *, ignore: str | None) -> npt.NDArray[np.int64]:
    """Row number of the last earlier row with the same key, -1 when there is none. Shape (n,)."""
    previous = pl.col("row").cast(pl.Int64).shift(1).over("key").fill_null(-1)
    if ignore is not None:
        previous = pl.when(pl.col("key") == ignore).then(-1).otherwise(previous)
    # the row number is a column first: int_range inside over() would count within each group
    return keys.alias("key").to_frame().with_row_index("row").select(previous.alias("row"))["row"].to_numpy()


def settle_order(event_us: npt.NDArray[np.int64], before: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Smallest order with order[i] >= event_us[i] and order[i] > order[j] for each predecessor j of row i.

    Args:
        event_us: (n,) microseconds in order of arrival.
        before: (k, n) row numbers of predecessors, each < its row, -1 for none.

    Whole-array sweeps reach the fixed point after as many rounds as the longest chain of ties, which is short in real
    data; long chains (a file with one time stamp) fall back to one pass in order.
    """
    order = event_us.astype(np.int64, copy=True)
    for _ in range(_MAX_SWEEPS):
        moved = order
        for previous in before:
            moved = np.maximum(moved, np.where(previous >= 0, order[previous] + 1, moved))
        if np.array_equal(moved, order):
            return order
        order = moved
    return _settle_in_one_pass(event_us, before)


def _settle_in_one_pass(event_us: npt.NDArray[np.int64], before: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    order: list[int] = event_us.tolist()
    for row, previous_rows in enumerate(before.T.tolist()):
        for previous in previous_rows:
            if previous >= 0 and order[previous] >= order[row]:
                order[row] = order[previous] + 1
    return np.array(order, dtype=np.int64)


def with_labels(table: pl.DataFrame, *, label_delay_days: float) -> pl.DataFrame:
    """Set ``label_us`` = max(order_us + delay, when the label became known); null where the label is unknown."""
    known = pl.max_horizontal(pl.col("order_us") + delay_us(label_delay_days), pl.col("label_us"))
    label_us = pl.when(pl.col("is_fraud").is_not_null()).then(known).otherwise(None)
    return table.with_columns(label_us.cast(pl.Int64).alias("label_us"))


def digest(table: pl.DataFrame) -> str:
    """sha256 over names, types and values of every column, whatever the chunking or the file format."""
    total = hashlib.sha256()
    for column in table.get_columns():
        total.update(f"{column.name}:{column.dtype}:{len(column)};".encode())
        total.update(column.is_null().to_numpy().tobytes())
        if column.dtype == pl.String:
            filled = column.fill_null("")
            total.update(filled.str.len_bytes().to_numpy().tobytes())
            total.update("".join(filled.to_list()).encode())
        else:
            total.update(column.to_physical().fill_null(0).to_numpy().tobytes())
    return total.hexdigest()


def write(table: pl.DataFrame, path: Path) -> None:
    """Write a frame as parquet; the old file stays until the new one is complete on disk.

    Raises:
        EnvironmentProblemError: the disk is read-only or full.
    """
    temporary = ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
        with os.fdopen(descriptor, "wb") as stream:
            table.write_parquet(stream, compression="zstd")
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if temporary:
            Path(temporary).unlink(missing_ok=True)
        raise EnvironmentProblemError(
            f"The file {str(path)!r} cannot be written: {error.strerror}.",
            fix="free space, change permissions or choose another --run folder",
        ) from error


def read(path: Path) -> pl.DataFrame:
    """Read a table written by ``write`` and check it.

    Raises:
        DataError: the file is missing or is not parquet.
        SchemaError: it is not a transactions table.
    """
    try:
        return check(pl.read_parquet(path))
    except (OSError, pl.exceptions.PolarsError) as error:
        if isinstance(error, FileNotFoundError):
            raise DataError(
                f"There is no transactions table at {str(path)!r}.",
                fix=f"deepseek-ray ingest --synthetic --run {path.parent}, or a FILE instead of --synthetic",
            ) from error
        raise DataError(
            f"The file {str(path)!r} is not readable parquet: {error}.", fix="ingest the data again"
        ) from error
