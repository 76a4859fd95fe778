"""The one door to Feast: registry of vectors, offline store of their history, online store of live states.

A run has its own Feast repository in ``RunPaths.feature_store``. Offline, one folder of parquet files a service,
appended to under a lock (Feast's own concurrent append left unreadable files). Online, states are read and written
directly with ready-made messages: ``get_online_features`` and ``push`` cost 2-20 times more (docs/features.md).

    N  rows     F  features     S  sequence length     C  sequence channels
"""

from __future__ import annotations

import fcntl
import importlib.util
import os
import shutil
import sqlite3
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

import polars as pl
import yaml

from deepseek_ray.data import offline_store, redis_store, windows
from deepseek_ray.data.batch_engine import SEQUENCE_CHANNELS, FeatureTable
from deepseek_ray.data.events import SECOND_US
from deepseek_ray.data.stream_engine import StreamEngine
from deepseek_ray.data.windows import Declaration, VectorSpec
from deepseek_ray.errors import ConfigError, EnvironmentProblemError, FeatureError
from deepseek_ray.logs import silence_telemetry
from deepseek_ray.paths import RunPaths
from deepseek_ray.sqlite import insert_rows, prepare_writer

silence_telemetry()
# Feast's import switches prometheus_client to files shared by forked servers, for the whole process: ours is loaded
# first, and the switch is taken back.
_FEAST_SWITCHES = {"PROMETHEUS_MULTIPROC_DIR", "PROMETHEUS_MULTIPROCESS_DIR"} - os.environ.keys()

import prometheus_client  # noqa: E402, F401 - decides once, when it is imported
from feast import FeatureStore  # noqa: E402 - after telemetry is off
from feast.infra.key_encoding_utils import serialize_entity_key  # noqa: E402
from feast.infra.online_stores.helpers import compute_table_id  # noqa: E402
from feast.protos.feast.types.EntityKey_pb2 import EntityKey  # noqa: E402
from feast.protos.feast.types.Value_pb2 import Value  # noqa: E402

for _name in _FEAST_SWITCHES:
    os.environ.pop(_name, None)

REPOSITORY = windows.DECLARATION.parent
_COPIED = ("definitions.py", "windows.yaml", ".feastignore")
_STATE_VIEW, _STATE = "entity_state", "state"
_BUSY_TIMEOUT_MS = 5_000
_READ_CHUNK = 10_000
_REPLACE = "ON CONFLICT (entity_key, feature_name) DO UPDATE SET value = excluded.value, event_ts = excluded.event_ts"


