"""Reader of handbook-shaped parquet: the columns of the *Practical Handbook*'s simulated transactions."""

from __future__ import annotations

from pathlib import Path

import polars as pl

from deepseek_ray.data.table import to_table
from deepseek_ray.errors import DataError, SchemaError

COLUMNS = ("TRANSACTION_ID", "TX_DATETIME", "CUSTOMER_ID", "TERMINAL_ID", "TX_AMOUNT", "TX_FRAUD", "TX_FRAUD_SCENARIO")
"""Columns that are read; others (TX_TIME_SECONDS, TX_TIME_DAYS) follow from them. Times are UTC."""


def read(folder: str | Path, *, label_delay_days: float = 7.0) -> pl.DataFrame:
    """Read every ``*.parquet`` of a folder as one transactions table.

    Ids become strings: card ``c596``, terminal ``t3156``, transaction ``tx000000123``. Amounts become cents.

    Raises:
        DataError: no such folder, no parquet in it, or a file is unreadable.
        SchemaError: a column is missing or has the wrong type.
    """
    files = sorted(Path(folder).glob("*.parquet"))
    if not files:
        raise DataError(
            f"There is no *.parquet in the folder {str(folder)!r}.", fix="name a folder of handbook parquet"
        )
    return to_table(pl.concat([_read_file(file) for file in files]), label_delay_days=label_delay_days)


def _read_file(file: Path) -> pl.DataFrame:
    try:
        frame = pl.read_parquet(file)
    except (OSError, pl.exceptions.PolarsError) as error:
        raise DataError(f"The file {str(file)!r} is not readable parquet: {error}.", fix="fetch it again") from error
    missing = [name for name in COLUMNS if name not in frame.columns]
    if missing:
        raise SchemaError(f"The file {str(file)!r} lacks the columns {missing}.", fix=f"give {', '.join(COLUMNS)}")
    try:
        return frame.select(
            _numbered("tx", "TRANSACTION_ID", width=9).alias("transaction_id"),
            pl.col("TX_DATETIME").cast(pl.Datetime("us")).dt.replace_time_zone("UTC").alias("event_time"),
            _numbered("c", "CUSTOMER_ID").alias("card_id"),
            _numbered("t", "TERMINAL_ID").alias("terminal_id"),
            (pl.col("TX_AMOUNT").cast(pl.Float64) * 100).round().cast(pl.Int64).alias("amount_cents"),
            pl.col("TX_FRAUD").cast(pl.Int8).alias("is_fraud"),
            pl.col("TX_FRAUD_SCENARIO").cast(pl.Int8).alias("fraud_scenario"),
        )
    except pl.exceptions.PolarsError as error:
        raise SchemaError(
            f"The file {str(file)!r} has a wrong type: {error}.", fix="keep the handbook's types"
        ) from error


def _numbered(prefix: str, column: str, *, width: int = 1) -> pl.Expr:
    return pl.lit(prefix) + pl.col(column).cast(pl.Int64).cast(pl.String).str.zfill(width)
