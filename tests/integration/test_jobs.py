"""``ray job submit --working-dir .`` against a cluster that asks every client for its token."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
START_TIMEOUT_S = 180
JOB_TIMEOUT_S = 300
STOP_TIMEOUT_S = 15
KEY = "a-key-for-the-jobs"

pytestmark = pytest.mark.timeout(START_TIMEOUT_S + JOB_TIMEOUT_S)


@dataclass(frozen=True)
class Cluster:
    """A running head node."""

    address: str
    environment: dict[str, str]
    runs: Path

    def submit(self, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run a command of the repository as a job and wait for its end."""
        runtime = json.dumps({"env_vars": {"DEEPSEEK_RAY_RUNS": str(self.runs)}})
        line = [str(BIN / "ray"), "job", "submit", "--address", self.address, "--runtime-env-json", runtime]
        return subprocess.run(
            [*line, "--working-dir", ".", "--", *command],
            cwd=ROOT,
            env=self.environment | environment,
            capture_output=True,
            text=True,
            timeout=JOB_TIMEOUT_S,
        )


def free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 that nobody listens on."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("jobs")
    token = folder / "token"
    token.write_text(secrets.token_hex(16))
    temporary = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # a socket's path has at most 107 characters
    environment = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    environment["PATH"] = f"{BIN}{os.pathsep}{environment['PATH']}"
    for name in ("RAY_ADDRESS", "DEEPSEEK_RAY_RUNS", "DEEPSEEK_RAY_RUN"):
        environment.pop(name, None)
    gcs, dashboard, client, agent = free_ports(4)
    command = [str(BIN / "ray"), "start", "--head", "--block", "--num-cpus=2", "--node-ip-address=127.0.0.1"]
    command += [f"--port={gcs}", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"]
    command += [f"--ray-client-server-port={client}", f"--dashboard-agent-listen-port={agent}"]
    log = (folder / "head.log").open("w")
    head = subprocess.Popen(
        [*command, f"--temp-dir={temporary}"],
        env=environment | {"DEEPSEEK_RAY_API_KEY": KEY},  # jobs inherit it
        cwd=folder,
        stdout=log,
        stderr=subprocess.STDOUT,
    )
    address = f"http://127.0.0.1:{dashboard}"
    try:
        wait_for_jobs_api(address, token.read_text(), head)
        yield Cluster(address, environment, folder / "runs")
    finally:
        stop(head)
        log.close()
        shutil.rmtree(temporary, ignore_errors=True)


def stop(head: subprocess.Popen[bytes]) -> None:
    """End the head node and every process it started; ``ray stop`` would end all clusters of the machine."""
    parts = psutil.Process(head.pid).children(recursive=True) if head.poll() is None else []
    head.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        head.wait(timeout=STOP_TIMEOUT_S)
    for part in psutil.wait_procs(parts, timeout=1)[1]:
        with contextlib.suppress(psutil.NoSuchProcess):
            part.kill()
    head.kill()
    head.wait()


def wait_for_jobs_api(address: str, token: str, head: subprocess.Popen[bytes]) -> None:
    """Return once the cluster lists its jobs to a client with the token."""
    request = urllib.request.Request(f"{address}/api/jobs/", headers={"Authorization": f"Bearer {token}"})
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline and head.poll() is None:
        with contextlib.suppress(OSError), urllib.request.urlopen(request, timeout=5) as answer:
            if answer.status == 200:
                return
        time.sleep(0.2)
    pytest.fail(f"the head node did not answer (exit status {head.poll()})")


def test_a_client_without_the_token_is_refused(cluster: Cluster) -> None:
    with pytest.raises(urllib.error.HTTPError) as refusal:
        urllib.request.urlopen(f"{cluster.address}/api/jobs/", timeout=10)
    refusal.value.close()
    assert refusal.value.code == 401
    wrong = cluster.submit("true", RAY_AUTH_TOKEN="0" * 32)
    assert wrong.returncode != 0
    assert "invalid" in (wrong.stdout + wrong.stderr).lower()


@pytest.mark.slow
def test_a_mesh_trains_as_a_job(cluster: Cluster) -> None:
    run = cluster.runs / "moe"
    settings = ["parallel.dp_shard=2", "parallel.ep=2", "step.steps=6", "corpus.max_bytes=100000"]
    arguments = [f"--set={setting}" for setting in settings]
    done = cluster.submit("python", "-m", "pipelines.moe.train", "--config", "debug_moe", "--run", str(run), *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    stage = json.loads((run / "results/pretrain.json").read_text())
    assert stage["steps"] == 6
    assert stage["last_loss"] < stage["first_loss"]
    assert {json.loads(line)["rank"] for line in (run / "checkpoints/moe/workers.jsonl").open()} == {0, 1}


def test_only_the_programs_travel(cluster: Cluster) -> None:
    seen = cluster.submit("python", "-c", "import os, deepseek_ray as d; print(os.listdir(), d.__file__)")
    assert seen.returncode == 0, seen.stdout + seen.stderr
    line = next(line for line in seen.stdout.splitlines() if line.startswith("["))
    assert "_ray_pkg_" in line
    for name in ("'pipelines'", "'deepseek_ray'", "'features'", "'kernels'"):
        assert name in line
    for name in ("'.venv'", "'.git'", "'runs'", "'tests'"):
        assert name not in line


def test_a_job_has_the_key_of_the_node_and_does_not_show_it(cluster: Cluster) -> None:
    shown = cluster.submit("python", "-c", "import os; print('length', len(os.environ['DEEPSEEK_RAY_API_KEY']))")
    assert f"length {len(KEY)}" in shown.stdout, shown.stdout + shown.stderr
    headers = {"Authorization": f"Bearer {Path(cluster.environment['RAY_AUTH_TOKEN_PATH']).read_text()}"}
    request = urllib.request.Request(f"{cluster.address}/api/jobs/", headers=headers)
    with urllib.request.urlopen(request, timeout=10) as answer:
        listed = answer.read().decode()
    assert "os.environ" in listed
    assert KEY not in listed


SETTINGS = ["--preset", "debug"]
for setting in (
    "train.num_workers=1", "data.label_delay_days=1", "data.drift=new-device", "update.min_labels=20",
    # what is tested is that the update runs and is swapped in, not that so small a model wins
    "gate.max_average_precision_drop=1", "gate.max_cp100_drop=1", "gate.max_forgetting=1",
):  # fmt: skip
    SETTINGS += ["--set", setting]


@contextlib.contextmanager
def service(run: Path) -> Iterator[str]:
    """Serve the run on this machine, outside the cluster, while the block runs; gives the address."""
    url = f"http://127.0.0.1:{(port := free_ports(1)[0])}"
    command = [sys.executable, "-m", "serve_apps.risk", "--run", str(run), "--port", str(port)]
    with subprocess.Popen(command, cwd=ROOT, env=os.environ | {"DEEPSEEK_RAY_API_KEY": KEY}) as server:
        try:
            deadline = time.monotonic() + START_TIMEOUT_S
            while time.monotonic() < deadline and server.poll() is None:
                with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/readyz", timeout=5):
                    break
                time.sleep(0.2)
            yield url
        finally:
            server.terminate()


def test_the_loop_runs_as_jobs(cluster: Cluster) -> None:
    run = cluster.runs / "job"

    def job(verb: str, *arguments: str) -> None:
        done = cluster.submit("python", "-m", f"pipelines.risk.{verb}", *arguments, "--run", str(run))
        assert done.returncode == 0, done.stdout + done.stderr
        assert "succeeded" in done.stdout

    job("ingest", "--synthetic", *SETTINGS)  # all that follows has them from the run
    job("train")
    assert (run / "transactions.parquet").is_file()
    assert (run / "mlflow.db").is_file()
    job("warm")
    with service(run) as url:
        job("replay", "--url", url)
        job("update", "--url", url)
    replay, update = (json.loads((run / "results" / f"{stage}.json").read_text()) for stage in ("replay", "update"))
    assert (replay["failed"], replay["requests"]) == (0, replay["transactions"])
    assert update["promoted"]