class FeatureClient:
    """Feast for one run. Cheap to make and to pickle; Feast's store opens on first use.

    Args:
        paths: the run.
        online_store: ``redis://host:port`` (``rediss`` for TLS; the password comes from DEEPSEEK_RAY_REDIS_PASSWORD),
            else the store that the run was applied with; SQLite in the run folder when it was applied without one.
    """

    def __init__(self, paths: RunPaths, online_store: str = "") -> None:
        self.paths, self.online_store = paths, online_store
        self._opened: Any = None
        self._view: Any = None

    def __reduce__(self) -> tuple[Any, ...]:
        return FeatureClient, (self.paths, self.online_store)

    def apply(self) -> None:
        """Write the run's Feast repository and register every vector of features/windows.yaml; safe to repeat.

        Raises:
            ConfigError: the online store's URL is not understood.
            EnvironmentProblemError: the run folder cannot be written.
        """
        folder = self.paths.feature_store
        with _writing(folder):
            settings = yaml.safe_load((REPOSITORY / "feature_store.yaml").read_text(encoding="utf-8"))
            if self.online_store:
                settings |= redis_store.settings(self.online_store, folder)
            for name in _COPIED:
                shutil.copyfile(REPOSITORY / name, folder / name)
            (folder / "feature_store.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
            definitions = _load_module(folder / "definitions.py")
            objects = [definitions.card, definitions.owner, definitions.entity_state]
            FeatureStore(repo_path=str(folder)).apply(
                [*objects, *definitions.VIEWS.values(), *definitions.SERVICES.values()]
            )
        self._opened = self._view = None

    def services(self) -> dict[str, dict[str, str]]:
        """Registered service -> its tags (``vector`` and ``digest``)."""
        return {service.name: dict(service.tags) for service in self._store().list_feature_services()}

    def declaration(self) -> Declaration:
        """The declaration this run was applied with."""
        return windows.load(self.paths.feature_store / "windows.yaml")

    def write_offline(self, table: FeatureTable) -> Path:
        """Append vectors to the offline store as one parquet file, whole or not at all.

        Raises:
            FeatureError: the service is not registered with this digest.
        """
        folder = self._registered(table.service, table.digest)
        with _writing(folder):
            return offline_store.append(table, folder)

    @contextmanager
    def offline_part(self, spec: VectorSpec) -> Iterator[Path]:
        """A folder to write parquet files of vectors to, by any process; the store has them once the block ends well.

        Raises:
            FeatureError: the service is not registered with this digest.
        """
        folder = self._registered(spec.service, spec.digest)
        with _writing(folder):
            files = offline_store.stage(folder)
        try:
            yield files
            with _writing(folder):
                offline_store.adopt(files, folder)
        finally:
            shutil.rmtree(files, ignore_errors=True)

    def historical(self, entities: pl.DataFrame, service: str) -> FeatureTable:
        """The point-in-time join: for each (card_id, order_us) the card's newest vector at or before that order.

        The same rows as Feast's ``get_historical_features``, by a Polars as-of join. A vector contains the event it is
        stamped with: ask at ``order_us`` for the vector of that event. Of vectors written twice the last one counts.

        Args:
            entities: columns ``card_id`` and ``order_us``.
            service: registered service.

        Raises:
            FeatureError: nothing is stored, or some card has no vector at or before its order.
        """
        keys = offline_store.keys(self._offline(service))
        if not keys.width:
            raise FeatureError(f"No vectors of {service!r} are stored in this run.", fix="call write_offline() first")
        keys = keys.sort("order_us", maintain_order=True).unique(
            ["card_id", "order_us"], keep="last", maintain_order=True
        )
        wanted = entities.select("card_id", "order_us").with_row_index("row").sort("order_us")
        joined = wanted.join_asof(keys, on="order_us", by="card_id", check_sortedness=False).sort("row")
        lost = joined.filter(pl.col("place").is_null())
        if lost.height:
            problem = f"{lost.height} rows have no vector, the first is card {lost['card_id'][0]!r}."
            raise FeatureError(problem, fix="compute and write_offline() the features of these transactions")
        return self._table(offline_store.take(self._offline(service), joined.select("file", "place")), service)

    def warm(self, engine: StreamEngine, transactions: pl.DataFrame) -> int:
        """Fill the online store by ``engine.warm`` and keep the rows, so that served vectors can be verified.

        Returns the number of states written.
        """
        folder = self.paths.warmed
        with _writing(folder):
            written = engine.warm(transactions)
            temporary = folder / f".{engine.spec.service}.writing"
            transactions.write_parquet(temporary)
            os.replace(temporary, self._warmed(engine.spec.service))
        return written

    def warmed(self, service: str) -> pl.DataFrame | None:
        """The transactions the service's states were warmed with, None when it started cold."""
        path = self._warmed(service)
        return pl.read_parquet(path) if path.exists() else None

    def read_states(self, keys: Sequence[str]) -> list[bytes | None]:
        """State blobs from the online store in the order of the keys, None where there is none; one round trip."""
        store, view = self._store(), self._state_view()
        blobs: list[bytes | None] = []
        for first in range(0, len(keys), _READ_CHUNK):
            messages = [_entity_key(key) for key in keys[first : first + _READ_CHUNK]]
            with redis_store.reaching(store.config.online_store):
                found = _online(store).online_read(store.config, view, messages, [_STATE])
            # Redis gives an empty value for what it does not hold; a state is never empty
            blobs += [(values[_STATE].bytes_val or None) if values else None for _, values in found]
        return blobs

    def write_states(self, states: Iterable[tuple[str, bytes, int]]) -> None:
        """Write (key, blob, order_us) triples in one batch. One process writes a key: the newest write wins."""
        store, view = self._store(), self._state_view()
        if store.config.online_store.type == "sqlite":
            _write_sqlite(store, view, states)
            return
        rows = [(_entity_key(key), {_STATE: Value(bytes_val=blob)}, _time(order), None) for key, blob, order in states]
        if rows:
            with redis_store.reaching(store.config.online_store):
                _online(store).online_write_batch(store.config, view, rows, None)

    def close(self) -> None:
        """Release the online store's connection."""
        if self._opened is not None:
            online, config = _online(self._opened), self._opened.config
            sqlite = config.online_store.type == "sqlite"
            (online._get_conn(config) if sqlite else online._get_client(config.online_store)).close()
        self._opened = self._view = None

    def _store(self) -> Any:
        if self._opened is None:
            if not (self.paths.feature_store / "registry.db").exists():
                problem = f"The run {str(self.paths.root)!r} has no feature store."
                raise FeatureError(problem, fix="call apply() first, or name the right run")
            opened = FeatureStore(repo_path=str(self.paths.feature_store))
            self._check_store(opened)
            _tune(opened)
            self._opened = opened
        return self._opened

    def _check_store(self, opened: Any) -> None:
        """The states lie where the run was applied; another store would be empty, and every card new."""
        used = redis_store.address(opened.config.online_store)
        wanted = redis_store.address_of(self.online_store) if self.online_store else used
        if wanted != used:
            problem = f"stores.online_store = {self.online_store!r}, but this run uses {used or 'SQLite'!r}."
            raise ConfigError(problem, fix="give the setting to train already, and warm again")

    def _state_view(self) -> Any:
        if self._view is None:
            self._view = self._store().get_feature_view(_STATE_VIEW)
        return self._view

    def _offline(self, service: str) -> Path:
        return self.paths.feature_store / "offline" / service

    def _warmed(self, service: str) -> Path:
        return self.paths.warmed / f"{service}.parquet"

    def _registered(self, service: str, digest: str) -> Path:
        """Where the vectors of a service go, when it is registered with the digest they were computed by."""
        tags = self.services().get(service)
        if tags is None or tags["digest"] != digest:
            problem = f"Service {service!r} with digest {digest[:12]} is not registered in this run."
            raise FeatureError(problem, fix="apply() the declaration the vectors were computed with")
        return self._offline(service)

    def _table(self, rows: pl.DataFrame, service: str) -> FeatureTable:
        tags = self.services()[service]
        spec = self.declaration().vector(tags["vector"])
        values, sequence = (offline_store.flat(rows[name]) for name in ("feature_values", "sequence"))
        return FeatureTable(
            rows["order_us"].to_numpy(),
            rows["transaction_id"].to_numpy(),
            rows["card_id"].to_numpy(),
            values.reshape(len(rows), len(spec.names)),
            sequence.reshape(len(rows), -1, len(SEQUENCE_CHANNELS)),
            spec.names,
            service,
            tags["digest"],
        )


def _online(store: Any) -> Any:
    return store._get_provider().online_store


def _tune(store: Any) -> None:
    """SQLite: a write-ahead log, no fsync a write, and patience with a second process. Redis: one time-out a call."""
    if store.config.online_store.type == "redis":
        redis_store.try_once(_online(store)._get_client(store.config.online_store))
    if store.config.online_store.type == "sqlite":
        connection = _online(store)._get_conn(store.config)
        connection.execute(f"PRAGMA busy_timeout={_BUSY_TIMEOUT_MS}")
        _use_write_ahead_log(connection)
        connection.execute("PRAGMA synchronous=NORMAL")
        prepare_writer(connection)


def _use_write_ahead_log(connection: sqlite3.Connection) -> None:
    """The switch needs the file for itself and does not wait for it: ask again while others switch it too."""
    deadline = time.monotonic() + _BUSY_TIMEOUT_MS / 1000
    while connection.execute("PRAGMA journal_mode").fetchone()[0] != "wal":
        try:
            connection.execute("PRAGMA journal_mode=WAL")
        except sqlite3.OperationalError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def _write_sqlite(store: Any, view: Any, states: Iterable[tuple[str, bytes, int]]) -> None:
    """The rows that Feast's ``online_write_batch`` writes, at two thirds of its CPU: it packs each key again and runs
    a statement a row (feast 0.67, infra/online_stores/sqlite.py)."""
    version = store.config.entity_key_serialization_version
    rows = [
        (_packed(key, version), _STATE, Value(bytes_val=blob).SerializeToString(), _stamp(order // SECOND_US))
        for key, blob, order in states
    ]
    table = compute_table_id(store.config.project, view, store.config.registry.enable_online_feature_view_versioning)
    connection = _online(store)._get_conn(store.config)
    with connection:
        insert_rows(connection, f'INSERT INTO "{table}" (entity_key, feature_name, value, event_ts)', rows, _REPLACE)


@lru_cache(maxsize=1 << 10)
def _stamp(seconds: int) -> int:
    """As Feast's adapter does it: UTC taken for local time, which its converter takes back."""
    return int(datetime.fromtimestamp(seconds, UTC).replace(tzinfo=None).timestamp())


@lru_cache(maxsize=1 << 16)
def _packed(key: str, version: int) -> bytes:
    return bytes(serialize_entity_key(_entity_key(key), version))


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """One writer at a time, over processes."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / ".write.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
    except OSError as error:
        problem = f"The feature store {str(folder)!r} cannot be written: {error.strerror}."
        raise EnvironmentProblemError(problem, fix="free space or change permissions") from error


def _load_module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("deepseek_ray_feature_definitions", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _entity_key(key: str) -> Any:
    return EntityKey(join_keys=["state_key"], entity_values=[Value(string_val=key)])


def _time(order_us: int) -> datetime:
    return datetime.fromtimestamp(order_us / SECOND_US, UTC)
