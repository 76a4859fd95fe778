"""Puts the risk service together from a run folder: champion, features, log, batcher, HTTP application."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from datetime import UTC, datetime
from pathlib import Path

import torch

from deepseek_ray.config import Config, ServingConfig
from deepseek_ray.data import windows
from deepseek_ray.data.events import Transaction
from deepseek_ray.data.feature_client import FeatureClient
from deepseek_ray.data.prediction_log import PredictionLog
from deepseek_ray.data.state import StateStore
from deepseek_ray.errors import EnvironmentProblemError
from deepseek_ray.logs import get_logger
from deepseek_ray.models.risk import RiskModel
from deepseek_ray.online.recorded import decide_again
from deepseek_ray.paths import RunPaths, exclusive
from deepseek_ray.registry import Registry, TrafficBook, VersionInfo
from deepseek_ray.serving import handover
from deepseek_ray.serving.app import RiskApp, Service
from deepseek_ray.serving.arm_metrics import ArmMetrics
from deepseek_ray.serving.auth import Keyring
from deepseek_ray.serving.background import BackgroundProgram
from deepseek_ray.serving.batch_control import BatchControl
from deepseek_ray.serving.batching import Batcher
from deepseek_ray.serving.champion import InputContract, contract_of, to_live, warm_up
from deepseek_ray.serving.commands import Command, LiveModel, Result, TaskCommand
from deepseek_ray.serving.compaction import Compactor
from deepseek_ray.serving.deadline import Patience
from deepseek_ray.serving.drift_watch import DriftWatch
from deepseek_ray.serving.follower import Reopening
from deepseek_ray.serving.keys import file_of
from deepseek_ray.serving.last_good import LastGood, start_version
from deepseek_ray.serving.live_features import LiveFeatures
from deepseek_ray.serving.monitor import Monitor
from deepseek_ray.serving.predictor import Predictor
from deepseek_ray.serving.release_steps import ReleaseSteps
from deepseek_ray.serving.rollout import Rollout
from deepseek_ray.serving.rpc_server import attach
from deepseek_ray.serving.shadow import ShadowScorer
from deepseek_ray.serving.shadow_trial import ShadowTrial
from deepseek_ray.serving.slow_clients import ConnectionLimits, guard
from deepseek_ray.serving.standing import standing_of
from deepseek_ray.serving.watcher import Hooks, RegistryWatcher
from deepseek_ray.serving.wire import Limits
from deepseek_ray.sqlite import Checkpointer

logger = get_logger(__name__)

FLUSH_EVERY_S, FLUSH_STATES = 1.0, 300
"""Under load; a few milliseconds of writing. What a crash takes from memory is in the log and is replayed."""

PREDECESSOR_S = 10.0
"""A replica that is being replaced may take so long to let go of the run."""

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
        key: the environment's API key or what ``keys.hashed`` made of it, "" where the file of keys holds others.
        registry: the registry, open, or what opens it: it may be away while a last good version is kept.
        store: where feature states live.
        declaration: the feature declaration that the store's run was set up with.
        config: limits.
        online_store: address of the store, "" for the run's own.

    Raises:
        RegistryError: there is no champion, or the registry does not answer, and no last good version is kept.
        ModelFormatError: the champion's files are altered, and no last good version is kept.
        FeatureError: the champion reads a vector that this code does not compute.
        EnvironmentProblemError: the prediction log cannot be used, or another service has the run.
    """

    def __init__(
        self,
        paths: RunPaths,
        registry: Registry | Callable[[], Registry],
        store: StateStore,
        declaration: windows.Declaration,
        config: ServingConfig,
        key: str,
        *,
        online_store: str = "",
    ) -> None:
        torch.set_num_threads(1)  # rows are few: more threads only wait for each other
        find = registry if callable(registry) else lambda: registry
        self.last_good = LastGood(paths.last_good)
        info, model, self.fallback = start_version(find, self.last_good)
        contract = contract_of(info, model, declaration)
        self._paths, self._store, self._declaration, self._contract = paths, store, declaration, contract
        self._online_store = online_store
        self._closing = threading.Event()
        with ExitStack() as held:  # let go at once where the service cannot be made
            held.enter_context(_alone(paths))
            self._put_together(info, model, find, config, key)
            self._held = held.pop_all()

    def _put_together(
        self, info: VersionInfo, model: RiskModel, find: Callable[[], Registry], config: ServingConfig, key: str
    ) -> None:
        paths, contract = self._paths, self._contract
        self.monitor = Monitor()
        self.log = PredictionLog(paths.prediction_log)
        if (before := self.log.last_service()) not in ("", contract.vector.service):
            handover.prepare(paths, self._wanted(contract, before))
        self.features = LiveFeatures(handover.engine_maker(self._declaration, contract), self._store)
        self.recovered = self.features.recover(self.log)
        warm_up(model, config.batch_buckets)
        self._rehearse()
        live = to_live(info, model, self.log.threshold(info.version))
        skew_us = round(config.max_future_skew_s * 1e6)
        buckets = config.batch_buckets
        self.predictor = Predictor(self.features, self.log, live, self.monitor, skew_us=skew_us, buckets=buckets)
        self._settled_s = 0.0
        self.batcher: Batcher[Command, Result] = Batcher(
            self.predictor.run,
            max_batch_size=config.max_batch_size,
            max_queued=config.max_queued_requests,
            after=self._settle,
            idle=self._write,
            control=BatchControl(config.max_batch_size, config.slo_p99_ms / 1e3, config.batch_buckets),
        )
        self.monitor.watch_queue(self.batcher.queue)
        self._accompany(find, contract, config)
        self.compactor = Compactor(paths, config.compact_every_s, self._archived)
        self.checkpointer = Checkpointer([paths.prediction_log, paths.feature_store / "online.db"])
        self.companions: list[BackgroundProgram] = [self.compactor]
        self.monitor.watch_disk(paths.root)
        keys = file_of(paths.root, config.api_keys_file)
        keyring = Keyring(key, keys, rate=config.rate_per_key, burst_s=config.rate_burst_s)
        self.app = RiskApp(self._service(config), keyring)
        self.app.root = str(paths.root)
        logger.info("version %s serves; %d events and %d labels looked at in recovery", info.version, *self.recovered)

    def start(self) -> None:
        """Follow the registry, judge the arms, and start what runs on a schedule."""
        self.watcher.start()
        self.rollout.start()
        self.checkpointer.start()
        for program in self.companions:
            program.start()

    def close(self) -> None:
        """Answer what waits, write what is kept, close the log, let go of the run. Closing twice is closing once."""
        with self._held:
            self._closing.set()
            self.watcher.close()
            self.rollout.close()
            for program in self.companions:
                program.close()
            self.batcher.close()
            self.shadow.close()
            self.checkpointer.close()
            self.predictor.close()

    def _rehearse(self) -> None:
        """Go a request's way through log and feature store, leaving nothing behind: the first one does not pay.

        Raises:
            EnvironmentProblemError: the store is away at the first start; later ones do without it for a while.
        """
        self.log.by_transaction([REHEARSAL.transaction_id])
        if self.features.behind:
            return
        self.features.last_event_us([REHEARSAL.card_id])
        self.features.peek(REHEARSAL)

    def _settle(self) -> None:
        """Write state while no one waits for it; under load now and then, a little at a time."""
        if self.features.num_kept >= FLUSH_STATES or time.monotonic() - self._settled_s > FLUSH_EVERY_S:
            self._write()
        else:
            self.predictor.settle(write=False)

    def _write(self) -> None:
        self.predictor.settle()
        self._settled_s = time.monotonic()

    def _archived(self, last: int) -> None:
        self.predictor.archived = last  # the worker drops the vectors: it alone writes to the log

    def _accompany(self, find: Callable[[], Registry], contract: InputContract, config: ServingConfig) -> None:
        """What follows the registry and the arms, each on a thread of its own."""
        self.arm_metrics = arms = ArmMetrics(self.monitor.registry)
        arms.fallback.set(bool(self.fallback))
        self.shadow = ShadowScorer(lambda: self.predictor.plan.shadow, self._paths.shadow_scores, arms)
        self.predictor.witness = self.shadow.offer
        trial = ShadowTrial(self._paths.shadow_scores, self.log.path, self.shadow.calls)
        releases = ReleaseSteps(trial, lambda: self.watcher.arm_refusals, lambda number: decide_again(find(), number))
        self.rollout = Rollout(self.predictor, lambda: TrafficBook(find()), self.log.path, arms, releases=releases)
        hooks = Hooks(self.log.threshold, self.rollout.withdrawn, self._served, self._hand_over)
        self.watcher = RegistryWatcher(
            find, contract, self.predictor, hooks, monitor=self.monitor, metrics=arms, poll_s=config.poll_registry_s
        )

    def _wanted(self, contract: InputContract, before: str) -> handover.Wanted:
        return handover.Wanted(
            vector=contract.vector.name,
            sequence_len=contract.sequence_len,
            label_delay_days=contract.label_delay_days,
            before=before,
            online_store=self._online_store,
        )

    def _hand_over(self, info: VersionInfo, model: RiskModel, live: LiveModel) -> InputContract:
        """Let a champion serve that reads other features; in the watcher's thread.

        Raises:
            FeatureError: this code does not compute them.
            ServingError: their states could not be prepared; it is tried again.
        """
        before, contract = self._contract, contract_of(info, model, self._declaration)
        handover.check(before, contract)
        features = LiveFeatures(handover.engine_maker(self._declaration, contract), self._store, self.log)
        since = None
        if contract.vector.service != before.vector.service:
            wanted = self._wanted(contract, before.vector.service)
            since = handover.prepare_aside(self._paths, wanted, self._closing)

        def take_over() -> None:
            # vectors that share their states need no event again: the old features have just written them
            features.replay(self.log, since or self.log.last_rows())

        def work() -> None:
            self.predictor.hand_over(features, take_over, live)
            self.features, self._contract = features, contract

        asyncio.run(self.batcher.submit(TaskCommand(work), weight=0))
        logger.info("version %s reads %s: handed over", info.version, contract.vector.service)
        return contract

    def _served(self, info: VersionInfo) -> None:
        """Keep a copy of the champion that serves."""
        self.fallback = ""
        self.arm_metrics.fallback.set(0)
        try:
            self.last_good.keep(info)
        except (OSError, EnvironmentProblemError) as error:
            logger.error("version %s serves, but no copy of it could be kept: %s", info.version, error)

    def _service(self, config: ServingConfig) -> Service:
        return Service(
            batcher=self.batcher,
            monitor=self.monitor,
            limits=Limits(config.max_transactions, round(config.max_future_skew_s * 1e6)),
            max_body_bytes=config.max_body_bytes,
            live=lambda: self.predictor.live,
            refused=lambda: self.watcher.refused,
            standing=lambda: standing_of(self.predictor.plan, self.watcher, self.rollout, self.fallback),
            healthy=lambda: self.predictor.healthy,
            shutdown=self.close,
            patience=Patience(config.request_timeout_s, config.slo_p99_ms / 1e3, config.max_batch_size),
        )


