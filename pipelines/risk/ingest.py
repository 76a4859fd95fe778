"""Read transactions into a run: a CSV or parquet file, a handbook folder, or the generator.

python -m pipelines.risk.ingest payments.csv --map mapping.yaml --run runs/mine
python -m pipelines.risk.ingest --data handbook-folder --run runs/mine
python -m pipelines.risk.ingest --synthetic --run runs/mine
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import polars as pl

from deepseek_ray import settings
from deepseek_ray.cli import add_settings, guarded, settings_of
from deepseek_ray.config import Config
from deepseek_ray.data import source, table
from deepseek_ray.data.ingest import IngestResult, ingest
from deepseek_ray.data.mapping import load_mapping
from deepseek_ray.errors import ConfigError, IngestError
from deepseek_ray.paths import RunPaths, write_stage

HANDBOOK_VARIABLE = "DEEPSEEK_RAY_HANDBOOK"


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line, ingest, print what became of the rows."""
    arguments = _parser().parse_args(argv)
    config, paths = settings_of(arguments, "make")
    if paths.used:  # live states and decisions would belong to another history
        raise IngestError(f"The run {str(paths.root)!r} has been {paths.used} already.", fix="give a new folder, --run")
    config.data.source = _source(arguments)
    paths.create()
    if arguments.file is not None:
        quarantined = _ingest_file(arguments.file, arguments.map, paths, config)
    else:
        quarantined = _ingest_source(paths, config)
    settings.store(paths, config)
    write_stage(paths, "data", describe(paths, config, quarantined))
    print(f"Next: deepseek-ray train --run {paths.root}")
    return 0


def _source(arguments: argparse.Namespace) -> str:
    """What to read: a file, a handbook folder, or the generator."""
    if arguments.synthetic:
        return source.SYNTHETIC
    named = arguments.file or arguments.data or os.environ.get(HANDBOOK_VARIABLE)
    if not named:
        raise ConfigError("Nothing to ingest.", fix="name a FILE, or give --data DIR or --synthetic")
    return str(named)


def _ingest_file(file: Path, mapping_file: Path | None, paths: RunPaths, config: Config) -> int:
    mapping = None if mapping_file is None else load_mapping(mapping_file)
    result = ingest(file, mapping, paths, label_delay_days=config.data.label_delay_days)
    _print_result(result, paths)
    return result.quarantined


def _ingest_source(paths: RunPaths, config: Config) -> int:
    transactions = source.load(config.data, config.seed)
    table.write(transactions, paths.transactions)
    paths.quarantine.unlink(missing_ok=True)
    print(f"{transactions.height} transactions, {transactions['is_fraud'].sum()} frauds -> {paths.transactions}")
    print(f"digest {table.digest(transactions)}")
    return 0


def describe(paths: RunPaths, config: Config, quarantined: int) -> dict[str, object]:
    """The run's table in numbers, for the report."""
    rows = table.read(paths.transactions)
    day = pl.col("event_time").dt.date().cast(pl.String).alias("day")
    days = rows.group_by(day).agg(transactions=pl.len(), frauds=pl.col("is_fraud").sum()).sort("day").to_dicts()
    kinds = rows.filter(pl.col("is_fraud") == 1).group_by(day, "fraud_scenario").len()
    for entry in days:
        of_day = kinds.filter(pl.col("day") == entry["day"])
        entry["by_scenario"] = {str(kind): count for _, kind, count in of_day.iter_rows()}
    frauds = int(rows["is_fraud"].sum())
    return {
        "source": config.data.source, "num_transactions": rows.height, "num_frauds": frauds, "days": days,
        "fraud_rate": frauds / rows.height, "data_digest": table.digest(rows), "quarantined": quarantined,
    }  # fmt: skip


def _print_result(result: IngestResult, paths: RunPaths) -> None:
    print(f"{result.accepted} of {result.input_rows} rows accepted -> {paths.transactions}")
    print(f"{result.quarantined} rows quarantined -> {paths.quarantine}")
    for reason, count in result.by_reason.items():
        print(f"  {count:>8}  {reason}")
    if result.unused_columns:
        print(f"columns not used: {', '.join(result.unused_columns)}")
    print(f"digest {result.digest}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="deepseek-ray ingest", description="Read transactions into a run.")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("file", nargs="?", type=Path, help="CSV or parquet file")
    what.add_argument("--data", help=f"folder of handbook-shaped parquet (default: ${HANDBOOK_VARIABLE})")
    what.add_argument("--synthetic", action="store_true", help="use the generator")
    parser.add_argument("--map", type=Path, help="YAML mapping of the file's columns to our fields")
    add_settings(parser)
    return parser


if __name__ == "__main__":
    sys.exit(guarded(main))
