"""Runs: parameters, metrics, figures and files in MLflow, opened once under a lock.

SQLite when embedded, any MLflow URI in production. Every call first makes sure that the store
answers, so that a missing, locked or read-only one gives a clear error in bounded time; MLflow
alone would retry for minutes.
"""

from __future__ import annotations

import os
import socket
import sqlite3
import subprocess
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from sqlalchemy.exc import SADeprecationWarning, SQLAlchemyError

from deepseek_ray.config import StoreConfig
from deepseek_ray.errors import RegistryError, RegistryUnavailableError, first_line
from deepseek_ray.logs import hide_password
from deepseek_ray.paths import RunPaths
from deepseek_ray.registry.first_touch import first_touch
from deepseek_ray.sqlite import read_uri

# MLflow 3.17 declares one of its own relations in a way that SQLAlchemy 2.1 calls deprecated: nothing that a user of
# ours could mend. Said once a process, when the store opens.
warnings.filterwarnings("ignore", "The ``noload`` loader strategy", SADeprecationWarning)

INIT_TIMEOUT_S = 120.0
"""A first touch runs all of MLflow's migrations: seconds, and much more on a loaded machine."""

_UNAVAILABLE = {"TEMPORARILY_UNAVAILABLE", "INTERNAL_ERROR", "REQUEST_LIMIT_EXCEEDED"}


class Run:
    """One MLflow run; safe to use again by id after a restart."""

    def __init__(self, tracking: Tracking, run_id: str) -> None:
        self.tracking = tracking
        self.run_id = run_id

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Log settings; nested mappings become dotted names. Passwords in addresses are left out."""
        rows = [Param(key, hide_password(str(value))) for key, value in _flatten(params)]
        with self.tracking.guard(write=True) as client:
            for start in range(0, len(rows), 100):  # MLflow takes at most 100 params a call
                client.log_batch(self.run_id, params=rows[start : start + 100])

    def log_metrics(self, metrics: Mapping[str, float], step: int = 0) -> None:
        """Log numbers at a step."""
        now_ms = int(time.time() * 1000)
        rows = [Metric(key, float(value), now_ms, step) for key, value in metrics.items()]
        with self.tracking.guard(write=True) as client:
            client.log_batch(self.run_id, metrics=rows)

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags on the run."""
        with self.tracking.guard(write=True) as client:
            client.log_batch(self.run_id, tags=[RunTag(key, str(value)) for key, value in tags.items()])

    def log_figure(self, figure: Any, name: str) -> None:
        """Log a matplotlib or plotly figure under the file name given, for example ``curves/pr.png``."""
        with self.tracking.guard(write=True) as client:
            client.log_figure(self.run_id, figure, name)

    def log_dict(self, tree: Mapping[str, Any], name: str) -> None:
        """Log plain data as ``.json`` or ``.yaml``, by the name's ending."""
        with self.tracking.guard(write=True) as client:
            client.log_dict(self.run_id, dict(tree), name)

    def finish(self, status: str = "FINISHED") -> None:
        """Close the run as ``FINISHED``, ``FAILED`` or ``KILLED``."""
        with self.tracking.guard(write=True) as client:
            client.set_terminated(self.run_id, status)

    @property
    def metrics(self) -> dict[str, float]:
        """Last value of every metric."""
        with self.tracking.guard() as client:
            return dict(client.get_run(self.run_id).data.metrics)

    @property
    def params(self) -> dict[str, str]:
        """Every parameter."""
        with self.tracking.guard() as client:
            return dict(client.get_run(self.run_id).data.params)

    @property
    def tags(self) -> dict[str, str]:
        """Every tag."""
        with self.tracking.guard() as client:
            return dict(client.get_run(self.run_id).data.tags)

    @property
    def artifact_uri(self) -> str:
        """Where the run's files are."""
        with self.tracking.guard() as client:
            return str(client.get_run(self.run_id).info.artifact_uri)