def _alone(paths: RunPaths) -> AbstractContextManager[None]:
    """Keep other services off the run: each would hold feature states in memory as if it alone wrote them.

    The file is not the folder's usual lock, which a handover takes while the service lives.
    """
    folder = paths.last_good.parent
    folder.mkdir(parents=True, exist_ok=True)
    problem = f"Another service has the run {str(paths.root)!r} open: feature state and prediction log have one writer."
    fix = "stop the other service, or serve another run with --run"
    return exclusive(folder, problem, fix, name=".writer", wait_s=PREDECESSOR_S)


def open_app(run: str, settings: dict[str, object], key: str) -> RiskApp:
    """The HTTP application of a run; takes plain values, so that a replica can be told to call it.

    Args:
        run: run folder.
        settings: a ``Config`` as a mapping.
        key: the API key, hashed.
    """
    config = Config.model_validate(settings)
    paths = RunPaths(Path(run)).create()
    registry = Reopening(lambda: Registry.open(paths, config.stores, name=config.model_name, create=False))
    store = FeatureClient(paths, config.stores.online_store)
    service = RiskService(
        paths, registry, store, store.declaration(), config.serving, key, online_store=config.stores.online_store
    )
    drift = service.monitor.drift
    service.companions.append(DriftWatch(paths, config.model_dump(), lambda: service.predictor.live.version, drift))
    service.start()
    serving = config.serving
    attach(service.app, serving)
    guard(ConnectionLimits.of(serving), lambda reason: service.monitor.shed.labels(reason).inc())
    return service.app
