"""What is counted of each arm: for Prometheus, and for the guard."""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_CALL_S = (0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.05, 0.1, 0.25, 1.0)
RECENT_CALLS = 500


class ArmMetrics:
    """The arms' metrics. Scores and decisions are counted by version in serving/monitor.py."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"deepseek_ray_{name}", text, labels, registry=registry)

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"deepseek_ray_{name}", text, labels, registry=registry)

        arm = ("arm", "version")
        self.percent = gauge("arm_percent", "Share of the cards that an arm answers.", *arm)
        self.transactions = counter("arm_transactions", "Transactions answered by an arm.", *arm)
        self.errors = counter("arm_errors", "Model calls of an arm that failed; the champion answered.", *arm)
        text = "A model call of an arm, reasons included."
        self.latency = Histogram("deepseek_ray_arm_call_seconds", text, arm, buckets=_CALL_S, registry=registry)
        self.psi = gauge("arm_score_psi", "Population stability index of an arm's scores against the champion's.", *arm)
        self.evidence = gauge(
            "arm_evidence", "Natural logarithm of the Bayes factor that an arm is worse.", *arm, "test"
        )
        self.labels = gauge("arm_labels", "Decisions of an arm on its present step whose truth is known.", *arm)
        text = "Cards that met a mistake of an arm on its present step."
        self.mistakes = gauge("arm_mistaken_cards", text, *arm, "kind")
        self.moves = counter("traffic_moves", "Moves of the traffic that this service made.", "action", "cause")
        self.refused = gauge("arm_refused", "1 while an arm of the policy cannot serve.", "arm", "version")
        self.champion_refused = gauge("champion_refused", "1 while the registry's champion cannot serve here.")
        self.fallback = gauge("last_good_serves", "1 while the kept copy of the last good version serves.")
        self.shadow_scored = counter("shadow_transactions", "Transactions scored by the shadow.", "version")
        self.shadow_dropped = counter("shadow_dropped", "Transactions that the full shadow queue did not take.")
        self.shadow_failed = counter("shadow_failed", "Transactions that the shadow could not score.", "version")


@dataclass(frozen=True)
class CallCounts:
    """Model calls of an arm so far, and the latest of their times in milliseconds."""

    calls: int
    failed: int
    recent_ms: tuple[float, ...]


class ArmTally:
    """Counts one version's calls on one arm; written by the worker, read by the guard.

    Args:
        alias: arm.
        version: its version.
        metrics: where it is shown.
    """

    def __init__(self, alias: str, version: str, metrics: ArmMetrics) -> None:
        self.version = version
        self._transactions = metrics.transactions.labels(alias, version)
        self._errors = metrics.errors.labels(alias, version)
        self._latency = metrics.latency.labels(alias, version)
        self._lock = threading.Lock()
        self._calls = self._failed = 0
        self._recent_ms: deque[float] = deque(maxlen=RECENT_CALLS)

    def answered(self, transactions: int, seconds: float) -> None:
        """A call that gave its answers."""
        self._transactions.inc(transactions)
        self._latency.observe(seconds)
        with self._lock:
            self._calls += 1
            self._recent_ms.append(seconds * 1e3)

    def failed(self) -> None:
        """A call that gave none."""
        self._errors.inc()
        with self._lock:
            self._calls += 1
            self._failed += 1

    def counts(self) -> CallCounts:
        """A snapshot."""
        with self._lock:
            return CallCounts(self._calls, self._failed, tuple(self._recent_ms))
