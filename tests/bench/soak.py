"""A long run at a share of the service's capacity: is every request answered, does memory stay flat.

    python -m tests.bench.soak --minutes 30

Cards are many enough that most are not in memory when they come, as where a service runs for long. The service is
warmed up until what it keeps in memory is full, and its capacity is measured then. Memory is the replica's; flat is
within 5 % from the first tenth of the run to the last.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from tqdm import tqdm

from tests.bench.results import append
from tests.bench.serving.load import KEY_VARIABLE, Trace, start_trace, throughput
from tests.bench.serving.providers import Provider

COLUMNS = (
    "at", "minutes", "cards", "capacity", "rate", "requests", "failed", "p50_ms", "p99_ms", "rss_mib", "growth", "flat",
)  # fmt: skip
FLAT = 0.05
CONNECTIONS = 16


def main() -> int:
    """Run, print and keep the figures; 1 when a request failed or memory grew."""
    options = _parser().parse_args()
    os.environ.setdefault(KEY_VARIABLE, "only-for-this-benchmark")
    from tests.served_run import make_run

    with tempfile.TemporaryDirectory() as folder:
        make_run(Path(folder) / "run")
        command = [sys.executable, "-m", "serve_apps.risk", "--run", f"{folder}/run", "--port", "{port}"]
        provider = Provider("soak", command, "/v1/risk/score", f"transaction:{options.cards}")
        provider.start(Path(folder) / "log")
        try:
            provider.wait()
            row = _soak(provider, options)
        finally:
            provider.stop()
    print("  ".join(f"{name}={value}" for name, value in row.items()))
    if options.out:
        append([row], COLUMNS, options.out)
    return int(bool(row["failed"]) or not row["flat"])


def _soak(provider: Provider, options: argparse.Namespace) -> dict[str, object]:
    throughput(provider.url, provider.body, CONNECTIONS, 60 * options.warm_up)
    capacity = throughput(provider.url, provider.body, CONNECTIONS, 10.0).rps
    rate, seconds = options.share * capacity, 60 * options.minutes
    print(f"{capacity:.0f} requests/s over {CONNECTIONS} connections; now {rate:.0f}/s for {options.minutes:g} min")
    wait = start_trace(provider.url, provider.body, f"{rate:g}x{seconds:g}")
    memory = _watch(provider, seconds)
    trace = wait()
    _print_minutes(trace, memory)
    tenth = max(1, len(memory) // 10)
    growth = float(np.median(memory[-tenth:, 1]) / np.median(memory[:tenth, 1]) - 1)
    p50, p99 = np.percentile(trace.latency_ms, [50, 99]).round(2)
    values = (
        datetime.now(UTC).isoformat(timespec="seconds"), options.minutes, options.cards, round(capacity, 1),
        round(rate, 1), len(trace.due_s), trace.failed, float(p50), float(p99), round(memory[-1, 1], 1),
        round(growth, 4), growth <= FLAT,
    )  # fmt: skip
    return dict(zip(COLUMNS, values, strict=True))


def _watch(provider: Provider, seconds: float) -> np.ndarray:
    """Rows (s since the start, MiB that the replica holds) for so long."""
    rows, start = [], time.monotonic()
    with tqdm(total=round(seconds), unit="s", desc="soak") as bar:
        while (passed := time.monotonic() - start) < seconds:
            bar.update(round(passed) - bar.n)
            rows.append((passed, provider.replica().memory_info().rss / 2**20))
            time.sleep(min(5.0, seconds / 50))
    return np.array(rows)


def _print_minutes(trace: Trace, memory: np.ndarray) -> None:
    print("minute  requests  not 2xx (status: times)  p50 ms  p99 ms  replica MiB")
    for minute in range(round(memory[-1, 0] // 60) + 1):
        of_it = trace.due_s // 60 == minute
        if not of_it.any():
            continue
        status, times = np.unique(trace.status[of_it], return_counts=True)
        bad = {int(s): int(n) for s, n in zip(status, times, strict=True) if not 200 <= s <= 299}
        p50, p99 = np.percentile(trace.latency_ms[of_it], [50, 99])
        held = np.median(memory[memory[:, 0] // 60 == minute, 1])
        print(f"{minute:6d}  {of_it.sum():8d}  {bad or 0!s:>23}  {p50:6.1f}  {p99:6.1f}  {held:11.1f}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="A long run under load.")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--warm-up", type=float, default=3.0, help="minutes under full load before it")
    parser.add_argument("--share", type=float, default=0.7, help="of the throughput at 16 connections")
    parser.add_argument("--cards", type=int, default=200_000, help="cards and devices, and a fifth as many terminals")
    parser.add_argument("--out", type=Path, help="CSV to append to")
    return parser


if __name__ == "__main__":
    sys.exit(main())
