"""Reading a user's file in chunks, losing no row: CSV line by line, parquet by batches."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TextIO

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from deepseek_ray.data.mapping import FileMapping, identity_mapping
from deepseek_ray.errors import IngestError

CHUNK_ROWS = 100_000
CSV_SUFFIXES = (".csv", ".tsv", ".txt")
PARQUET_SUFFIXES = (".parquet", ".pq")


@dataclass(frozen=True)
class BrokenLine:
    """A line of a CSV file that has no columns to look at."""

    row_number: int
    reason: str
    text: str


@dataclass(frozen=True)
class Chunk:
    """Some rows as they stand in the source.

    Attributes:
        rows: source columns; text for CSV.
        row_number: (n,) where each row stands: the line of a CSV file (its header is line 1), else the row from 1.
        broken: lines that are not rows.
    """

    rows: pl.DataFrame
    row_number: pl.Series
    broken: tuple[BrokenLine, ...] = ()


def read_chunks(
    file: Path, mapping: FileMapping | None, *, chunk_rows: int = CHUNK_ROWS
) -> Iterator[tuple[Chunk, FileMapping]]:
    """Yield the rows of a CSV or parquet file with the mapping in force (that of our own names when None).

    A line break always ends a CSV row, also inside quotes; blank lines are no rows.

    Raises:
        IngestError: the file is missing, of an unknown kind, unreadable or not in the encoding.
        SchemaError: a mapped column is missing.
    """
    if not file.is_file():
        raise IngestError(f"There is no file {str(file)!r}.", fix="check the path")
    if file.stat().st_size == 0:
        raise IngestError(f"The file {str(file)!r} is empty.", fix="export the data again")
    suffix = file.suffix.lower()
    if suffix in CSV_SUFFIXES:
        yield from _read_csv(file, mapping, chunk_rows)
    elif suffix in PARQUET_SUFFIXES:
        yield from _read_parquet(file, mapping, chunk_rows)
    else:
        kinds = ", ".join(CSV_SUFFIXES + PARQUET_SUFFIXES)
        raise IngestError(f"The file {str(file)!r} has the suffix {suffix!r}.", fix=f"use one of {kinds}")


def _read_csv(file: Path, mapping: FileMapping | None, chunk_rows: int) -> Iterator[tuple[Chunk, FileMapping]]:
    encoding = "utf-8" if mapping is None else mapping.encoding
    encoding = "utf-8-sig" if encoding.lower().replace("_", "-") in ("utf-8", "utf8") else encoding
    delimiter = "," if mapping is None else mapping.delimiter
    with file.open(encoding=encoding, newline=None) as stream:
        header = _read_header(stream, file, encoding, delimiter)
        mapping = mapping or identity_mapping(header, file)
        mapping.check_header(header, file)
        line_number = 1
        while lines := _next_lines(stream, chunk_rows, file, encoding, line_number):
            yield _parse_lines(lines, header, line_number + 1, delimiter), mapping
            line_number += len(lines)


def _read_header(stream: TextIO, file: Path, encoding: str, delimiter: str) -> list[str]:
    lines = _next_lines(stream, 1, file, encoding, 0)
    header = next(csv.reader(lines, delimiter=delimiter), [])
    if not header:
        raise IngestError(f"The file {str(file)!r} has no header in its first line.", fix="name the columns there")
    return [name.strip() for name in header]


def _next_lines(stream: TextIO, count: int, file: Path, encoding: str, line_number: int) -> list[str]:
    try:
        return list(islice(stream, count))
    except UnicodeError as error:
        message = f"The file {str(file)!r} is not {encoding.removesuffix('-sig')} (after line {line_number}: {error})."
        raise IngestError(message, fix="set 'encoding' in the mapping, for example latin-1 or utf-16") from error


def _parse_lines(lines: list[str], header: list[str], first_line: int, delimiter: str) -> Chunk:
    good: list[list[str]] = []
    numbers: list[int] = []
    broken: list[BrokenLine] = []
    for number, (line, cells) in enumerate(zip(lines, _split(lines, delimiter), strict=True), start=first_line):
        if isinstance(cells, list) and len(cells) == len(header):
            good.append(cells)
            numbers.append(number)
        elif line.strip():
            reason = cells if isinstance(cells, str) else f"row: {len(cells)} cells, expected {len(header)}"
            broken.append(BrokenLine(number, reason, line.rstrip("\n")))
    columns = zip(*good, strict=True) if good else ([] for _ in header)
    rows = pl.DataFrame({name: pl.Series(cells, dtype=pl.String) for name, cells in zip(header, columns, strict=True)})
    return Chunk(rows, pl.Series(numbers, dtype=pl.Int64), tuple(broken))


def _split(lines: list[str], delimiter: str) -> list[list[str] | str]:
    """Cells of each line, or why it has none."""
    return [_split_line(line, delimiter) if '"' in line else line.rstrip("\n").split(delimiter) for line in lines]


def _split_line(line: str, delimiter: str) -> list[str] | str:
    try:
        return next(csv.reader([line.rstrip("\n")], delimiter=delimiter, strict=True), [])
    except csv.Error as error:
        return f"row: {error}"


def _read_parquet(file: Path, mapping: FileMapping | None, chunk_rows: int) -> Iterator[tuple[Chunk, FileMapping]]:
    try:
        source = pq.ParquetFile(file)
        header = list(source.schema_arrow.names)
        mapping = mapping or identity_mapping(header, file)
        mapping.check_header(header, file)
        start = 1
        for batch in source.iter_batches(batch_size=chunk_rows):
            rows = pl.DataFrame(pa.Table.from_batches([batch]))
            yield Chunk(rows, pl.int_range(start, start + rows.height, eager=True)), mapping
            start += rows.height
    except (pa.ArrowException, OSError) as error:
        message = f"The file {str(file)!r} is not readable parquet: {error}."
        raise IngestError(message, fix="export the data again, or name a CSV file .csv") from error
