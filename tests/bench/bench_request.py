"""What a request costs around the decision itself: key, parsing, checks, answer — in this process, without a socket.

    python -m tests.bench.bench_request --seconds 2
    python -m tests.bench.bench_request --records 100          # a body of many transactions

The batcher answers at once with ready-made predictions, so the figures are the event loop's work a request.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from deepseek_ray.data.events import Prediction, Reason
from deepseek_ray.serving import wire
from deepseek_ray.serving.commands import ScoreCommand, ScoreResult
from tests.unit.serving_parts import KEY, Rig, body, event

REASONS = [Reason(feature=f"card_amount_{n}d", value=1.5 * n, contribution=0.1 * n) for n in range(1, 6)]


class Instant:
    """A batcher whose work is done before it is asked."""

    def __init__(self, records: int) -> None:
        prediction = Prediction(
            prediction_id="p064bf535af1000f269e8e7ae4a", transaction_id="t1", probability=0.0123, decision="approve",
            threshold=0.4, model_name="risk", model_version="1", feature_service="risk_default_v1", cold=["card"],
            reasons=REASONS, latency_ms=3.1,
        )  # fmt: skip
        self._result = ScoreResult([prediction] * records, 0)

    async def submit(self, command: ScoreCommand, **options: Any) -> ScoreResult:
        return self._result


def main() -> int:
    """Measure, print a table, and write the JSON where one is asked for."""
    options = _parser().parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rig = Rig(Path(folder), max_transactions=10_000)
        try:
            figures = _measure(rig, options.records, options.seconds, options.rounds)
        finally:
            rig.close()
    print(f"microseconds a request of {options.records} record(s), median of {options.rounds} rounds")
    for name, value in figures.items():
        print(f"{name:>10} {value:10.1f}")
    if options.json:
        options.json.write_text(json.dumps({"records": options.records, "cpus": os.cpu_count(), **figures}) + "\n")
    return 0


def _measure(rig: Rig, records: int, seconds: float, rounds: int) -> dict[str, float]:
    service = rig.service(batcher=Instant(records), max_body_bytes=4 << 20)
    app = rig.make_app(service)
    content = _content(records)
    headers = [
        (b"host", b"127.0.0.1:8000"), (b"user-agent", b"bench"), (b"accept", b"*/*"), (b"x-api-key", KEY.encode()),
        (b"content-type", b"application/json"), (b"content-length", str(len(content)).encode()),
    ]  # fmt: skip
    scope = {"type": "http", "method": "POST", "path": "/v1/risk/score", "headers": headers}

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": content, "more_body": False}

    async def send(message: Any) -> None:
        assert message.get("status", 200) == 200

    async def whole(number: int) -> None:
        for _ in range(number):
            await app(scope, receive, send)

    def parse(number: int) -> None:
        for _ in range(number):
            wire.parse_transactions(content, service.limits, service.now_us())

    per_round = seconds / rounds
    return {
        "whole": _median(lambda number: asyncio.run(whole(number)), per_round, rounds),
        "parse": _median(parse, per_round, rounds),
    }


def _median(work: Callable[[int], None], seconds: float, rounds: int) -> float:
    work(20)
    start = time.perf_counter()
    work(50)
    number = max(50, int(50 * seconds / (time.perf_counter() - start)))
    times = []
    for _ in range(rounds):
        start = time.process_time()  # of this process: others on the machine do not count
        work(number)
        times.append((time.process_time() - start) / number * 1e6)
    return round(statistics.median(times), 1)


def _content(records: int) -> bytes:
    events = [body(event(n, card=f"c{n}", device_id="phone-1", country="DE", channel="online")) for n in range(records)]
    return json.dumps(events[0] if records == 1 else {"transactions": events}).encode()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Cost of a request around the decision.")
    parser.add_argument("--records", type=int, default=1, help="transactions a request")
    parser.add_argument("--seconds", type=float, default=2.0, help="measuring time of each figure")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, help="write the figures here")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
