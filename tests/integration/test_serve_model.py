"""``deepseek-ray serve PATH`` as its users meet it: a real replica that answers over HTTP and gRPC, and comes back."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest

from deepseek_ray.client import Client
from deepseek_ray.errors import ServingError
from deepseek_ray.models import load
from deepseek_ray.paths import RunPaths
from deepseek_ray.registry import InputSchema, Lineage, Registry
from tests.unit.model_parts import NAMES, promoted, risk_model

KEY = "integration-test-key-0123456789"
ROW = {"amount": 1.5, "count 1d": 2.0}
pytestmark = pytest.mark.timeout(400)


class ModelServer:
    """``deepseek-ray serve MODEL`` in a process of its own."""

    def __init__(self, *arguments: str) -> None:
        command = [sys.executable, "-m", "deepseek_ray.cli", "serve", *arguments, "--device", "auto", "--port", "0"]
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | {"DEEPSEEK_RAY_API_KEY": KEY},
        )
        assert self.process.stdout is not None
        lines = iter(self.process.stdout.readline, "")
        self.line = next((line for line in lines if line.startswith("serving ")), "")
        found = re.search(r"http://(\S+?),", self.line)
        assert found, self.process.communicate()[0]
        self.address = found[1]

    def replica(self) -> psutil.Process:
        children = psutil.Process(self.process.pid).children(recursive=True)
        return next(child for child in children if any("ServeReplica" in part for part in child.cmdline()))

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.communicate(timeout=60)
            return self.process.returncode
        finally:
            self.process.kill()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return risk_model().save_pretrained(tmp_path_factory.mktemp("models") / "fraud")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[ModelServer]:
    made = ModelServer(str(folder))
    yield made
    assert made.stop() == 0


@pytest.mark.slow
def test_a_folder_is_served_over_both_ways(server: ModelServer, folder: Path) -> None:
    with Client(server.address, api_key=KEY, timeout_s=10) as caller:
        assert caller.transport == "grpc"
        (over_grpc,) = caller.call("models.fraud.predict", {"records": [ROW]})["predictions"]
    url = f"http://{server.address}"
    answer = httpx.post(f"{url}/v1/models/fraud/predict", json={"records": [ROW]}, headers={"X-API-Key": KEY})
    model = load(folder)
    wanted = model.predict_proba([list(ROW.values())], InputSchema.of(model.config).empty_sequence(1))[0]
    assert over_grpc == answer.json()["predictions"][0] == {"probability": pytest.approx(wanted, abs=1e-12)}
    document = httpx.get(f"{url}/openapi.json", headers={"X-API-Key": KEY}).json()
    assert list(document["components"]["schemas"]["Record"]["properties"]) == [*NAMES, "sequence"]
    connections = psutil.Process(server.replica().pid).net_connections("tcp")
    listening = [one.laddr for one in connections if one.status == psutil.CONN_LISTEN]
    inside = {one.port for one in listening if one.ip.removeprefix("::ffff:") == "127.0.0.1"}
    assert {int(port) for port in re.findall(r":(\d+),|port (\d+)", server.line) for port in port if port} <= inside
    assert len({one.port for one in listening} - inside) <= 1  # every Ray worker has such a port; Ray's token guards it


@pytest.mark.slow
def test_a_killed_replica_comes_back_on_the_same_ports(server: ModelServer) -> None:
    with Client(server.address, api_key=KEY, timeout_s=5) as caller:
        before = caller.call("models.fraud.predict", {"records": [ROW]})
        server.replica().kill()
        end = time.monotonic() + 120
        while True:
            assert time.monotonic() < end
            try:
                assert caller.call("models.fraud.predict", {"records": [ROW]}, timeout_s=2) == before
                if caller.transport == "grpc":
                    break
            except ServingError:
                time.sleep(0.2)


@pytest.mark.slow
def test_a_version_is_served_by_its_uri(mlflow_template: Path, tmp_path: Path) -> None:
    shutil.copy(mlflow_template, tmp_path / "mlflow.db")
    promoted(RunPaths(tmp_path))
    server = ModelServer("models:/risk@champion", "--run", str(tmp_path), "--rpc-port", "-1")
    try:
        with Client(server.address, api_key=KEY, timeout_s=10) as caller:
            assert caller.transport == "http"
            answer = caller.call("models.risk.predict", {"columns": {name: [1.0, 2.0] for name in NAMES}})
        assert (answer["model"], answer["version"], len(answer["predictions"])) == ("risk", "1", 2)
    finally:
        assert server.stop() == 0


@pytest.mark.slow
def test_a_moved_alias_is_served_without_a_failed_request(mlflow_template: Path, tmp_path: Path) -> None:
    shutil.copy(mlflow_template, tmp_path / "mlflow.db")
    registry = promoted(RunPaths(tmp_path))
    second = register(registry, seed=2)
    torn = register(registry, seed=3)
    (registry.get(torn).path / "model.safetensors").write_bytes(b"torn")
    arguments = ("--run", str(tmp_path), "--set", "serving.poll_registry_s=0.2")
    server = ModelServer("models:/risk@champion", *arguments)
    seen: list[str] = []
    done = threading.Event()

    def ask(caller: Client) -> None:
        while not done.is_set():
            seen.append(caller.call("models.risk.predict", {"records": [ROW]})["version"])

    try:
        with Client(server.address, api_key=KEY, timeout_s=10, retries=0) as caller, ThreadPoolExecutor(4) as pool:
            asking = [pool.submit(ask, caller) for _ in range(4)]
            try:
                for version in (second, "1", second):
                    point(registry, version)
                    wait_for(caller, "version", version)
                point(registry, torn)
                wait_for(caller, "refused", "model.safetensors")
                assert caller.call("models.risk")["version"] == second
            finally:
                done.set()
            for one in asking:
                one.result(60)  # no call failed, and none was tried twice
            assert set(seen) == {"1", second}
            assert len(seen) > 100
            server.replica().kill()
            wait_for(caller, "version", second)  # not the one that the server was started with
    finally:
        assert server.stop() == 0


def register(registry: Registry, seed: int) -> str:
    """Another version of ``risk``; its number."""
    model = risk_model(seed)
    folder = model.save_pretrained(registry.tracking.paths.root / f"saved{seed}")
    lineage = Lineage(data_digest="d", git_commit="c", train_start="2026-01-01", train_end="2026-02-01")
    with registry.tracking.start_run("train") as run:
        return registry.register(folder, run.run_id, InputSchema.of(model.config), lineage).version


def point(registry: Registry, version: str) -> None:
    """Let the alias name a version, as anyone's MLflow client can."""
    with registry.tracking.guard(write=True) as store:
        store.set_registered_model_alias("risk", "champion", version)


def wait_for(caller: Client, field: str, text: str) -> None:
    """Wait until the description of the model says so."""
    end = time.monotonic() + 120
    while True:
        assert time.monotonic() < end
        try:
            if text in caller.call("models.risk")[field]:
                return
        except ServingError:  # a replica that is started again
            time.sleep(0.2)
        time.sleep(0.05)
