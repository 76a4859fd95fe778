"""What works on this machine, and the fix for what does not. Each check is a function from settings to a Check."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import io
import json
import os
import shutil
import socket
import sqlite3
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from deepseek_ray.cli import settings_of
from deepseek_ray.config import Config
from deepseek_ray.paths import RunPaths, runs_root

State = Literal["ok", "warning", "broken"]

VERSIONS = ("ray", "torch", "triton", "mlflow", "feast", "polars", "pydantic", "lightgbm", "pyarrow")
MIN_PYTHON = (3, 11)
MIN_CORES, MIN_MEMORY_GIB, MIN_DISK_GIB, MIN_SHARED_GIB = 2, 6.0, 4.0, 1.0
CONNECT_TIMEOUT_S = 2.0
LOCK_TIMEOUT_S = 1.0
RAY_DASHBOARD_PORT, RAY_GCS_PORT = 8265, 6379
MIN_KEY_LENGTH = 16
GIB = 1 << 30


@dataclass(frozen=True)
class Check:
    """One thing looked at: ``state`` is "broken" only when a command of ours would fail on it."""

    name: str
    state: State
    value: str
    fix: str = ""


def run(options: argparse.Namespace) -> int:
    """The verb: print all checks; status 1 when something is broken."""
    checks = examine(*settings_of(options, "make"))
    print(to_json(checks) if options.json else to_table(checks))
    return 1 if any(check.state == "broken" for check in checks) else 0


def examine(config: Config, paths: RunPaths) -> list[Check]:
    """All checks, cheapest first. Starts nothing and leaves no file behind."""
    checks = [check_python(), *check_versions(), *check_machine(), check_devices(), check_kernels()]
    checks += [check_disk(runs_root()), check_tracking(config, paths), check_online_store(config, paths)]
    checks += [check_artifacts(config, paths), check_gcs_store(config)]
    checks += [check_port(config.serving.host, config.serving.port, "serving port")]
    checks += [check_port("127.0.0.1", RAY_DASHBOARD_PORT, "Ray dashboard port")]
    checks += [check_port("127.0.0.1", RAY_GCS_PORT, "Ray head port")]
    return [*checks, check_api_key(config.serving.api_key_env)]


def check_python() -> Check:
    """The interpreter."""
    version = ".".join(str(part) for part in sys.version_info[:3])
    if sys.version_info < MIN_PYTHON:
        return Check("Python", "broken", version, "make clean, then make install PYTHON=python3.11")
    return Check("Python", "ok", version)


def check_versions(names: Sequence[str] = VERSIONS) -> list[Check]:
    """Installed versions of the parts, read from their metadata without importing them."""
    checks = []
    for name in names:
        try:
            checks.append(Check(name, "ok", importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            checks.append(Check(name, "broken", "not installed", "make install"))
    return checks


def check_machine() -> list[Check]:
    """Cores, memory and shared memory against what the demo needs."""
    import psutil

    cores = len(os.sched_getaffinity(0))
    memory = psutil.virtual_memory()
    free = memory.available / GIB
    checks = [
        _enough("cores", cores, MIN_CORES, f"{cores} usable", "expect the demo to take longer"),
        _enough(
            "memory",
            free,
            MIN_MEMORY_GIB,
            f"{free:.1f} of {memory.total / GIB:.1f} GiB free",
            f"free memory until {MIN_MEMORY_GIB:g} GiB are available, or use --preset debug",
        ),
    ]
    shared = Path("/dev/shm")
    if shared.is_dir():
        size = shutil.disk_usage(shared).free / GIB
        fix = "give the container more shared memory (docker run --shm-size 2g); Ray falls back to /tmp"
        checks.append(_enough("shared memory", size, MIN_SHARED_GIB, f"{size:.1f} GiB free", fix))
    return checks


def check_devices() -> Check:
    """Accelerators that torch sees; a CPU alone is enough for everything but large models."""
    try:
        import torch
    except ImportError as error:
        return Check("devices", "broken", f"torch does not import: {error}", "make clean, then make install")
    if not torch.cuda.is_available():
        return Check("devices", "ok", f"cpu ({torch.get_num_threads()} threads)")
    names = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        names.append(
            f"cuda:{index} {torch.cuda.get_device_name(index)}, {free / GIB:.0f} of {total / GIB:.0f} GiB free"
        )
        if importlib.util.find_spec("pynvml"):  # the extra "gpu"
            names[-1] += f", {torch.cuda.utilization(index)} % busy"
    return Check("devices", "ok", "; ".join(names))


def check_kernels() -> Check:
    """How the operations of kernels/ run here: by Triton or plain torch, why, and with which launch settings."""
    from deepseek_ray.kernels import dispatch, tuning

    try:
        choice = dispatch.choice()
    except ValueError as error:
        return Check(
            "kernels", "broken", str(error), f"set {dispatch.VARIABLE} to one of {', '.join(dispatch.CHOICES)}"
        )
    table = tuning.file()
    try:
        measured = tuning.count()
    except ValueError as error:
        fix = f"delete {table}, or set {tuning.VARIABLE} to another path or to off"
        return Check("kernels", "broken", str(error), fix)
    if dispatch.interpreting():
        asked = os.environ.get(dispatch.VARIABLE) == "triton"
        value = (
            "Triton's interpreter: slow"
            if asked
            else f"torch on the CPU: the interpreter needs {dispatch.VARIABLE}=triton"
        )
        return Check("kernels", "warning", value, "unset TRITON_INTERPRET outside kernel tests")
    value = f"{choice.backend}: {choice.why}"
    if choice.backend == "triton":
        value += f"; {measured} measured settings in {table}" if table else "; default settings"
    return Check("kernels", "ok", value)


def check_disk(folder: Path) -> Check:
    """The folder of runs, or its nearest existing parent, can be written and has room."""
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free / GIB
    if not os.access(existing, os.W_OK) or not _writable(existing):
        return Check("disk", "broken", f"{existing} is read-only", "set DEEPSEEK_RAY_RUNS to a writable folder")
    fix = f"free {MIN_DISK_GIB:g} GiB or set DEEPSEEK_RAY_RUNS to a larger disk"
    return _enough("disk", free, MIN_DISK_GIB, f"{existing} writable, {free:.1f} GiB free", fix)


def check_tracking(config: Config, paths: RunPaths) -> Check:
    """The MLflow store: the embedded database of the run, or the server that the settings name."""
    name = "MLflow store"
    uri = config.stores.tracking_uri
    if uri and not uri.startswith("sqlite:"):
        return _check_remote(name, uri, driver="psycopg" if uri.startswith("postgresql") else "")
    file = Path(uri.removeprefix("sqlite:///")) if uri else paths.root / "mlflow.db"
    if not file.exists():
        return Check(name, "ok", f"{file} not made yet", "make demo, or deepseek-ray train, makes it")
    return _check_sqlite(name, file, "alembic_version")


def check_online_store(config: Config, paths: RunPaths) -> Check:
    """Feast's online store: SQLite below the run, or Redis."""
    uri = config.stores.online_store
    if uri:
        return _check_remote("online store", uri, driver="redis")
    return Check("online store", "ok", f"SQLite in {paths.feature_store}")


