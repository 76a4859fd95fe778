"""Real stores for tests: each server listens on a free port of 127.0.0.1, keeps its files in a folder of its own and
ends with its block. A server that is not installed skips the test and says so.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

START_TIMEOUT_S = 60
STOP_TIMEOUT_S = 20


@dataclass(frozen=True)
class Store:
    """Where a server listens, without its password."""

    url: str
    port: int
    password: str = ""


def program(name: str, package: str) -> str:
    """Path of an installed program, or a visible skip."""
    folders = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", *map(str, _postgres_folders())])
    found = shutil.which(name, path=folders)
    if found is None:
        pytest.skip(f"{name} is not installed (apt-get install {package})")
    return found


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@contextlib.contextmanager
def redis_server(folder: Path, password: str = "") -> Iterator[Store]:
    """An empty Redis that writes nothing to disk."""
    port = free_port()
    settings = folder / "redis.conf"
    lines = [f"bind 127.0.0.1\nport {port}\nsave ''\nappendonly no\ndir {folder}"]
    settings.write_text("\n".join([*lines, f"requirepass {password}"] if password else lines))
    with _running([program("redis-server", "redis-server"), str(settings)], port):
        yield Store(f"redis://127.0.0.1:{port}", port, password)


@contextlib.contextmanager
def postgres_server() -> Iterator[Store]:
    """An empty cluster with a database ``mlflow`` of the role ``mlflow``, which logs in by password."""
    initdb, postgres = program("initdb", "postgresql"), program("postgres", "postgresql")
    root = os.geteuid() == 0
    owner = {"user": "postgres", "group": "postgres", "extra_groups": ()} if root else {}  # it refuses to run as root
    folder = Path(tempfile.mkdtemp(prefix="pg-", dir="/tmp"))
    password, port = secrets.token_hex(16), free_port()
    (folder / "password").write_text(password)
    try:
        if root:
            for path in (folder, folder / "password"):
                shutil.chown(path, "postgres", "postgres")
        make = [initdb, "-D", str(folder / "data"), "-U", "mlflow", "-A", "scram-sha-256", "--no-sync"]
        make += [f"--pwfile={folder / 'password'}", "--locale=C", "--encoding=UTF8"]
        subprocess.run(make, check=True, capture_output=True, cwd="/", timeout=START_TIMEOUT_S, **owner)  # type: ignore[call-overload]
        command = [postgres, "-D", str(folder / "data"), "-p", str(port), "-h", "127.0.0.1", "-k", str(folder), "-F"]
        with _running(command, port, **owner):
            _create_database(port, password)
            yield Store(f"postgresql+psycopg://mlflow@127.0.0.1:{port}/mlflow", port, password)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def mlflow_server(folder: Path, backend: str = "", **environment: str) -> Iterator[Store]:
    """MLflow's own server, which keeps the artifacts too."""
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", backend or f"sqlite:///{folder / 'server.db'}"]
    command += ["--artifacts-destination", str(folder / "served-artifacts")]
    with _running(command, port, env=os.environ | environment, cwd=folder):
        yield Store(f"http://127.0.0.1:{port}", port)


@contextlib.contextmanager
def s3_server(monkeypatch: pytest.MonkeyPatch, bucket: str = "models") -> Iterator[str]:
    """An S3 in this process that holds one bucket; gives ``s3://bucket``. The environment points to it."""
    import logging

    import boto3
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # else a line a request
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    environment = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": secrets.token_hex(16)}
    environment |= {"AWS_DEFAULT_REGION": "us-east-1", "MLFLOW_S3_ENDPOINT_URL": f"http://{host}:{port}"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    try:
        boto3.client("s3", endpoint_url=environment["MLFLOW_S3_ENDPOINT_URL"]).create_bucket(Bucket=bucket)
        yield f"s3://{bucket}"
    finally:
        server.stop()


def _create_database(port: int, password: str) -> None:
    import psycopg

    login = f"host=127.0.0.1 port={port} user=mlflow dbname=postgres password={password}"
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        try:
            with psycopg.connect(login, autocommit=True) as connection:
                connection.execute("CREATE DATABASE mlflow")
            return
        except psycopg.OperationalError:  # it listens before it answers
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


@contextlib.contextmanager
def _running(command: list[str], port: int, **options: object) -> Iterator[None]:
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(  # type: ignore[call-overload]
            command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True, **({"cwd": "/"} | options)
        )
        try:
            deadline = time.monotonic() + START_TIMEOUT_S
            while process.poll() is None and time.monotonic() < deadline:
                with contextlib.suppress(OSError):
                    socket.create_connection(("127.0.0.1", port), timeout=1).close()
                    break
                time.sleep(0.05)
            else:
                log.seek(0)
                pytest.fail(f"{command[0]} does not listen:\n{log.read().decode(errors='replace')[-3000:]}")
            yield
        finally:
            process.terminate()
            try:
                process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _postgres_folders() -> list[Path]:
    return sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
