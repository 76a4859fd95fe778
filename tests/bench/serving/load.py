"""A load generator in a process of its own: ``wrk`` for throughput, a small asyncio client for arrivals on a schedule.

    python -m tests.bench.serving.load --url http://127.0.0.1:8000/v1/risk/score --body transaction --schedule 100x20

The client writes one line of JSON: lists of due times (s), latencies (ms, from the due time) and statuses.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import urlsplit

import httptools
import numpy as np

KEY_VARIABLE = "DEEPSEEK_RAY_API_KEY"
NUM_CARDS = 5_000
CARDS_A_TERMINAL = 5
TIMEOUT_S = 30.0


@dataclass(frozen=True)
class Throughput:
    """One closed-loop measurement; latencies in ms."""

    rps: float
    p50_ms: float
    p99_ms: float
    failed: int
    tool: str


@dataclass(frozen=True)
class Trace:
    """Requests of one open-loop run, in order of their due times.

    Attributes:
        due_s: since the start of the run.
        latency_ms: from the due time to the whole answer.
        status: HTTP status, 0 when the connection broke.
        start_s: when the run began, by the machine's monotonic clock (``time.perf_counter`` of any process).
    """

    due_s: np.ndarray
    latency_ms: np.ndarray
    status: np.ndarray
    start_s: float

    @property
    def failed(self) -> int:
        """Requests without an answer of the 2xx class."""
        return int(((self.status < 200) | (self.status > 299)).sum())


def throughput(url: str, body: str, connections: int, seconds: float) -> Throughput:
    """As many requests as the server takes over so many connections, each waiting for its answer."""
    if wrk := shutil.which("wrk"):
        return _wrk(wrk, url, body, connections, seconds)
    trace = start_trace(url, body, f"closed:{connections}x{seconds:g}")()
    p50, p99 = np.percentile(trace.latency_ms, [50, 99])
    return Throughput(len(trace.due_s) / seconds, float(p50), float(p99), trace.failed, "tests.bench.serving.load")


def start_trace(url: str, body: str, schedule: str) -> Callable[[], Trace]:
    """Start the client; call what is returned to wait for its figures.

    Args:
        schedule: ``RATExSECONDS,...`` for Poisson arrivals, ``closed:CONNECTIONSxSECONDS`` for a closed loop.
    """
    command = [sys.executable, "-m", "tests.bench.serving.load", "--url", url, "--body", body, "--schedule", schedule]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    def wait() -> Trace:
        out, _ = process.communicate()
        if process.returncode:
            raise RuntimeError(f"the load generator ended with {process.returncode}")
        found = json.loads(out)
        return Trace(
            np.array(found["due_s"]), np.array(found["latency_ms"]), np.array(found["status"]), found["start_s"]
        )

    return wait


_LUA = """
wrk.method = "POST"
wrk.headers["Content-Type"] = "application/json"
wrk.headers["X-API-Key"] = os.getenv("%(key)s")
local stamp = os.date("!%%Y-%%m-%%dT%%H:%%M:%%SZ")
local number, run = 0, "%(run)s"
math.randomseed(%(seed)d)
function request()
  %(make)s
  return wrk.format(nil, nil, nil, body)
end
function done(summary, latency, requests)
  local bad = summary.errors
  io.write(string.format("FIGURES %%d %%d %%d %%d %%d\\n", summary.requests, summary.duration,
    bad.connect + bad.read + bad.write + bad.timeout + bad.status, latency:percentile(50), latency:percentile(99)))
end
"""
_MAKE = {
    "vector": "local body = [==[%(body)s]==]",
    "transaction": (
        "number = number + 1\n"
        '  local body = string.format([[{"transaction_id":"%%s-%%d","event_time":"%%s","card_id":"c%%d",'
        '"terminal_id":"t%%d","device_id":"d%%d","amount_cents":%%d,"channel":"online","country":"DE"}]], '
        "run, number, stamp, math.random(%(cards)d), math.random(%(terminals)d), math.random(%(devices)d), "
        "math.random(30000))"
    ),
}


def _wrk(wrk: str, url: str, body: str, connections: int, seconds: float) -> Throughput:
    kind, _, detail = body.partition(":")
    text = Path(detail).read_text(encoding="utf-8") if kind == "vector" else ""
    run, cards = f"w{time.time_ns()}", _num_cards("" if kind == "vector" else detail)
    make = _MAKE[kind] % {"body": text, "cards": cards, "terminals": _num_terminals(cards), "devices": cards}
    with tempfile.NamedTemporaryFile("w", suffix=".lua") as script:
        script.write(_LUA % {"key": KEY_VARIABLE, "run": run, "seed": random.randrange(1 << 30), "make": make})
        script.flush()
        command = [wrk, "-t1", f"-c{connections}", f"-d{max(1, round(seconds))}s", "--timeout", f"{TIMEOUT_S:g}s"]
        done = subprocess.run([*command, "-s", script.name, url], check=True, capture_output=True, text=True)
    found = re.search(r"FIGURES (\d+) (\d+) (\d+) (\d+) (\d+)", done.stdout)
    assert found, done.stdout
    requests, micros, failed, p50, p99 = map(int, found.groups())
    return Throughput(requests / micros * 1e6, p50 / 1e3, p99 / 1e3, failed, "wrk")


class Connection(asyncio.Protocol):
    """One HTTP/1.1 connection that carries one request at a time."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._waiting: asyncio.Future[int] | None = None
        self._parser = httptools.HttpResponseParser(self)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        self._settle(0)

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_message_complete(self) -> None:
        """Called by the parser."""
        status = self._parser.get_status_code()
        self._parser = httptools.HttpResponseParser(self)
        self._settle(status)

    def _settle(self, status: int) -> None:
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(status)

    @property
    def usable(self) -> bool:
        """Whether the server has not closed it."""
        return self._transport is not None

    async def request(self, data: bytes) -> int:
        """Send a whole request, wait for the whole answer; its status, 0 when the connection broke."""
        if self._transport is None:
            return 0
        self._waiting = asyncio.get_running_loop().create_future()
        self._transport.write(data)
        return await asyncio.wait_for(self._waiting, TIMEOUT_S)


