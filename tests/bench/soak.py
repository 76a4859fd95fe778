"""A long run at a share of the service's capacity: is every request answered, does memory stay flat.

    python -m tests.bench.soak --minutes 30

The first fifth warms up (caches fill); memory is the replica's, and flat is within 5 % over the rest.
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

from tests.bench.results import append
from tests.bench.serving.load import KEY_VARIABLE, start_trace, throughput
from tests.bench.serving.providers import Provider

COLUMNS = ("at", "minutes", "rate", "requests", "failed", "p50_ms", "p99_ms", "rss_mib", "growth", "flat")
WARM_UP = 0.2
FLAT = 0.05


def main() -> int:
    """Run, print and keep the figures; 1 when a request failed or memory grew."""
    options = _parser().parse_args()
    os.environ.setdefault(KEY_VARIABLE, "only-for-this-benchmark")
    from tests.served_run import make_run

    with tempfile.TemporaryDirectory() as folder:
        make_run(Path(folder) / "run")
        command = [sys.executable, "-m", "serve_apps.risk", "--run", f"{folder}/run", "--port", "{port}"]
        provider = Provider("soak", command, "/v1/risk/score", "transaction")
        provider.start(Path(folder) / "log")
        try:
            provider.wait()
            row = _soak(provider, options.minutes, options.share)
        finally:
            provider.stop()
    print("  ".join(f"{name}={value}" for name, value in row.items()))
    if options.out:
        append([row], COLUMNS, options.out)
    return int(bool(row["failed"]) or not row["flat"])


def _soak(provider: Provider, minutes: float, share: float) -> dict[str, object]:
    rate = share * throughput(provider.url, provider.body, 16, 5.0).rps
    seconds = 60 * minutes
    wait = start_trace(provider.url, provider.body, f"{rate:g}x{seconds:g}")
    memory: list[int] = []
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        memory.append(provider.replica().memory_info().rss)
        time.sleep(min(5.0, seconds / 50))
    trace = wait()
    settled = memory[int(WARM_UP * len(memory)) :]
    tenth = max(1, len(settled) // 10)
    growth = float(np.median(settled[-tenth:]) / np.median(settled[:tenth]) - 1)
    p50, p99 = np.percentile(trace.latency_ms, [50, 99]).round(2)
    values = (
        datetime.now(UTC).isoformat(timespec="seconds"), minutes, round(rate, 1), len(trace.due_s), trace.failed,
        float(p50), float(p99), round(settled[-1] / 2**20, 1), round(growth, 4), growth <= FLAT,
    )  # fmt: skip
    return dict(zip(COLUMNS, values, strict=True))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="A long run under load.")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--share", type=float, default=0.7, help="of the throughput at 16 connections")
    parser.add_argument("--out", type=Path, help="CSV to append to")
    return parser


if __name__ == "__main__":
    sys.exit(main())
