"""One process at a time opens an MLflow store: the first one runs its migrations, which do not bear company."""

from __future__ import annotations

import fcntl
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy import NullPool, create_engine, text

from deepseek_ray.errors import RegistryUnavailableError
from deepseek_ray.logs import hide_password
from deepseek_ray.paths import RunPaths

_POLL_S = 0.05
_ADVISORY_KEY = 0x6465657073656B  # any number that all of us use and nobody else


@contextmanager
def first_touch(uri: str, database: Path | None, paths: RunPaths, timeout_s: float) -> Iterator[None]:
    """Hold the store's lock while the block runs.

    A file beside the SQLite database, or in the run folder for a server. PostgreSQL keeps a lock of its own too:
    machines share it, not the folder.

    Args:
        uri: the store.
        database: the SQLite file, None for a server.
        paths: the run.
        timeout_s: longest wait.

    Raises:
        RegistryUnavailableError: the folder cannot be written, or another process held the lock all the time.
    """
    path = database.with_name(f"{database.name}.lock") if database else paths.root / "mlflow.lock"
    with _file_lock(path, timeout_s):
        if uri.startswith("postgresql"):
            with _advisory_lock(uri, timeout_s):
                yield
        else:
            yield


@contextmanager
def _advisory_lock(uri: str, timeout_s: float) -> Iterator[None]:
    engine = create_engine(uri, poolclass=NullPool, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:  # the lock is the connection's: it ends with it, whatever happens
        ask = text("SELECT pg_try_advisory_lock(:key)")
        _wait(lambda: bool(connection.scalar(ask, {"key": _ADVISORY_KEY})), hide_password(uri), timeout_s)
        yield


@contextmanager
def _file_lock(path: Path, timeout_s: float) -> Iterator[None]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = path.open("a")
    except OSError as error:
        raise RegistryUnavailableError(
            f"The folder of the MLflow store {str(path.parent)!r} cannot be written: {error.strerror}.",
            fix="make it writable or choose another run folder",
        ) from error
    with handle:
        _wait(lambda: _try_lock(handle.fileno()), str(path), timeout_s)
        yield


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _wait(taken: Callable[[], bool], where: str, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not taken():
        if time.monotonic() > deadline:
            raise RegistryUnavailableError(
                f"Another process has been initialising the MLflow store for {timeout_s:g} s ({where!r}).",
                fix="wait for it or end it, then try again",
            )
        time.sleep(_POLL_S)