class Tracking:
    """A tracking store that is known to answer. Make it with :meth:`open`.

    Args:
        uri: absolute MLflow tracking and registry URI; ``shown_uri`` is the same without a password.
        client: MLflow's client of this store.
        paths: the run folder, for the audit table and the cache of downloaded versions.
        experiment_id: where new runs go.
        timeout_s: longest wait for a locked or silent store.
    """

    def __init__(self, uri: str, client: MlflowClient, paths: RunPaths, experiment_id: str, timeout_s: float) -> None:
        self.uri = uri
        self.shown_uri = hide_password(uri)
        self.paths = paths
        self.experiment_id = experiment_id
        self.timeout_s = timeout_s
        self._client = client

    @classmethod
    def open(
        cls,
        paths: RunPaths,
        stores: StoreConfig | None = None,
        *,
        experiment: str = "risk",
        create: bool = True,
        timeout_s: float = 10.0,
    ) -> Tracking:
        """Open the run's store; initialise a fresh one under a lock.

        Args:
            paths: the run folder.
            stores: settings of the stores; empty ones mean the embedded default.
            experiment: MLflow experiment, made when absent.
            create: make a missing SQLite store; False for readers such as the server.
            timeout_s: longest wait for a locked or silent store.

        Raises:
            RegistryUnavailableError: the store is missing, locked, read-only or silent.
            RegistryError: it is a database without ``stores.artifact_root``, or it refused.
        """
        uri = (stores.tracking_uri if stores else "") or paths.tracking_uri
        database = _sqlite_path(uri)
        root = _artifact_root((stores.artifact_root if stores else "") or (str(paths.artifacts) if database else ""))
        if database is not None and not database.exists() and not create:
            raise _missing(database)
        frozen = (
            database is not None and not create and not os.access(database.parent, os.W_OK)
        )  # nobody starts one there
        if database is None:
            check_store(uri, timeout_s)
        alone = nullcontext() if frozen else first_touch(uri, database, paths, max(timeout_s, INIT_TIMEOUT_S))
        with _translated(uri), alone:
            if database is not None and database.exists():
                check_store(uri, timeout_s, write=create)
            address = f"sqlite:///{read_uri(database)}&uri=true" if database and frozen else uri
            client = MlflowClient(address, address)
            experiment_id = _experiment(client, experiment, root, create=create)
            if database is not None and create:
                _use_write_ahead_log(database, timeout_s)
        return cls(uri, client, paths, experiment_id, timeout_s)

    @contextmanager
    def guard(self, *, write: bool = False) -> Iterator[MlflowClient]:
        """Yield MLflow's client after a check that the store answers; translate its errors.

        Raises:
            RegistryUnavailableError: the store is missing, locked, read-only or silent.
            RegistryError: it answered with a refusal.
        """
        with _translated(self.uri):
            check_store(self.uri, self.timeout_s, write=write)
            yield self._client

    def create_run(self, run_name: str, *, tags: Mapping[str, str] | None = None, parent: str = "") -> Run:
        """Create a run, tagged with the git commit; the driver makes it, workers use it by id."""
        all_tags = {"git_commit": git_commit(), **(tags or {})}
        if parent:
            all_tags["mlflow.parentRunId"] = parent
        with self.guard(write=True) as client:
            run = client.create_run(self.experiment_id, run_name=run_name, tags=all_tags)
        return Run(self, run.info.run_id)

    def run(self, run_id: str) -> Run:
        """An existing run."""
        return Run(self, run_id)

    @contextmanager
    def start_run(self, run_name: str, *, tags: Mapping[str, str] | None = None) -> Iterator[Run]:
        """Create a run and close it: ``FAILED`` when the body raises."""
        run = self.create_run(run_name, tags=tags)
        try:
            yield run
        except BaseException:
            with suppress(RegistryError):  # a store that is down must not hide what went wrong
                run.finish("FAILED")
            raise
        run.finish()


