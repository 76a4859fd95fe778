"""The offline store's files: vectors of one service as parquet, in parts that appear whole or not at all.

A part is a file, or a folder of files that several processes wrote. Feast reads the folder as one table; so do we,
keys first, then the asked-for rows file by file, so that what is not asked for is never held.

    N  rows     F  features     S  sequence length     C  sequence channels
"""

from __future__ import annotations

import os
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from deepseek_ray.data.batch_engine import FeatureTable

COMPRESSION: dict[str, Any] = {"compression": "zstd", "compression_level": 1}
_PARTS = "part-*.parquet"
_ROW = "_row"


def to_arrow(table: FeatureTable) -> pa.Table:
    """Vectors as a table of the offline store; N rows."""
    rows = len(table.order_us)
    return pa.table(
        {
            "card_id": pa.array(table.card_id, pa.string()),
            "event_timestamp": pa.array(table.order_us, pa.int64()).cast(pa.timestamp("us", tz="UTC")),
            "order_us": pa.array(table.order_us, pa.int64()),
            "transaction_id": pa.array(table.transaction_id, pa.string()),
            "feature_values": _lists(table.values.reshape(rows, -1)),
            "sequence": _lists(table.sequence.reshape(rows, -1)) if rows else pa.array([], pa.list_(pa.float64())),
        }
    )


def append(table: FeatureTable, folder: Path) -> Path:
    """Write vectors as the folder's next part. The caller holds the folder's lock."""
    part = _next(folder)
    temporary = part.with_suffix(".writing")
    pq.write_table(to_arrow(table), temporary, **COMPRESSION)
    os.replace(temporary, part)
    return part


def adopt(files: Path, folder: Path) -> Path:
    """Make a folder of finished files the next part. The caller holds the folder's lock."""
    part = _next(folder)
    os.replace(files, part)
    return part


def stage(folder: Path) -> Path:
    """A fresh folder that no reader sees, for the files of one part to be."""
    files = folder / f".{uuid.uuid4().hex}.writing"
    files.mkdir()
    return files


def keys(folder: Path) -> pl.DataFrame:
    """``card_id`` and ``order_us`` of all rows in the order they were written, with ``file`` and ``place`` in it."""
    columns = ["card_id", "order_us"]
    frames = [
        pl.read_parquet(file, columns=columns).with_row_index("place").with_columns(file=pl.lit(number, pl.UInt32))
        for number, file in enumerate(_files(folder))
    ]
    return pl.concat(frames) if frames else pl.DataFrame()


def take(folder: Path, places: pl.DataFrame) -> pl.DataFrame:
    """The stored rows at ``file`` and ``place``, in the order of ``places``; one file is open at a time."""
    files, wanted = _files(folder), places.with_row_index(_ROW)
    found = []
    for (number,), group in wanted.group_by("file", maintain_order=True):
        rows = pl.read_parquet(files[number])[group["place"]]
        found.append(rows.with_columns(group[_ROW]))
    if not found:
        return pl.read_parquet(files[0]).clear()
    return pl.concat(found).sort(_ROW).drop(_ROW)


def flat(column: pl.Series) -> np.ndarray[Any, np.dtype[np.float64]]:
    """All numbers of a column of lists, one after the other."""
    return column.explode(empty_as_null=False).to_numpy()


def _files(folder: Path) -> list[Path]:
    parts = sorted(folder.glob(_PARTS))
    return [file for part in parts for file in (sorted(part.glob("*.parquet")) if part.is_dir() else [part])]


def _next(folder: Path) -> Path:
    return folder / f"part-{len(list(folder.glob(_PARTS))):05d}.parquet"


def _lists(matrix: np.ndarray[Any, np.dtype[np.float64]]) -> pa.Array:
    rows, width = matrix.shape
    offsets = pa.array(np.arange(rows + 1, dtype=np.int64) * width)
    return pa.LargeListArray.from_arrays(offsets, pa.array(matrix.ravel())).cast(pa.list_(pa.float64()))
