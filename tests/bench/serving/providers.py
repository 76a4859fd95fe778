"""The servers that are compared: how each is started, where it answers, what it is sent."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil

from tests.bench.serving.load import KEY_VARIABLE, bodies

ROOT = Path(__file__).parents[3]
START_S = 180.0


@dataclass
class Provider:
    """One server in processes of its own.

    Attributes:
        command: words; "{port}" is replaced, in the environment too.
        path: where rows are scored.
        body: what it is sent, see ``load.bodies``.
        least_s: how long a measurement takes at least: some answer a few requests a second.
    """

    name: str
    command: list[str]
    path: str
    body: str
    environment: dict[str, str] = field(default_factory=dict)
    least_s: float = 0.0
    port: int = 0
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Where rows are scored."""
        return f"http://127.0.0.1:{self.port}{self.path}"

    def start(self, log: Path) -> None:
        """Start it; ``wait`` tells when it answers."""
        self.port = free_port()
        words = [word.replace("{port}", str(self.port)) for word in self.command]
        settings = {name: value.replace("{port}", str(self.port)) for name, value in self.environment.items()}
        environment = {**os.environ, **settings}
        with log.open("wb") as out:
            self.process = subprocess.Popen(words, cwd=ROOT, env=environment, stdout=out, stderr=subprocess.STDOUT)

    def wait(self) -> None:
        """Until it answers a request.

        Raises:
            RuntimeError: it ended, or took too long.
        """
        assert self.process is not None
        end = time.monotonic() + START_S
        while time.monotonic() < end and self.process.poll() is None:
            if self._answers():
                return
            time.sleep(0.2)
        raise RuntimeError(f"{self.name} did not start")

    def _answers(self) -> bool:
        headers = {"Content-Type": "application/json", "X-API-Key": os.environ.get(KEY_VARIABLE, "")}
        try:
            return httpx.post(self.url, content=next(bodies(self.body)), headers=headers, timeout=10).is_success
        except httpx.TransportError:
            return False

    def processes(self) -> list[psutil.Process]:
        """All that it runs."""
        assert self.process is not None
        root = psutil.Process(self.process.pid)
        return [root, *root.children(recursive=True)]

    def cpu_s(self) -> float:
        """CPU seconds that its processes have used so far."""
        used = 0.0
        for process in self.processes():
            try:
                times = process.cpu_times()
            except psutil.NoSuchProcess:
                continue
            used += times.user + times.system
        return used

    def replica(self) -> psutil.Process:
        """The process that holds the model, for Ray Serve."""
        return next(p for p in self.processes() if any("ServeReplica" in part for part in p.cmdline()))

    def stop(self) -> None:
        """Ask it to end, and end what is left."""
        if self.process is None:
            return
        left = self.processes() if self.process.poll() is None else []
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
        for process in left:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue


def free_port() -> int:
    """A port of 127.0.0.1 that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def ours(run: Path, model: Path, row: Path, records: Path) -> list[Provider]:
    """The floor, our path with less and more around it, and Ray Serve as its quick start shows it.

    Args:
        run: with a champion and a second version.
        model: the champion's files.
        row: JSON of one row as arrays.
        records: the same as a request with named columns.
    """
    vector, here = f"vector:{row}", [sys.executable, "-m"]
    bench = "tests.bench.serving"
    plain = [*here, f"{bench}.plain", str(model), "{port}"]
    risk = [*here, "serve_apps.risk", "--run", str(run), "--port", "{port}", "--set", "serving.poll_registry_s=0.2"]
    served = [*here, "serve_apps.model", str(model), "--name", "scorer", "--port", "{port}", "--rpc-port", "-1"]
    return [
        Provider("floor", [*here, f"{bench}.floor", str(model), "{port}"], "/", vector),
        Provider("deepseek_ray, model only", [*here, f"{bench}.vector_app", str(model), "{port}"], "/v1/score", vector),
        Provider("deepseek-ray serve FOLDER", served, "/v1/models/scorer/predict", f"vector:{records}"),
        Provider("deepseek_ray, features and log", risk, "/v1/risk/score", "transaction"),
        Provider("Ray Serve, @serve.batch", [*plain, "--batch"], "/", vector, least_s=3.0),
        Provider("Ray Serve", plain, "/", vector, least_s=5.0),
    ]