def check_gcs_store(config: Config) -> Check:
    """Where the head of a service keeps what it knows: its memory, or Redis."""
    uri = config.stores.gcs_store
    return _check_remote("Ray's state", uri, driver="redis") if uri else Check("Ray's state", "ok", "in memory")


def check_artifacts(config: Config, paths: RunPaths) -> Check:
    """Where models and figures go."""
    root = config.stores.artifact_root
    if not root.startswith("s3://"):
        return Check("artifacts", "ok", root or str(paths.artifacts))
    if importlib.util.find_spec("boto3") is None:
        return Check("artifacts", "broken", f"{root} needs boto3", "pip install 'deepseek-ray[s3]'")
    endpoint = os.environ.get("MLFLOW_S3_ENDPOINT_URL", "")
    return _check_remote("artifacts", endpoint) if endpoint else Check("artifacts", "ok", root)


def check_port(host: str, port: int, name: str) -> Check:
    """A port that a command of ours would listen on."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            fix = "stop what listens there (ss -ltnp), or choose another port"
            return Check(name, "warning", f"{host}:{port} {error.strerror}", fix)
    return Check(name, "ok", f"{host}:{port} free")


def check_api_key(variable: str) -> Check:
    """The service's API key, from the environment only; its value is never shown."""
    key = os.environ.get(variable, "")
    fix = f"export {variable}=$(python3 -c 'import secrets; print(secrets.token_urlsafe(32))')"
    if not key:
        return Check("API key", "warning", f"{variable} is not set", fix)
    if len(key) < MIN_KEY_LENGTH:
        return Check("API key", "warning", f"{variable} has only {len(key)} characters", fix)
    return Check("API key", "ok", f"{variable} is set")


