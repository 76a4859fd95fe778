"""From a batch of labels to the new version answering: seconds, on this machine, with the service on it too.

python -m tests.bench.bench_update --run runs/mine --labels 1000 --out tests/bench/update.csv

The run must be trained and warmed, and not served yet. Ten held-out days are served, then the labels are posted, then
``deepseek-ray update`` runs. The clock starts with the first label sent and stops when the service answers with the new
version. The gate's bounds are wide: what is measured is time.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import secrets
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import polars as pl

from deepseek_ray.client import RiskClient
from deepseek_ray.data import table
from deepseek_ray.data.events import DAY_US
from deepseek_ray.data.periods import periods
from deepseek_ray.online.playback import Label, Outcome, send_labels, to_transactions
from deepseek_ray.paths import RunPaths
from deepseek_ray.settings import stored
from serve_apps.ingress import free_port
from tests.bench.results import append

BATCH = 200
WIDE = ("max_average_precision_drop=1", "max_cp100_drop=1", "max_calibration_error=1", "max_forgetting=1",
        "max_p99_ms=10000", "max_label_shift=1000")  # fmt: skip


async def wait_until_ready(url: str, server: subprocess.Popen[bytes]) -> None:
    """Until the service answers."""
    import httpx

    async with httpx.AsyncClient() as client:
        for _ in range(600):
            try:
                if (await client.get(f"{url}/readyz")).status_code == 200:
                    return
            except httpx.HTTPError:
                pass
            if server.poll() is not None:
                raise SystemExit("the service has ended")
            await asyncio.sleep(0.2)
    raise SystemExit("the service did not become ready")


async def measure(paths: RunPaths, url: str, num_labels: int, days: int, flags: list[str]) -> dict[str, Any]:
    """Serve, label, update."""
    config = stored(paths)
    assert config is not None
    transactions = table.read(paths.transactions)
    start_us = periods(transactions, config.data).replay.start_us
    rows = transactions.filter(pl.col("order_us").is_between(start_us, start_us + days * DAY_US, closed="left"))
    outcome = Outcome()
    async with RiskClient(url) as client:
        records = list(to_transactions(rows))
        for first in range(0, len(records), BATCH):
            for made in await client.score(records[first : first + BATCH]):
                outcome.predictions[made.transaction_id] = made.prediction_id
        mature_us = start_us + round((days - config.data.label_delay_days) * DAY_US)
        ready = rows.filter(pl.col("order_us") < mature_us).sort("is_fraud", descending=True).head(num_labels)
        last_us = int(rows["order_us"].max())  # type: ignore[arg-type]
        pairs = zip(ready["transaction_id"], ready["is_fraud"], strict=True)
        labels = [Label(last_us, name, bool(fraud)) for name, fraud in pairs]
        begin = time.perf_counter()
        await send_labels(client, labels, outcome)
        sent = time.perf_counter() - begin
    assert not outcome.failures, outcome.failures[:3]
    command = [sys.executable, "-m", "pipelines.risk.update", f"--run={paths.root}", f"--url={url}", *flags]
    subprocess.run(command, check=True)
    whole = time.perf_counter() - begin
    return {"served": len(records), "labels": outcome.feedback, "frauds": int(ready["is_fraud"].sum()),
            "seconds_to_send": round(sent, 2), "seconds_label_to_live": round(whole, 2)}  # fmt: skip


def main() -> None:
    """Measure once and add a line to the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--labels", type=int, default=1_000)
    parser.add_argument("--days", type=int, default=10)
    parser.add_argument("--strategy", default="replay")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    paths, port = RunPaths(options.run.resolve()), free_port()
    os.environ.setdefault("DEEPSEEK_RAY_API_KEY", secrets.token_urlsafe(24))
    flags = [f"--set=gate.{one}" for one in WIDE] + [f"--set=update.strategy={options.strategy}"]
    server = subprocess.Popen([sys.executable, "-m", "serve_apps.risk", f"--run={paths.root}", f"--port={port}"])
    url = f"http://127.0.0.1:{port}"
    try:
        asyncio.run(wait_until_ready(url, server))
        line = {"strategy": options.strategy, **asyncio.run(measure(paths, url, options.labels, options.days, flags))}
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(60)
    line |= {"cores": os.cpu_count(), "load_1m": round(os.getloadavg()[0], 1)}
    print(line)
    if options.out:
        append([line], list(line), options.out)


if __name__ == "__main__":
    main()