def git_commit() -> str:
    """Commit of the code in a checkout, with ``-dirty`` when it has changes; "unknown" outside one."""
    here = str(Path(__file__).resolve().parents[2])
    command = ["git", "-C", here, "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def check_store(uri: str, timeout_s: float, *, write: bool = False) -> None:
    """Make sure that a store answers.

    Raises:
        RegistryUnavailableError: it is missing, locked for longer than ``timeout_s``, read-only or silent.
    """
    database = _sqlite_path(uri)
    if database is not None:
        _check_sqlite(database, timeout_s, write=write)
        return
    parts = urlsplit(uri)
    if parts.hostname is None:
        return
    port = parts.port or {"http": 80, "https": 443, "postgresql": 5432, "mysql": 3306}.get(
        parts.scheme.split("+")[0], 0
    )
    try:
        socket.create_connection((parts.hostname, port), timeout=timeout_s).close()
    except OSError as error:
        raise RegistryUnavailableError(
            f"The MLflow server stores.tracking_uri={hide_password(uri)!r} does not answer: {error}.",
            fix="start it, or correct stores.tracking_uri",
        ) from error


def _check_sqlite(database: Path, timeout_s: float, *, write: bool) -> None:
    if not database.exists():
        raise _missing(database)
    try:
        with closing(_connect(database, timeout_s, write=write)) as connection:
            connection.execute("SELECT 1 FROM sqlite_master LIMIT 1").fetchall()
            if write:
                connection.execute("BEGIN IMMEDIATE")
                connection.execute("ROLLBACK")
    except sqlite3.Error as error:
        raise _sqlite_problem(database, timeout_s, error) from error


def _connect(database: Path, timeout_s: float, *, write: bool) -> sqlite3.Connection:
    uri = f"{database.as_uri()}?mode=rw" if write else read_uri(database)
    return sqlite3.connect(uri, uri=True, timeout=timeout_s, isolation_level=None)


def _use_write_ahead_log(database: Path, timeout_s: float) -> None:
    # readers (the server's poll) then never wait for a writer (training)
    with closing(_connect(database, timeout_s, write=True)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")


def _sqlite_problem(database: Path, timeout_s: float, error: sqlite3.Error) -> RegistryUnavailableError:
    text = str(error)
    if "locked" in text or "busy" in text:
        what, fix = f"stayed locked for {timeout_s:g} s", "end the process that holds it (see `fuser`), then try again"
    elif "readonly" in text or "read-only" in text or "unable to open" in text:
        what, fix = f"cannot be written: {text}", "make its folder writable or choose another run folder"
    else:
        what, fix = f"cannot be read: {text}", "restore it from a copy, or choose another run folder"
    return RegistryUnavailableError(f"The MLflow database {str(database)!r} {what}.", fix=fix)


def _missing(database: Path) -> RegistryUnavailableError:
    return RegistryUnavailableError(
        f"The MLflow database {str(database)!r} does not exist.",
        fix="train a model first, or name the run folder that holds it (--run or DEEPSEEK_RAY_RUN)",
    )


def _sqlite_path(uri: str) -> Path | None:
    """File behind a SQLite URI; None for a server."""
    if not uri.startswith("sqlite:"):
        if "://" not in uri:
            raise RegistryUnavailableError(f"stores.tracking_uri={uri!r} is no URI.", fix="write it as scheme://...")
        return None
    path = Path(uri.removeprefix("sqlite:///").partition("?")[0])
    if not path.is_absolute():
        raise RegistryUnavailableError(
            f"stores.tracking_uri={uri!r} is relative: each process would open another file.",
            fix="give it four slashes and an absolute path",
        )
    return path


@contextmanager
def _translated(uri: str) -> Iterator[None]:
    shown = hide_password(uri)
    try:
        yield
    except MlflowException as error:
        if error.error_code in _UNAVAILABLE:
            raise RegistryUnavailableError(
                f"The MLflow store {shown!r} does not answer: {first_line(error)}",
                fix="see whether another process holds it",
            ) from error
        raise RegistryError(
            f"The MLflow store {shown!r} refused: {first_line(error)}", fix="correct the request"
        ) from error
    except ModuleNotFoundError as error:
        raise RegistryUnavailableError(
            f"The MLflow store {shown!r} needs the package {error.name!r}.",
            fix="pip install 'deepseek-ray[postgres]'" if error.name == "psycopg" else f"install {error.name}",
        ) from error
    except (SQLAlchemyError, sqlite3.Error) as error:
        raise RegistryUnavailableError(
            f"The MLflow store {shown!r} does not answer: {first_line(error)}",
            fix="restore it or choose another run folder",
        ) from error
    except OSError as error:
        raise RegistryUnavailableError(
            f"Files of the MLflow store {shown!r} cannot be used: {error}.",
            fix="free space or make its folder writable",
        ) from error


def _experiment(client: MlflowClient, name: str, artifact_root: str, *, create: bool) -> str:
    found = client.get_experiment_by_name(name)
    if found is not None:
        return str(found.experiment_id)
    if not create:
        raise RegistryUnavailableError(
            f"The MLflow store holds no experiment {name!r}.",
            fix="train a model first, or name the run folder that holds it",
        )
    if not artifact_root and not client.tracking_uri.startswith("http"):  # only an MLflow server has a place of its own
        raise RegistryError(
            "stores.tracking_uri is a database, and stores.artifact_root is not set.",
            fix="set it to s3://bucket/prefix, or to a folder that all machines see",
        )
    location = f"{artifact_root.rstrip('/')}/{name}" if artifact_root else None
    try:
        return str(client.create_experiment(name, artifact_location=location))
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
        return _experiment(client, name, artifact_root, create=False)  # another machine was faster


def _artifact_root(root: str) -> str:
    return root if "://" in root or not root else Path(root).resolve().as_uri()


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
