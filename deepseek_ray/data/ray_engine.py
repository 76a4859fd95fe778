"""The batch engine spread over partitions with Ray Data, for a history that one process cannot hold.

The same declaration and formulas as data/batch_engine.py, in one pass an owner:

    parquet -> by terminal: its columns -> by device: its columns -> by card: its columns, whole vectors -> parquet

Each arrow is a hash shuffle after which a partition holds whole terminals, devices or cards. A row carries the columns
that it has so far, so that no wide row is shuffled twice and nothing is joined. The cards come last: they make half of
the vector and the sequence, which never leave their process except to the file.

    N  rows of a partition     P  partitions
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import ray.data
from ray.data import DataContext, Dataset

from deepseek_ray.data import history, offline_store
from deepseek_ray.data.batch_engine import assemble, owner_columns
from deepseek_ray.data.events import delay_us
from deepseek_ray.data.formulas import FloatArray
from deepseek_ray.data.history import UNKNOWN_DEVICE, History
from deepseek_ray.data.windows import OWNERS, VectorSpec
from deepseek_ray.errors import DeepseekRayError, FeatureError, SchemaError

_HOME = "_home"
_CARD = "card"
_COLUMNS = {owner: column for column, owner in OWNERS.items()}


@dataclass(frozen=True)
class Pass:
    """What every worker needs to know; it travels to all of them."""

    spec: VectorSpec
    delay: int
    sequence_len: int
    before_us: int | None


def write(
    source: Path,
    spec: VectorSpec,
    folder: Path,
    *,
    label_delay_days: float,
    sequence_len: int,
    num_partitions: int,
    before_us: int | None = None,
) -> int:
    """Compute a vector for every row of a transactions table and write them as files of the offline store.

    Needs a connection to Ray. Within a file rows stand by time; a card is in one file.

    Args:
        source: parquet file, or folder of files, with the columns of events.TRANSACTION_COLUMNS; rows in any order.
        spec: the vector.
        folder: where the files go; on a cluster both must be seen by all machines.
        label_delay_days: a label counts no earlier than this many days after its event.
        sequence_len: S, earlier events of the card a row gets.
        num_partitions: P; one partition's rows, vectors and workings must fit into a worker.
        before_us: leave out rows of this order and later; None takes all.

    Returns:
        Number of rows written.

    Raises:
        SchemaError: a column is missing.
        FeatureError: ``order_us`` is not strictly increasing, or files hold more or fewer rows than the table.
    """
    _check_columns(source)
    task = Pass(spec, delay_us(label_delay_days), sequence_len, before_us)
    others = [owner for owner in spec.owners if owner != _CARD]
    with _settings(), _typed_errors():
        rows = ray.data.read_parquet(str(source.resolve())).select_columns(list(history.NEEDED))
        rows = _each_block(rows, _start, task, [*others, _CARD][0])
        for owner, following in zip(others, [*others[1:], _CARD], strict=True):
            rows = _each_block(_by_home(rows, num_partitions), _add_columns, task, owner, following)
        whole = _each_block(_by_home(rows, num_partitions), _whole_vectors, task)
        whole.write_parquet(str(folder.resolve()), **offline_store.COMPRESSION)
    return _count(source, folder, before_us)


def _start(block: pa.Table, task: Pass, owner: str) -> pa.Table:
    """Rows of the history, each with the partition key of the first pass."""
    frame = pl.from_arrow(block)
    assert isinstance(frame, pl.DataFrame)
    if task.before_us is not None:
        frame = frame.filter(pl.col("order_us") < task.before_us)
    return frame.with_columns(_home_of(owner)).to_arrow()


def _add_columns(block: pa.Table, task: Pass, owner: str, following: str) -> pa.Table:
    """The rows of a partition with one owner's columns of the vector, and the partition key of the next pass."""
    table = _history(block, task)
    positions = {position: index for index, position in enumerate(task.spec.positions(owner))}
    values = np.empty((block.num_rows, len(positions)))
    for position, column in owner_columns(table, task.spec, owner):
        values[:, positions[position]] = column
    home = table.frame.select(_home_of(following)).to_arrow()[_HOME]
    return block.drop_columns([_HOME]).append_column(owner, _packed(values)).append_column(_HOME, home)


