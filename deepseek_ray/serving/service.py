"""Puts the risk service together from a run folder: champion, features, log, batcher, HTTP application."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import torch

from deepseek_ray.config import Config, ServingConfig
from deepseek_ray.data import windows
from deepseek_ray.data.events import Transaction
from deepseek_ray.data.feature_client import FeatureClient
from deepseek_ray.data.prediction_log import PredictionLog
from deepseek_ray.data.state import StateStore
from deepseek_ray.data.stream_engine import StreamEngine
from deepseek_ray.logs import get_logger
from deepseek_ray.paths import RunPaths
from deepseek_ray.registry import Registry
from deepseek_ray.serving.app import RiskApp, Service
from deepseek_ray.serving.auth import Keyring
from deepseek_ray.serving.batch_control import BatchControl
from deepseek_ray.serving.batching import Batcher
from deepseek_ray.serving.champion import ChampionWatcher, InputContract, contract_of, load_champion, to_live, warm_up
from deepseek_ray.serving.commands import Command, Result
from deepseek_ray.serving.compaction import Compactor
from deepseek_ray.serving.deadline import Patience
from deepseek_ray.serving.keys import file_of
from deepseek_ray.serving.live_features import LiveFeatures
from deepseek_ray.serving.monitor import Monitor
from deepseek_ray.serving.predictor import Predictor
from deepseek_ray.serving.slow_clients import ConnectionLimits, guard
from deepseek_ray.serving.wire import Limits

logger = get_logger(__name__)

REHEARSAL = Transaction(
    transaction_id="rehearsal",
    event_time=datetime(2200, 1, 1, tzinfo=UTC),  # stale to no card, should one have the name
    card_id="rehearsal",
    terminal_id="rehearsal",
    device_id="rehearsal",
    amount_cents=0,
)


class RiskService:
    """One process's service: ``app`` is its HTTP face, ``start()`` lets it follow the registry.

    Args:
        paths: the run whose registry, feature store and log are used.
        key: the environment's API key, "" where the file of keys holds others.
        registry: the registry, open.
        store: where feature states live.
        declaration: the feature declaration that the store's run was set up with.
        config: limits.

    Raises:
        RegistryError: there is no champion, or the registry does not answer.
        ModelFormatError: the champion's files are altered.
        FeatureError: the champion reads a vector that this code does not compute.
        EnvironmentProblemError: the prediction log cannot be used.
    """

    def __init__(
        self,
        paths: RunPaths,
        registry: Registry,
        store: StateStore,
        declaration: windows.Declaration,
        config: ServingConfig,
        key: str,
    ) -> None:
        torch.set_num_threads(1)  # rows are few: more threads only wait for each other
        info, model = load_champion(registry)
        contract = contract_of(info, model, declaration)
        self.monitor = Monitor()
        self.log = PredictionLog(paths.prediction_log)
        self.features = LiveFeatures(_engine_maker(declaration, contract), store)
        self.recovered = self.features.recover(self.log)
        warm_up(model)
        self._rehearse()
        live = to_live(info, model, self.log.threshold(info.version))
        skew_us = round(config.max_future_skew_s * 1e6)
        buckets = config.batch_buckets
        self.predictor = Predictor(self.features, self.log, live, self.monitor, skew_us=skew_us, buckets=buckets)
        self.batcher: Batcher[Command, Result] = Batcher(
            self.predictor.run,
            max_batch_size=config.max_batch_size,
            max_queued=config.max_queued_requests,
            after=self.predictor.settle,
            control=BatchControl(config.max_batch_size, config.slo_p99_ms / 1e3, config.batch_buckets),
        )
        self.monitor.watch_queue(self.batcher.queue)
        self.watcher = self._watcher(registry, contract, config.poll_registry_s)
        self.compactor = Compactor(paths, config.compact_every_s, self._archived)
        keys = file_of(paths.root, config.api_keys_file)
        keyring = Keyring(key, keys, rate=config.rate_per_key, burst_s=config.rate_burst_s)
        self.app = RiskApp(self._service(config), keyring)
        logger.info("version %s serves; %d events and %d labels looked at in recovery", info.version, *self.recovered)

    def start(self) -> None:
        """Follow the registry, and compact the log on its schedule."""
        self.watcher.start()
        self.compactor.start()

    def close(self) -> None:
        """Answer what waits, write what is kept, close the log. Closing twice is closing once."""
        self.watcher.close()
        self.compactor.close()
        self.batcher.close()
        self.predictor.close()

    def _rehearse(self) -> None:
        """Go a request's way through log and feature store, leaving nothing behind: the first one does not pay."""
        self.log.by_transaction([REHEARSAL.transaction_id])
        self.features.last_event_us([REHEARSAL.card_id])
        self.features.peek(REHEARSAL)

    def _archived(self, last: int) -> None:
        self.predictor.archived = last  # the worker drops the vectors: it alone writes to the log

    def _watcher(self, registry: Registry, contract: InputContract, poll_s: float) -> ChampionWatcher:
        return ChampionWatcher(
            registry,
            contract,
            live=lambda: self.predictor.live,
            swap=self.predictor.swap,
            threshold=self.log.threshold,
            monitor=self.monitor,
            poll_s=poll_s,
        )

    def _service(self, config: ServingConfig) -> Service:
        return Service(
            batcher=self.batcher,
            monitor=self.monitor,
            limits=Limits(config.max_transactions, round(config.max_future_skew_s * 1e6)),
            max_body_bytes=config.max_body_bytes,
            live=lambda: self.predictor.live,
            refused=lambda: self.watcher.refused,
            healthy=lambda: self.predictor.healthy,
            shutdown=self.close,
            patience=Patience(config.request_timeout_s, config.slo_p99_ms / 1e3, config.max_batch_size),
        )


def open_app(run: str, settings: dict[str, object], key: str) -> RiskApp:
    """The HTTP application of a run; takes plain values, so that a replica can be told to call it.

    Args:
        run: run folder.
        settings: a ``Config`` as a mapping.
        key: the API key.
    """
    config = Config.model_validate(settings)
    paths = RunPaths(Path(run)).create()
    registry = Registry.open(paths, config.stores, name=config.model_name, create=False)
    store = FeatureClient(paths, config.stores.online_store)
    service = RiskService(paths, registry, store, store.declaration(), config.serving, key)
    service.start()
    serving = config.serving
    limits = ConnectionLimits(serving.header_timeout_s, serving.body_timeout_s, serving.max_connections)
    guard(limits, lambda reason: service.monitor.shed.labels(reason).inc())
    return service.app


def _engine_maker(declaration: windows.Declaration, contract: InputContract) -> Callable[[StateStore], StreamEngine]:
    def make(store: StateStore) -> StreamEngine:
        return StreamEngine(
            declaration,
            contract.vector,
            store,
            label_delay_days=contract.label_delay_days,
            sequence_len=contract.sequence_len,
        )

    return make
