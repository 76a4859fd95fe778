"""Rows a second of both batch engines on the same data in the same run: this process, and Ray Data over partitions.

    python -m tests.bench.bench_features
    python -m tests.bench.bench_features --customers 4000 --vectors default wide --repeats 5

Both read the same parquet and end with vectors in the offline store's layout on disk. Runs take turns, so that what
else the machine does hits both; the cluster is up and warm before the clock starts.
"""

from __future__ import annotations

import argparse
import os
import platform
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import numpy as np
import polars as pl

from deepseek_ray import cluster
from deepseek_ray.config import DataConfig
from deepseek_ray.data import batch_engine, engine, offline_store, ray_engine, transactions, windows
from deepseek_ray.data.windows import VectorSpec
from tests.bench.results import append

DELAY_DAYS, SEQUENCE_LEN = 7, 16
COLUMNS = (
    "at", "vector", "engine", "rows", "partitions", "repeats", "median_s", "min_s", "max_s", "rows_per_s",
    "ratio", "cpus", "load", "python",
)  # fmt: skip
"""``ratio`` is the engine's rows a second over the local engine's."""


def main() -> int:
    """Measure, print a table, append to the CSV."""
    options = _parser().parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder, cluster.local_cluster(1):
        source = Path(folder) / "transactions.parquet"
        config = DataConfig(num_customers=options.customers, num_terminals=2 * options.customers)
        transactions.generate(config, seed=0).write_parquet(source)
        for vector in options.vectors:
            rows += _compare(source, windows.load().vector(vector), options.partitions, options.repeats)
    _print(rows)
    if options.out:
        append(rows, COLUMNS, options.out)
    return 0


def _compare(source: Path, spec: VectorSpec, partitions: int, repeats: int) -> list[dict[str, object]]:
    count = engine.num_rows(source)
    need = count * engine.row_bytes(spec, SEQUENCE_LEN)
    parts = partitions or max(cluster.num_cpus(), -(-need // engine.PARTITION_BYTES))
    engines = {engine.LOCAL: partial(_local, source, spec), engine.RAY: partial(_ray, source, spec, parts)}
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    for repeat in range(repeats + 1):
        for name, run in engines.items():
            taken = _timed(run, count)
            if repeat:  # the first one imports and warms
                seconds[name].append(taken)
    medians = {name: float(np.median(times)) for name, times in seconds.items()}
    made = []
    for name, times in seconds.items():
        values = (
            datetime.now(UTC).isoformat(timespec="seconds"), spec.name, name, count, parts if name == engine.RAY else 1,
            repeats, round(medians[name], 2), round(min(times), 2), round(max(times), 2), round(count / medians[name]),
            round(medians[engine.LOCAL] / medians[name], 3), cluster.num_cpus(), round(os.getloadavg()[0], 2),
            platform.python_version(),
        )  # fmt: skip
        made.append(dict(zip(COLUMNS, values, strict=True)))
    return made


def _timed(run: Callable[[Path], None], count: int) -> float:
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        run(Path(folder))
        taken = time.perf_counter() - start
        assert engine.num_rows(Path(folder)) == count
    return taken


def _local(source: Path, spec: VectorSpec, folder: Path) -> None:
    history = pl.read_parquet(source)
    table = batch_engine.compute(history, spec, label_delay_days=DELAY_DAYS, sequence_len=SEQUENCE_LEN)
    offline_store.append(table, folder)


def _ray(source: Path, spec: VectorSpec, parts: int, folder: Path) -> None:
    ray_engine.write(source, spec, folder, label_delay_days=DELAY_DAYS, sequence_len=SEQUENCE_LEN, num_partitions=parts)


def _print(rows: list[dict[str, object]]) -> None:
    shown = [name for name in COLUMNS if name not in ("at", "python")]
    print("  ".join(f"{name:>10}" for name in shown))
    for row in rows:
        print("  ".join(f"{row[name]!s:>10}" for name in shown))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Rows a second of the batch engines.")
    parser.add_argument("--customers", type=int, default=1_000, help="of 120 days; 1,000 make about 230,000 rows")
    parser.add_argument("--vectors", nargs="+", default=["default"], choices=list(windows.load().vectors))
    parser.add_argument("--partitions", type=int, default=0, help="0: what the setting would take")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="CSV to append to")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
