"""Figures of a benchmark, kept: rows are added to a CSV, never written over others."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping, Sequence
from pathlib import Path


def append(rows: Sequence[Mapping[str, object]], columns: Sequence[str], target: Path) -> None:
    """Add rows to a CSV, with a header where the file is new.

    Raises:
        ValueError: the file has other columns.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = not target.exists()
    if not fresh:
        with target.open(newline="", encoding="utf-8") as file:
            found = next(csv.reader(file), [])
        if found != list(columns):
            raise ValueError(f"{target} has the columns {found}, not {list(columns)}: choose another file")
    with target.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        if fresh:
            writer.writeheader()
        writer.writerows(rows)


def commit() -> str:
    """Commit of the code; BENCH_COMMIT where it was copied without its history, or where MLflow is not installed."""
    if os.environ.get("BENCH_COMMIT"):
        return os.environ["BENCH_COMMIT"]
    try:
        from deepseek_ray.registry.tracking import git_commit
    except ImportError:
        return "unknown"
    return git_commit()
