"""What the service counts and times, in Prometheus' text format."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from deepseek_ray.serving.batch_queue import BatchQueue
from deepseek_ray.serving.drift_gauges import DriftGauges

_LATENCY_S = (0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
_STAGE_S = (0.0001, 0.00025, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
_SCORES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


class HttpMonitor:
    """The metrics that every service of ours has, in a registry of their own.

    Args:
        unit: what a batch consists of, in the plural.
    """

    content_type = CONTENT_TYPE_LATEST

    def __init__(self, unit: str) -> None:
        self.registry = CollectorRegistry()
        self.requests = self._counter("http_requests", "Requests by route and status.", "route", "status")
        self.latency = self._histogram("http_latency_seconds", "Request to response, by route.", _LATENCY_S, "route")
        self.stage = self._histogram("stage_seconds", "Time a batch spends in each stage.", _STAGE_S, "stage")
        self.batch_size = self._histogram(f"batch_{unit}", f"{unit.capitalize()} a batch.", _SIZES)
        self.model = self._gauge("model_info", "1 for the version that serves.", "name", "version", "run_id")
        self.swaps = self._counter("model_swaps", "Swaps of the live model.", "outcome")
        self._queue = self._gauge(f"queued_{unit}", f"{unit.capitalize()} that wait for the worker.")
        self.shed = self._counter("shed_requests", "Requests turned away under load, by reason.", "reason")
        self._age = self._gauge("queue_age_seconds", f"How long the oldest of the {unit} has waited.")
        self._cap = self._gauge("batch_cap", f"{unit.capitalize()} that a batch may hold now.")
        self._service = self._gauge("predicted_batch_seconds", "Expected time of a batch of the cap's size.")
        self._loop = self._gauge("event_loop_seconds", "What a request waits for the event loop, in and out.")
        self._objective = self._gauge("latency_objective_seconds", "99 of 100 answers shall take no longer; 0: none.")
        self._of_route = cache(self._series)  # looking a series up by its labels costs more than counting

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"deepseek_ray_{name}", text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(f"deepseek_ray_{name}", text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        return Histogram(f"deepseek_ray_{name}", text, labels, buckets=buckets, registry=self.registry)

    def answered(self, route: str, status: int, seconds: float) -> None:
        """Count and time one request."""
        count, time_it = self._of_route(route, status)
        count.inc()
        time_it.observe(seconds)

    def _series(self, route: str, status: int) -> tuple[Counter, Histogram]:
        return self.requests.labels(route, str(status)), self.latency.labels(route)

    def show_version(self, name: str, version: str, run_id: str) -> None:
        """Name the version that serves from now on."""
        self.model.clear()
        self.model.labels(name, version, run_id).set(1)

    def watch_queue(self, queue: BatchQueue[Any]) -> None:
        """Read the queue and its control whenever the metrics are read."""
        control = queue.control
        self._queue.set_function(lambda: queue.queued)
        self._age.set_function(lambda: queue.age_s(time.perf_counter()))
        self._cap.set_function(lambda: control.cap)
        self._service.set_function(lambda: control.batch_s(control.cap))
        self._loop.set_function(lambda: control.loop_s)
        self._objective.set(control.objective_s)

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Time one stage of a batch."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.stage.labels(stage).observe(time.perf_counter() - start)

    def render(self) -> bytes:
        """The text exposition of every metric."""
        return generate_latest(self.registry)


class ModelMonitor(HttpMonitor):
    """All metrics of a model server."""

    def __init__(self) -> None:
        super().__init__("records")
        self.refused = self._gauge("version_refused", "1 while the alias names a version that cannot serve here.")
        self.fallback = self._gauge("last_good_serves", "1 while the kept copy of the last good version serves.")


class Monitor(HttpMonitor):
    """All metrics of the risk service."""

    def __init__(self) -> None:
        super().__init__("transactions")
        self.score = self._histogram("fraud_probability", "Scores given, by version.", _SCORES, "version")
        self.predictions = self._counter("predictions", "Decisions by outcome and version.", "decision", "version")
        self.cold = self._counter("cold_keys", "Keys scored without history.", "key")
        self.degraded = self._counter("degraded", "Scores given while histories could not be read.")
        self.feedback = self._counter("feedback", "Labels received.", "is_fraud", "outcome")
        self.threshold = self._gauge("decision_threshold", "Review at or above this probability.")
        self.pending = self._gauge("state_write_failures", "1 while feature state waits to be written.")
        self.unlogged = self._gauge("log_write_failures", "1 while the prediction log cannot be written.")
        self._disk = self._gauge("log_disk_free_bytes", "Room left on the disk that holds the prediction log.")
        self.drift = DriftGauges(self.registry)

    def watch_disk(self, folder: Path) -> None:
        """Read the room left on a folder's disk whenever the metrics are read."""
        self._disk.set_function(lambda: shutil.disk_usage(folder).free)

    def show_model(self, name: str, version: str, run_id: str, threshold: float) -> None:
        """Name the version that serves from now on."""
        self.show_version(name, version, run_id)
        self.threshold.set(threshold)
