"""What every kernel uses on GPUs that are not here: registers, stack and shared memory, compiled ahead of time.

``python -m tests.bench.kernel_usage`` compiles the variants of each op in kernels/ and writes kernel_usage.csv, which
is committed, so that a regression shows. ``--check`` compares with it instead and exits with 1 where something got
worse; figures of another version of Triton are not compared. Runs without TRITON_INTERPRET, under which Triton compiles
nothing.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import os
import sys
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import triton

from deepseek_ray.kernels import aot

TABLE = Path(__file__).with_suffix(".csv")
COLUMNS = ("op", "label", "target", "registers", "stack_bytes", "shared_bytes", "triton")
MORE_REGISTERS = 16
FIX = "if that is meant, run `python -m tests.bench.kernel_usage` and commit tests/bench/kernel_usage.csv"

Key = tuple[str, str, str]
Row = dict[str, str]


def modules() -> list[str]:
    """Every module in kernels/ that lists variants."""
    folder = Path(aot.__file__).parent
    names = sorted(file.stem for file in folder.glob("*.py"))
    return [name for name in names if hasattr(_module(name), "aot_variants")]


def rows_of(module: str) -> list[Row]:
    """The variants of one module, compiled for their targets; what does not compile has no figures but its error."""
    return [_row(variant, target) for variant in _module(module).aot_variants() for target in variant.targets]


def measure() -> list[Row]:
    """All modules, one a process at a time on each core."""
    cores = len(os.sched_getaffinity(0))
    with ProcessPoolExecutor(cores, mp_context=get_context("spawn")) as pool:
        return [row for rows in pool.map(rows_of, modules()) for row in rows]


def complaints(found: Iterable[Row], committed: Iterable[Row]) -> list[str]:
    """What got worse, a line each, naming the kernel and the way out."""
    before = {_key(row): row for row in committed}
    seen: set[Key] = set()
    lines = []
    for row in found:
        name = " / ".join(_key(row))
        if _key(row) in seen:
            lines.append(f"{name} is listed twice: give one variant another label")
        elif row.get("error"):
            lines.append(f"{name} does not compile: {row['error']}")
        elif _key(row) not in before:
            lines.append(f"{name} is not in the table: run `python -m tests.bench.kernel_usage` and commit it")
        else:
            lines += [f"{name}: {worse}; {FIX}" for worse in _worse(row, before[_key(row)])]
        seen.add(_key(row))
    gone = before.keys() - seen
    return [*lines, *(f"{' / '.join(key)} is in the table and not in kernels/; {FIX}" for key in sorted(gone))]


def read() -> list[Row]:
    """The committed table."""
    with TABLE.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _worse(row: Row, old: Row) -> list[str]:
    if row["triton"] != old["triton"]:
        return []
    allowed = {"registers": MORE_REGISTERS, "stack_bytes": 0, "shared_bytes": 0}
    return [
        f"{name} grew from {old[name]} to {row[name]}"
        for name, more in allowed.items()
        if int(row[name]) > int(old[name]) + more
    ]


def _key(row: Row) -> Key:
    return row["op"], row["label"], row["target"]


def _module(name: str) -> object:
    return importlib.import_module(f"deepseek_ray.kernels.{name}")


def _row(variant: aot.Variant, target: str) -> Row:
    row = {"op": variant.op, "label": variant.label, "target": target, "triton": triton.__version__}
    try:
        usage = aot.compile_variant(variant, target)
    except Exception as error:  # of any kind: the compiler's, the assembler's, or ours; all are reported
        return {**row, "error": f"{type(error).__name__}: {error}".splitlines()[0]}
    return {**row, **{name: str(value) for name, value in vars(usage).items()}}


def main() -> int:
    """Write the table, or compare with it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare with the committed table, write nothing")
    arguments = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET"):
        print("unset TRITON_INTERPRET: nothing is compiled under it", file=sys.stderr)
        return 2
    found = measure()
    if arguments.check:
        lines = complaints(found, read())
    else:
        lines = complaints(found, found)
        with TABLE.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore", lineterminator="\n")
            writer.writeheader()
            writer.writerows(row for row in found if "error" not in row)
    print("\n".join(lines) or f"{len(found)} kernels compiled")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