def to_json(checks: Sequence[Check]) -> str:
    """The checks as a JSON list of objects with name, state, value, fix."""
    return json.dumps([asdict(check) for check in checks], indent=2)


def to_table(checks: Sequence[Check]) -> str:
    """The checks as a table for a terminal, then a line that says how many need attention."""
    from rich.console import Console
    from rich.table import Table

    colours = {"ok": "green", "warning": "yellow", "broken": "red"}
    table = Table(title="deepseek-ray doctor", show_lines=False)
    table.add_column("what", no_wrap=True)
    table.add_column("state", no_wrap=True)
    table.add_column("found", overflow="fold")
    table.add_column("fix", overflow="fold")
    for check in checks:
        colour = colours[check.state]
        table.add_row(check.name, f"[{colour}]{check.state}[/]", _plain(check.value), _plain(check.fix))
    tty = sys.stdout.isatty()
    width = shutil.get_terminal_size((120, 40)).columns
    console = Console(file=io.StringIO(), force_terminal=tty, no_color=not tty, width=width)
    console.print(table)
    broken = sum(check.state == "broken" for check in checks)
    warned = sum(check.state == "warning" for check in checks)
    console.print(f"{broken} broken, {warned} to look at, {len(checks) - broken - warned} fine")
    text: str = console.file.getvalue()  # type: ignore[attr-defined]  # the StringIO above
    return text.rstrip()


def _plain(text: str) -> str:
    return text.replace("[", r"\[")  # rich would read [s3] as markup


def _enough(name: str, have: float, need: float, value: str, fix: str) -> Check:
    return Check(name, "ok", value) if have >= need else Check(name, "warning", value, fix)


def _writable(folder: Path) -> bool:
    probe = folder / f".deepseek-ray-probe-{os.getpid()}"
    try:
        probe.touch()
        probe.unlink()
    except OSError:
        return False
    return True


def _check_sqlite(name: str, file: Path, table: str) -> Check:
    restore = "restore it from a backup, or move it away and run make demo again"
    try:
        connection = sqlite3.connect(f"{file.absolute().as_uri()}?mode=rw", uri=True, timeout=LOCK_TIMEOUT_S)
        try:
            connection.execute("BEGIN IMMEDIATE")
            found = connection.execute("SELECT 1 FROM sqlite_master WHERE name = ?", (table,)).fetchone()
            connection.rollback()
        finally:
            connection.close()
    except sqlite3.OperationalError as error:
        if "locked" in str(error):
            return Check(name, "broken", f"{file} is locked", "stop the process that holds it (fuser -v FILE)")
        return Check(name, "broken", f"{file}: {error}", "make the file and its folder writable")
    except sqlite3.DatabaseError as error:
        return Check(name, "broken", f"{file}: {error}", restore)
    return Check(name, "ok", str(file)) if found else Check(name, "broken", f"{file} has no tables", restore)


def _check_remote(name: str, uri: str, *, driver: str = "") -> Check:
    """Connect to the host of a URI; the address is shown without its credentials."""
    if driver and importlib.util.find_spec(driver) is None:
        extra = {"psycopg": "postgres"}.get(driver, driver)
        return Check(name, "broken", f"needs the package {driver!r}", f"pip install 'deepseek-ray[{extra}]'")
    parts = urlsplit(uri)
    scheme = parts.scheme.partition("+")[0]
    defaults = {"https": 443, "http": 80, "redis": 6379, "rediss": 6379, "postgresql": 5432}
    try:
        host, port = parts.hostname or "", parts.port or defaults.get(scheme, 0)
    except ValueError as error:
        return Check(name, "broken", f"its address cannot be read: {error}", "write it as scheme://host:port")
    if not host or not port:
        return Check(name, "broken", "its address has no host or port", "write it as scheme://host:port")
    try:
        socket.create_connection((host, port), timeout=CONNECT_TIMEOUT_S).close()
    except OSError as error:
        reason = error.strerror or str(error)
        return Check(name, "broken", f"{scheme}://{host}:{port}: {reason}", "start it, or correct the setting")
    return Check(name, "ok", f"{scheme}://{host}:{port} answers")
