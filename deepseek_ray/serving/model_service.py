"""Puts a model server together in its replica: the loaded model, follower of its alias, batcher, HTTP and gRPC."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deepseek_ray.config import Config
from deepseek_ray.logs import get_logger
from deepseek_ray.paths import RunPaths
from deepseek_ray.registry import Registry, Tracking
from deepseek_ray.serving.auth import Keyring
from deepseek_ray.serving.batch_control import BatchControl
from deepseek_ray.serving.batching import Batcher
from deepseek_ray.serving.deadline import Patience
from deepseek_ray.serving.follower import Reopening
from deepseek_ray.serving.model_app import ModelApp
from deepseek_ray.serving.model_follower import Loader, ModelFollower, start_version
from deepseek_ray.serving.model_kept import Following, KeptModel
from deepseek_ray.serving.model_kinds import Device
from deepseek_ray.serving.model_records import Batch
from deepseek_ray.serving.model_slot import Answers, ModelSlot, ModelWork
from deepseek_ray.serving.model_target import Target, alias_of, find
from deepseek_ray.serving.monitor import ModelMonitor
from deepseek_ray.serving.rpc_server import attach
from deepseek_ray.serving.slow_clients import ConnectionLimits, guard

logger = get_logger(__name__)


class ModelService:
    """One process's model server: ``app`` is its HTTP face.

    Args:
        target: the model.
        config: limits, and the stores that know its alias.
        device: where it computes.
        keys: who may call.
        following: how its alias is followed, None for a model that stays.

    Attributes:
        slot: the version that serves.
        follower: None for a model that stays.

    Raises:
        ModelFormatError, RegistryError: the model cannot serve, and there is no copy of one that can.
    """

    def __init__(
        self, target: Target, config: Config, device: Device, keys: Keyring, following: Following | None = None
    ) -> None:
        serving = config.serving
        loader = Loader(device, serving.batch_buckets)
        found, model, fallback = start_version(target, following, loader.ready)
        self.monitor = ModelMonitor()
        self.slot = ModelSlot(model, found.identity, self.monitor)
        self.batcher: Batcher[Batch, Answers] = Batcher(
            ModelWork(self.slot, self.monitor, serving.batch_buckets).run,
            max_batch_size=serving.max_batch_size,
            max_queued=serving.max_queued_requests,
            control=BatchControl(serving.max_batch_size, serving.slo_p99_ms / 1e3, serving.batch_buckets),
        )
        self.monitor.watch_queue(self.batcher.queue)
        self.follower = self._follower(found, config, loader, following, fallback) if following else None
        self.app = ModelApp(
            self.slot,
            self.batcher,
            keys,
            self.monitor,
            max_rows=serving.max_transactions,
            max_body_bytes=serving.max_body_bytes,
            patience=Patience(serving.request_timeout_s, serving.slo_p99_ms / 1e3, serving.max_batch_size),
            shutdown=self.close,
            standing=self.follower.standing if self.follower else dict,
        )
        self.app.root = following.root if following else ""
        logger.info("%s (%s) serves", found.source, model.facts["kind"])

    def start(self) -> None:
        """Follow the alias, if there is one to follow."""
        if self.follower:
            self.follower.start()

    def close(self) -> None:
        """Answer what waits, and stop."""
        if self.follower:
            self.follower.close()
        self.batcher.close()

    def _follower(
        self, found: Target, config: Config, loader: Loader, following: Following, fallback: str
    ) -> ModelFollower:
        named = alias_of(found.source)
        assert named is not None, f"{found.source!r} names no alias"
        paths, (name, alias) = RunPaths(Path(following.root)), named

        def opened() -> Registry:
            return Registry(Tracking.open(paths, config.stores, experiment="Default", create=False), name)

        def fetched(version: str, cache: Path) -> Target:
            uri = f"models:/{name}/{version}"
            return find(uri, paths=paths, stores=config.stores, cache=cache, name=found.name, source=found.source)

        return ModelFollower(
            self.slot,
            found,
            Reopening(opened),
            alias,
            fetched,
            loader,
            KeptModel(Path(following.kept)),
            fallback=fallback,
            monitor=self.monitor,
            poll_s=config.serving.poll_registry_s,
        )


def open_app(
    target: Mapping[str, Any],
    settings: Mapping[str, Any],
    device: Device,
    key: str,
    key_file: str = "",
    following: Mapping[str, Any] | None = None,
) -> ModelApp:
    """The HTTP application of a model, with gRPC beside it; called inside the replica.

    Args:
        target: a :class:`Target` as a mapping.
        settings: a ``Config`` as a mapping.
        device: where it computes.
        key: the environment's API key, hashed, "" where the file of keys holds others.
        key_file: path of the file of keys, "" for none.
        following: a :class:`Following` as a mapping, None for a model that stays.
    """
    config = Config.model_validate(settings)
    serving = config.serving
    keys = Keyring(key, Path(key_file) if key_file else None, rate=serving.rate_per_key, burst_s=serving.rate_burst_s)
    follow = Following(**following) if following else None
    service = ModelService(Target(**target), config, device, keys, follow)
    service.start()
    attach(service.app, serving)
    guard(ConnectionLimits.of(serving), lambda reason: service.monitor.shed.labels(reason).inc())
    return service.app
