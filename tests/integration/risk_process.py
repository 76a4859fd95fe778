"""The risk service in a process of its own, as its users start it, over a small run; and what is sent to it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import httpx
import psutil
import pytest

from serve_apps.ingress import free_port
from tests.served_run import ServedRun, make_run

KEY = "integration-test-key-0123456789"
NUMBERS = iter(range(10**9))


class Server:
    """``python -m serve_apps.risk`` in a process of its own."""

    def __init__(self, run: ServedRun, port: int, *settings: str) -> None:
        self.run, self.port = run, port
        self.output: list[str] = []
        command = [sys.executable, "-m", "serve_apps.risk", "--run", str(run.paths.root), "--port", str(port)]
        command += ["--set", "serving.poll_registry_s=0.3", "--set", "serving.max_transactions=50"]
        command += [part for setting in settings for part in ("--set", setting)]
        environment = os.environ | {"DEEPSEEK_RAY_API_KEY": KEY}
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
        )
        self._read_until("serving ")
        self.drain = threading.Thread(target=self._drain)
        self.drain.start()
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{port}", headers={"X-API-Key": KEY}, timeout=30)

    def _read_until(self, start: str) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.output.append(line)
            if line.startswith(start):
                return
        raise AssertionError("".join(self.output))

    def _drain(self) -> None:
        assert self.process.stdout is not None
        self.output += self.process.stdout

    def replica(self) -> psutil.Process:
        children = psutil.Process(self.process.pid).children(recursive=True)
        return next(child for child in children if any("ServeReplica" in part for part in child.cmdline()))

    def wait_ready(self, timeout_s: float = 60) -> None:
        end = time.monotonic() + timeout_s
        while time.monotonic() < end:
            try:
                if self.client.get("/readyz").status_code == 200:
                    return
            except httpx.TransportError:
                time.sleep(0.2)
        raise AssertionError("not ready in time")

    def stop(self) -> int:
        self.client.close()
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(60)
        finally:
            self.process.kill()
            self.drain.join(30)
            assert self.process.stdout is not None
            self.process.stdout.close()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> ServedRun:
    return make_run(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def server(run: ServedRun) -> Iterator[Server]:
    made = Server(run, free_port())
    yield made
    assert made.stop() == 0


def event(**changes: Any) -> dict[str, Any]:
    fields = {
        "transaction_id": f"live-{next(NUMBERS)}",
        "event_time": datetime.now(UTC).isoformat(),
        "card_id": "new-card",
        "terminal_id": "new-terminal",
        "amount_cents": 1_234,
    }
    return {name: value for name, value in (fields | changes).items() if value is not ...}


def score(server: Server, content: Any, **headers: str) -> httpx.Response:
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    return server.client.post("/v1/risk/score", content=data, headers=headers)