def _whole_vectors(block: pa.Table, task: Pass) -> pa.Table:
    """Vectors of a partition of whole cards, as rows of the offline store."""
    block = block.sort_by([("order_us", "ascending"), ("transaction_id", "ascending")])
    known = {name: _unpacked(block[name]) for name in task.spec.owners if name != _CARD}
    return offline_store.to_arrow(assemble(_history(block, task), task.spec, task.sequence_len, known))


def _history(block: pa.Table, task: Pass) -> History:
    frame = pl.from_arrow(block.select(history.NEEDED))
    assert isinstance(frame, pl.DataFrame)
    return History(frame, task.delay, task.spec.horizon_us(_CARD, task.delay))


def _home_of(owner: str) -> pl.Expr:
    """What rows are partitioned by; rows without a device, which have no history to share, are spread."""
    column = pl.col(_COLUMNS[owner])
    if owner == "device":
        column = pl.when(column == UNKNOWN_DEVICE).then(pl.col("transaction_id")).otherwise(column)
    return column.alias(_HOME)


def _by_home(rows: Dataset, num_partitions: int) -> Dataset:
    return rows.repartition(num_partitions, keys=[_HOME])


def _each_block(rows: Dataset, function: Callable[..., pa.Table], *arguments: Any) -> Dataset:
    return rows.map_batches(function, batch_size=None, batch_format="pyarrow", fn_args=arguments, zero_copy_batch=True)


def _packed(values: FloatArray) -> pa.Array:
    """[N, W] as one column of N byte strings: exact, and cheap to move."""
    width = values.shape[1] * values.itemsize
    return pa.Array.from_buffers(pa.binary(width), len(values), [None, pa.py_buffer(np.ascontiguousarray(values))])


def _unpacked(column: pa.ChunkedArray) -> FloatArray:
    array = column.combine_chunks()
    width = array.type.byte_width // 8
    values = np.frombuffer(array.buffers()[1], np.float64)
    return values[array.offset * width : (array.offset + len(array)) * width].reshape(len(array), width)


def _count(source: Path, folder: Path, before_us: int | None) -> int:
    """Rows in the files, which must be all rows of the table, each once."""
    known = pl.lit(True) if before_us is None else pl.col("order_us") < before_us
    expected = pl.scan_parquet(source).filter(known).select(pl.len()).collect().item()
    written = sum(pq.read_metadata(file).num_rows for file in folder.glob("*.parquet"))
    if written != expected:
        problem = f"Ray wrote {written} vectors of {expected} transactions."
        raise FeatureError(problem, fix="see ray-data.log in Ray's session folder, then compute them again")
    return written


def _check_columns(source: Path) -> None:
    file = next(iter(sorted(source.rglob("*.parquet"))), source) if source.is_dir() else source
    missing = [column for column in history.NEEDED if column not in pq.read_schema(file).names]
    if missing:
        raise SchemaError(f"{str(file)!r} has no column {missing[0]!r}.", fix="build it with deepseek_ray.data.table")


@contextmanager
def _settings() -> Iterator[None]:
    """Ray Data without bars and console messages (its log file has them), and our own errors as they were raised."""
    for handler in logging.getLogger("ray.data").handlers:
        if handler.name == "console":
            handler.setLevel(logging.CRITICAL)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"ray\.")  # of its own old settings
        context = DataContext.get_current().copy()
        context.enable_progress_bars = False
        context.raise_original_map_exception = True
        with DataContext.current(context):
            yield


@contextmanager
def _typed_errors() -> Iterator[None]:
    """An error that one of our functions raised in a worker comes back as it was raised."""
    try:
        yield
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, DeepseekRayError):
                raise cause from None
            cause = getattr(cause, "cause", None) or cause.__cause__
        raise
