"""Puts a model server together: the files that a URI or a path names, the loaded model, batcher, HTTP and gRPC."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepseek_ray.config import Config, StoreConfig
from deepseek_ray.errors import ConfigError
from deepseek_ray.logs import get_logger
from deepseek_ray.paths import RunPaths
from deepseek_ray.serving.model_folder import Kind, ModelFolder, look_into

logger = get_logger(__name__)

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


@dataclass(frozen=True)
class Target:
    """A model whose files are on this machine; plain values, so that a replica can be told.

    Args:
        path: its files.
        kind: what they are.
        name: in the routes.
        version: number in the registry, or "".
        run_id: the run that made it, or "".
        source: how the user named it.
    """

    path: str
    kind: Kind
    name: str
    version: str
    run_id: str
    source: str


def find(target: str, *, paths: RunPaths, stores: StoreConfig, cache: Path, name: str = "") -> Target:
    """Find a model and look into its folder; nothing is loaded.

    Args:
        target: ``models:/NAME@ALIAS``, ``models:/NAME/VERSION``, another MLflow URI, or a folder.
        paths: run whose store knows the URI.
        stores: settings of the stores.
        cache: folder for what has to be downloaded.
        name: in the routes; by default the registered name, or the folder's.

    Raises:
        ModelFormatError: there is no model, or none that may be loaded.
        RegistryError: the store does not know it.
        ConfigError: the name cannot stand in a route.
    """
    if not is_uri(target):
        folder = look_into(Path(target))
        return _checked(folder, name or Path(target).resolve().name, "", "", target)
    from deepseek_ray.registry import Tracking  # brings MLflow, whose import takes seconds
    from deepseek_ray.registry.located import locate

    tracking = Tracking.open(paths, stores, experiment="Default", create=False)
    located = locate(target, tracking, cache)
    return _checked(look_into(located.folder), name or located.name, located.version, located.run_id, target)


def is_uri(target: str) -> bool:
    """Whether a model is named by an MLflow URI and not by a folder."""
    return target.startswith(("models:/", "runs:/"))


def _checked(folder: ModelFolder, name: str, version: str, run_id: str, source: str) -> Target:
    if folder.kind == "mlflow":
        from deepseek_ray.registry.foreign import check_safe

        check_safe(folder.path)
    if not _NAME.fullmatch(name):
        raise ConfigError(f"{name!r} cannot stand in a route.", fix="choose a name with --name: letters, digits, . _ -")
    return Target(str(folder.path), folder.kind, name, version, run_id, source)


def open_app(
    target: Mapping[str, Any], settings: Mapping[str, Any], device: str, key: str, key_file: str = ""
) -> object:
    """The HTTP application of a model, with gRPC beside it; called inside the replica.

    Args:
        target: a :class:`Target` as a mapping.
        settings: a ``Config`` as a mapping.
        device: ``auto``, ``cpu`` or ``cuda``.
        key: the environment's API key, hashed, "" where the file of keys holds others.
        key_file: path of the file of keys, "" for none.
    """
    from deepseek_ray.serving.auth import Keyring
    from deepseek_ray.serving.batch_control import BatchControl
    from deepseek_ray.serving.batching import Batcher
    from deepseek_ray.serving.deadline import Patience
    from deepseek_ray.serving.model_app import ModelApp, ModelIdentity, ModelWork
    from deepseek_ray.serving.model_kinds import load
    from deepseek_ray.serving.model_records import Batch
    from deepseek_ray.serving.monitor import HttpMonitor
    from deepseek_ray.serving.rpc_server import attach
    from deepseek_ray.serving.slow_clients import ConnectionLimits, guard

    found, config = Target(**target), Config.model_validate(settings).serving
    model = load(ModelFolder(Path(found.path), found.kind), device)  # type: ignore[arg-type]
    monitor = HttpMonitor("records")
    monitor.model.labels(found.name, found.version, found.run_id).set(1)
    work = ModelWork(model, monitor)
    batcher: Batcher[Batch, Sequence[Any]] = Batcher(
        work.run,
        max_batch_size=config.max_batch_size,
        max_queued=config.max_queued_requests,
        control=BatchControl(config.max_batch_size, config.slo_p99_ms / 1e3, config.batch_buckets),
    )
    monitor.watch_queue(batcher.queue)
    identity = ModelIdentity(found.name, found.version, found.run_id, found.source)
    limits = {"max_rows": config.max_transactions, "max_body_bytes": config.max_body_bytes}
    keys = Keyring(key, Path(key_file) if key_file else None, rate=config.rate_per_key, burst_s=config.rate_burst_s)
    patience = Patience(config.request_timeout_s, config.slo_p99_ms / 1e3, config.max_batch_size)
    app = ModelApp(model, identity, batcher, keys, monitor, **limits, patience=patience, shutdown=batcher.close)
    attach(app, config)
    guard(ConnectionLimits.of(config), lambda reason: monitor.shed.labels(reason).inc())
    logger.info("%s (%s) serves", found.source, model.facts["kind"])
    return app
