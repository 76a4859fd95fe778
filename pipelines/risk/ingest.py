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

from deepseek_ray.cli import add_settings, guarded, settings_of
from deepseek_ray.config import Config
from deepseek_ray.data import source, table
from deepseek_ray.data.ingest import IngestResult, ingest
from deepseek_ray.data.mapping import load_mapping
from deepseek_ray.errors import ConfigError
from deepseek_ray.paths import RunPaths

HANDBOOK_VARIABLE = "DEEPSEEK_RAY_HANDBOOK"


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line, ingest, print what became of the rows."""
    arguments = _parser().parse_args(argv)
    config, paths = settings_of(arguments)
    paths.create()
    if arguments.file is not None:
        _ingest_file(arguments.file, arguments.map, paths, config)
    else:
        _ingest_source(arguments, paths, config)
    return 0


def _ingest_file(file: Path, mapping_file: Path | None, paths: RunPaths, config: Config) -> None:
    mapping = None if mapping_file is None else load_mapping(mapping_file)
    result = ingest(file, mapping, paths, label_delay_days=config.data.label_delay_days)
    _print_result(result, paths)


def _ingest_source(arguments: argparse.Namespace, paths: RunPaths, config: Config) -> None:
    folder = arguments.data or os.environ.get(HANDBOOK_VARIABLE)
    if not arguments.synthetic and not folder:
        raise ConfigError("Nothing to ingest.", fix="name a FILE, or give --data DIR or --synthetic")
    chosen = source.SYNTHETIC if arguments.synthetic else str(folder)
    transactions = source.load(config.data.model_copy(update={"source": chosen}), config.seed)
    table.write(transactions, paths.transactions)
    paths.quarantine.unlink(missing_ok=True)
    frauds = transactions["is_fraud"].sum()
    print(f"{transactions.height} transactions, {frauds} frauds -> {paths.transactions}")
    print(f"digest {table.digest(transactions)}")


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
