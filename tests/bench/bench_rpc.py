"""Calls over gRPC and over HTTP to one replica on loopback: ``python -m tests.bench.bench_rpc``.

Serves a small risk model with ``deepseek-ray serve``, calls it with ``deepseek_ray.client.Client`` over either way in
turns, and prints the median over the rounds.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from deepseek_ray.channels import Channel
from deepseek_ray.client import Client
from tests.unit.model_parts import risk_model

KEY = "a-key-for-the-benchmark-only"
BODY = b'{"records":[{"amount":1.5,"count 1d":2}]}'
METHOD = "models.fraud.predict"


def main() -> int:
    """Print p50 and p99 of a lone caller and the rate of several threads."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--calls", type=int, default=400)
    parser.add_argument("--threads", type=int, default=8)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = risk_model().save_pretrained(Path(folder) / "fraud")
        command = [sys.executable, "-m", "deepseek_ray.cli", "serve", str(model), "--port", "0"]
        environment = os.environ | {"DEEPSEEK_RAY_API_KEY": KEY}
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as server:
            try:
                assert server.stdout is not None
                line = next(line for line in server.stdout if line.startswith("serving "))
                _compare(re.findall(r"http://(\S+?),", line)[0], options)
            finally:
                server.terminate()
    return 0


def _compare(address: str, options: argparse.Namespace) -> None:
    with Client(address, api_key=KEY, timeout_s=10) as client:
        assert client._rpc is not None
        assert client._http is not None
        ways: dict[str, Channel] = {"gRPC": client._rpc, "HTTP": client._http}
        found: dict[str, list[tuple[float, float, float]]] = {way: [] for way in ways}
        for _ in range(options.rounds):
            for way, channel in ways.items():
                found[way].append((*_alone(channel, options.calls), _together(channel, options.threads)))
    for way, rounds in found.items():
        p50, p99, rate = (statistics.median(column) for column in zip(*rounds, strict=True))
        print(f"{way}  p50 {p50:.2f} ms  p99 {p99:.2f} ms  {rate:,.0f} calls/s with {options.threads} threads")


def _alone(channel: Channel, calls: int) -> tuple[float, float]:
    times_ms = []
    for number in range(calls + 50):
        start = time.perf_counter()
        channel.send(METHOD, BODY, 10)
        if number >= 50:
            times_ms.append((time.perf_counter() - start) * 1e3)
    cuts = statistics.quantiles(times_ms, n=100)
    return cuts[49], cuts[98]


def _together(channel: Channel, threads: int, duration_s: float = 2.0) -> float:
    end = time.perf_counter() + duration_s
    counts = [0] * threads

    def work(number: int) -> None:
        while time.perf_counter() < end:
            channel.send(METHOD, BODY, 10)
            counts[number] += 1

    workers = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return sum(counts) / duration_s


if __name__ == "__main__":
    sys.exit(main())
