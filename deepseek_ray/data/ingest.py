"""A user's file becomes a run's transactions table; rows that are no transactions go to a quarantine, with reasons.

Every row of the file is either accepted or quarantined. When the file as a whole cannot be used, the run keeps the
table it had.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import polars as pl

from deepseek_ray.data import table
from deepseek_ray.data.mapping import FileMapping
from deepseek_ray.data.row_rules import Rule, rules_for
from deepseek_ray.data.rows import CHUNK_ROWS, BrokenLine, Chunk, read_chunks
from deepseek_ray.errors import IngestError
from deepseek_ray.paths import RunPaths

QUARANTINE_SCHEMA: dict[str, pl.DataType] = {
    "row_number": pl.Int64(),
    "reason": pl.String(),
    "value": pl.String(),
    "raw": pl.String(),
}
"""``row_number``: line of a CSV file, else row from 1. ``raw``: the row as JSON, or ``{"line": ...}``."""

FAILED_QUARANTINE = "quarantine-failed.parquet"
"""Rows of a file that had no good row at all; ``quarantine.parquet`` always belongs to the table beside it."""

_ROW, _REASON = "_row", "_reason"


@dataclass(frozen=True)
class IngestResult:
    """What became of a file: ``accepted + quarantined == input_rows``."""

    input_rows: int
    accepted: int
    quarantined: int
    by_reason: dict[str, int]
    unused_columns: tuple[str, ...]
    digest: str


def ingest(
    file: Path,
    mapping: FileMapping | None,
    paths: RunPaths,
    *,
    label_delay_days: float,
    chunk_rows: int = CHUNK_ROWS,
    now: datetime | None = None,
) -> IngestResult:
    """Check a CSV or parquet file row by row and make it the run's transactions table.

    Args:
        file: what to read.
        mapping: columns to fields; None when the columns already have our names.
        paths: the run; ``transactions`` and ``quarantine`` are replaced when the file is usable.
        label_delay_days: days between an event and the use of its label.
        chunk_rows: rows looked at together.
        now: the present, for tests.

    Raises:
        IngestError: the file is missing, empty, unreadable, wrongly encoded, or has no good row.
        SchemaError: a mapped column is missing or of an unusable type.
        EnvironmentProblemError: the run folder cannot be written.
    """
    paths.create()
    moment = now or datetime.now(UTC)
    accepted: list[pl.DataFrame] = []
    quarantined = [pl.DataFrame(schema=QUARANTINE_SCHEMA)]
    unused: tuple[str, ...] = ()
    for chunk, in_force in read_chunks(file, mapping, chunk_rows=chunk_rows):
        judged = _judge(chunk.rows, rules_for(in_force, chunk.rows.schema, moment), accepted)
        accepted.append(judged.filter(pl.col(_REASON).is_null()).drop(_ROW, _REASON))
        quarantined += [_rejected_rows(chunk, judged, in_force), _broken_lines(chunk.broken)]
        unused = tuple(name for name in chunk.rows.columns if name not in in_force.columns)
    rejects = pl.concat(quarantined)
    if not sum(part.height for part in accepted):
        raise _unusable(file, rejects, paths)
    transactions = table.to_table(pl.concat(accepted), label_delay_days=label_delay_days)
    table.write(rejects, paths.quarantine)
    table.write(transactions, paths.transactions)
    return IngestResult(
        input_rows=transactions.height + rejects.height,
        accepted=transactions.height,
        quarantined=rejects.height,
        by_reason=_by_reason(rejects),
        unused_columns=unused,
        digest=table.digest(transactions),
    )


def _judge(rows: pl.DataFrame, rules: list[Rule], earlier: list[pl.DataFrame]) -> pl.DataFrame:
    """The converted fields of all rows, with ``_row`` in the chunk and ``_reason`` of rejection, null when good."""
    values = [rule.value.alias(rule.column) for rule in rules]
    reason = pl.coalesce(*(rule.reason for rule in rules)).alias(_REASON)
    judged = rows.select(*values, reason).with_row_index(_ROW)
    if "label_us" in judged.columns:
        early = pl.when(pl.col("label_us") < pl.col("event_time").dt.epoch("us")).then(
            pl.lit("label_time: before the event")
        )
        judged = judged.with_columns(pl.coalesce(_REASON, early).alias(_REASON))
    again = judged.filter(pl.col(_REASON).is_null())
    first = again.unique("transaction_id", keep="first", maintain_order=True)
    for part in earlier:
        first = first.join(part.select("transaction_id"), on="transaction_id", how="anti")
    repeated = pl.col(_REASON).is_null() & ~pl.col(_ROW).is_in(first[_ROW].implode())
    twice = pl.when(repeated).then(pl.lit("transaction_id: given before"))
    return judged.with_columns(pl.coalesce(_REASON, twice).alias(_REASON))


def _rejected_rows(chunk: Chunk, judged: pl.DataFrame, mapping: FileMapping) -> pl.DataFrame:
    wrong = judged.filter(pl.col(_REASON).is_not_null())
    rows = chunk.rows[wrong[_ROW]]
    reasons = wrong[_REASON].to_list()
    raw = list(rows.iter_rows(named=True))
    sources = [mapping.source_of(reason.partition(":")[0]) for reason in reasons]
    return pl.DataFrame(
        {
            "row_number": chunk.row_number.gather(wrong[_ROW]),
            "reason": reasons,
            "value": [None if source is None else str(row[source]) for row, source in zip(raw, sources, strict=True)],
            "raw": [json.dumps(row, default=str, ensure_ascii=False) for row in raw],
        },
        schema=QUARANTINE_SCHEMA,
    )


def _broken_lines(broken: Iterable[BrokenLine]) -> pl.DataFrame:
    rows = [
        (line.row_number, line.reason, None, json.dumps({"line": line.text}, ensure_ascii=False)) for line in broken
    ]
    return pl.DataFrame(rows, schema=QUARANTINE_SCHEMA, orient="row")


def _by_reason(rejects: pl.DataFrame) -> dict[str, int]:
    """Rows a reason, the most frequent first."""
    return dict(Counter(rejects["reason"].to_list()).most_common())


def _unusable(file: Path, rejects: pl.DataFrame, paths: RunPaths) -> IngestError:
    if not rejects.height:
        return IngestError(f"The file {str(file)!r} has a header but no rows.", fix="export the data again")
    kept = paths.root / FAILED_QUARANTINE
    table.write(rejects, kept)
    reason, count = next(iter(_by_reason(rejects).items()))
    value = rejects.filter(pl.col("reason") == reason)["value"][0]
    message = (
        f"None of the {rejects.height} rows of {str(file)!r} can be used; {count} for {reason!r}, first {value!r}."
    )
    return IngestError(message, fix=f"correct the mapping or the file; all rows with their reasons are in {kept}")
