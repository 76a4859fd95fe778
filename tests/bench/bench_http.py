"""Latency of a decision over HTTP, features included: open-loop arrivals from a process of their own.

    python -m tests.bench.bench_http --url http://127.0.0.1:8000 --rate 50 --seconds 60
    python -m tests.bench.bench_http --rate 50 --seconds 60        # makes a run and serves it first

Latency counts from the moment a request was due, so that a server that falls behind can't hide it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

import aiohttp
import numpy as np

from tests.bench.results import append

COLUMNS = (
    "at",
    "rate",
    "seconds",
    "requests",
    "failed",
    "p50_ms",
    "p90_ms",
    "p99_ms",
    "max_ms",
    "cpus",
    "load",
    "python",
)


def main() -> int:
    """Measure, print a table, append to the CSV and write the JSON."""
    options = _parser().parse_args()
    if options.url:
        rows = [_client(options.url, rate, options.seconds) for rate in options.rate]
    else:
        rows = _with_server(options)
    _print(rows)
    if options.out:
        _write(rows, options.out)
    return 0


def _with_server(options: argparse.Namespace) -> list[dict[str, object]]:
    from tests.served_run import make_run

    os.environ.setdefault("DEEPSEEK_RAY_API_KEY", "only-for-this-benchmark")
    with tempfile.TemporaryDirectory() as folder:
        make_run(Path(folder), customers=options.customers)
        command = [sys.executable, "-m", "serve_apps.risk", "--run", folder, "--port", str(options.port)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
            assert server.stdout is not None
            try:
                for line in server.stdout:
                    if line.startswith("serving"):
                        break
                url = f"http://127.0.0.1:{options.port}"
                _client(url, 20, 5)  # caches and branch predictors
                return [_in_own_process(url, rate, options.seconds) for rate in options.rate]
            finally:
                server.terminate()


def _in_own_process(url: str, rate: float, seconds: float) -> dict[str, object]:
    command = [sys.executable, "-m", "tests.bench.bench_http", "--url", url, "--rate", str(rate)]
    command += ["--seconds", str(seconds), "--print-json"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    result: dict[str, object] = json.loads(done.stdout)
    return result


def _client(url: str, rate: float, seconds: float) -> dict[str, object]:
    latencies, failed = asyncio.run(_load(url, rate, seconds))
    p50, p90, p99 = np.percentile(latencies, [50, 90, 99]).round(3)
    values = (
        datetime.now(UTC).isoformat(timespec="seconds"), rate, seconds, len(latencies), failed, p50, p90, p99,
        round(max(latencies), 3), os.cpu_count(), round(os.getloadavg()[0], 2), platform.python_version(),
    )  # fmt: skip
    return dict(zip(COLUMNS, values, strict=True))


async def _load(url: str, rate: float, seconds: float) -> tuple[list[float], int]:
    rng = random.Random(0)
    latencies: list[float] = []
    failures: list[str] = []
    headers = {"X-API-Key": os.environ["DEEPSEEK_RAY_API_KEY"]}
    async with aiohttp.ClientSession(url, headers=headers) as client:
        tasks = []
        start = time.perf_counter()
        due = start
        while due < start + seconds:
            due += rng.expovariate(rate)
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            # cards take turns: two payments of one card on two connections may overtake each other
            card = f"c{len(tasks) % 60}"
            tasks.append(asyncio.create_task(_one(client, card, rng, due, latencies, failures)))
        await asyncio.gather(*tasks)
    if failures:
        print(failures[0], file=sys.stderr)
    return latencies, len(failures)


async def _one(
    client: aiohttp.ClientSession,
    card: str,
    rng: random.Random,
    due: float,
    latencies: list[float],
    failures: list[str],
) -> None:
    number = time.time_ns()
    body = {
        "transaction_id": f"b{number}",
        "event_time": datetime.now(UTC).isoformat(),
        "card_id": card,
        "terminal_id": f"t{rng.randrange(120)}",
        "device_id": f"d{rng.randrange(60)}",
        "amount_cents": rng.randrange(100, 30_000),
        "channel": "online",
        "country": "DE",
    }
    async with client.post("/v1/risk/score", json=body) as answer:
        text = await answer.text()
    latencies.append((time.perf_counter() - due) * 1e3)
    if answer.status != 200:
        failures.append(text)


def _print(rows: list[dict[str, object]]) -> None:
    if "--print-json" in sys.argv:
        print(json.dumps(rows[0], default=float))
        return
    shown = [name for name in COLUMNS if name not in ("at", "python")]
    print("  ".join(f"{name:>9}" for name in shown))
    for row in rows:
        print("  ".join(f"{row[name]!s:>9}" for name in shown))


def _write(rows: list[dict[str, object]], out: Path) -> None:
    append(rows, COLUMNS, out)
    text = json.dumps({"http_p50_ms": rows[0]["p50_ms"], "http_p99_ms": rows[0]["p99_ms"], "rows": rows}, default=float)
    out.with_suffix(".json").write_text(text + "\n", encoding="utf-8")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Latency of a decision over HTTP.")
    parser.add_argument("--url", help="a running service; its key in DEEPSEEK_RAY_API_KEY")
    parser.add_argument("--rate", type=float, nargs="+", default=[50.0], help="requests a second, Poisson arrivals")
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--customers", type=int, default=60)
    parser.add_argument("--port", type=int, default=18_400)
    parser.add_argument("--out", type=Path, help="CSV to append to; JSON beside it")
    parser.add_argument("--print-json", action="store_true", help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