class Client:
    """Sends requests over as many connections as are open at once, and notes what became of them."""

    def __init__(self, url: str, body: str) -> None:
        parts = urlsplit(url)
        assert parts.hostname
        self._address = (parts.hostname, parts.port or 80)
        key = os.environ.get(KEY_VARIABLE, "")
        self._head = (
            f"POST {parts.path} HTTP/1.1\r\nHost: {parts.netloc}\r\nContent-Type: application/json\r\n"
            f"X-API-Key: {key}\r\nContent-Length: "
        ).encode()
        self._bodies = bodies(body)
        self._idle: list[Connection] = []
        self.rows: list[tuple[float, float, int]] = []
        self.start = 0.0

    async def send(self, due: float) -> None:
        """One request that was due at a time of ``time.perf_counter``."""
        body = next(self._bodies)
        try:
            connection = await self._connection()
            status = await connection.request(self._head + str(len(body)).encode() + b"\r\n\r\n" + body)
            if connection.usable:
                self._idle.append(connection)
        except (OSError, TimeoutError):
            status = 0
        self.rows.append((due - self.start, (time.perf_counter() - due) * 1e3, status))

    async def _connection(self) -> Connection:
        while self._idle:
            if (connection := self._idle.pop()).usable:
                return connection
        _, made = await asyncio.get_running_loop().create_connection(Connection, *self._address)
        return made

    async def open_loop(self, schedule: list[tuple[float, float]], seed: int = 0) -> None:
        """Poisson arrivals at one rate after the other, (requests/s, s) each."""
        rng = random.Random(seed)
        tasks: set[asyncio.Task[None]] = set()  # of requests on their way: a long run has millions that are done
        broken: list[BaseException] = []

        def done(task: asyncio.Task[None]) -> None:
            tasks.discard(task)
            if error := task.exception():
                broken.append(error)

        self.start = due = end = time.perf_counter()
        for rate, seconds in schedule:
            end += seconds
            while (due := due + rng.expovariate(rate)) < end:
                if (ahead := due - time.perf_counter()) > 0:
                    await asyncio.sleep(ahead)
                task = asyncio.create_task(self.send(due))
                tasks.add(task)
                task.add_done_callback(done)
            due = end
        await asyncio.gather(*tasks)
        if broken:
            raise broken[0]

    async def closed_loop(self, connections: int, seconds: float) -> None:
        """Each connection sends its next request when it has the answer to the last one."""
        self.start = time.perf_counter()

        async def one() -> None:
            while (now := time.perf_counter()) < self.start + seconds:
                await self.send(now)

        await asyncio.gather(*(one() for _ in range(connections)))


def bodies(kind: str) -> Iterator[bytes]:
    """Request bodies without end: ``vector:FILE`` repeats the one in a file, ``transaction`` makes new ones.

    Cards, a fifth as many terminals, and devices are drawn evenly; ``transaction:CARDS`` says of how many.
    """
    name, _, detail = kind.partition(":")
    if name == "vector":
        body = Path(detail).read_bytes()
        while True:
            yield body
    rng, run, stamp = random.Random(), f"l{time.time_ns()}", datetime.now(UTC).isoformat()
    number, cards = 0, _num_cards(detail)
    while True:
        number += 1
        yield (
            f'{{"transaction_id":"{run}-{number}","event_time":"{stamp}","card_id":"c{rng.randrange(cards)}",'
            f'"terminal_id":"t{rng.randrange(_num_terminals(cards))}","device_id":"d{rng.randrange(cards)}",'
            f'"amount_cents":{rng.randrange(30_000)},"channel":"online","country":"DE"}}'
        ).encode()


def _num_cards(detail: str) -> int:
    return int(detail) if detail else NUM_CARDS


def _num_terminals(cards: int) -> int:
    return max(1, cards // CARDS_A_TERMINAL)


def main() -> int:
    """Run one schedule and print what became of each request."""
    parser = argparse.ArgumentParser(description="Load over HTTP on a schedule.")
    parser.add_argument("--url", required=True)
    parser.add_argument("--body", required=True, help="transaction[:CARDS] or vector:FILE")
    parser.add_argument("--schedule", required=True, help="RATExSECONDS,... or closed:CONNECTIONSxSECONDS")
    options = parser.parse_args()
    start_s, rows = asyncio.run(_run(options.url, options.body, options.schedule))
    due, latency, status = zip(*sorted(rows), strict=True)
    rounded = {
        "due_s": [round(v, 4) for v in due],
        "latency_ms": [round(v, 3) for v in latency],
        "status": status,
        "start_s": start_s,
    }
    print(json.dumps(rounded))
    return 0


async def _run(url: str, body: str, schedule: str) -> tuple[float, list[tuple[float, float, int]]]:
    client = Client(url, body)
    if schedule.startswith("closed:"):
        connections, seconds = schedule.removeprefix("closed:").split("x")
        await client.closed_loop(int(connections), float(seconds))
    else:
        steps = [step.split("x") for step in schedule.split(",")]
        await client.open_loop([(float(rate), float(seconds)) for rate, seconds in steps])
    return client.start, client.rows


if __name__ == "__main__":
    sys.exit(main())
