"""Stand-ins for the serving tests: a feature state and a model small enough to compute by hand."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from deepseek_ray.data.events import Transaction, to_us
from deepseek_ray.data.prediction_log import LabelTarget, PredictionLog
from deepseek_ray.serving.app import RiskApp, Service
from deepseek_ray.serving.auth import Keyring
from deepseek_ray.serving.batching import Batcher
from deepseek_ray.serving.commands import LiveModel
from deepseek_ray.serving.monitor import Monitor
from deepseek_ray.serving.predictor import Predictor
from deepseek_ray.serving.wire import Limits

KEY = "a-key-for-the-tests-only"
NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)


def event(number: int = 1, *, card: str = "c1", at_s: float = 0.0, amount: int = 1_000, **changes: Any) -> Transaction:
    """A transaction some seconds after noon, or before it."""
    fields = {
        "transaction_id": f"t{number}",
        "event_time": NOW + timedelta(seconds=at_s),
        "card_id": card,
        "terminal_id": "m1",
        "amount_cents": amount,
    }
    return Transaction.model_validate(fields | changes)


def body(transaction: Transaction, **changes: Any) -> dict[str, Any]:
    """A transaction as JSON, with changes."""
    return json.loads(transaction.model_dump_json()) | changes


@dataclass(frozen=True)
class FakeServed:
    order_us: int
    values: np.ndarray[Any, np.dtype[np.float64]]
    sequence: np.ndarray[Any, np.dtype[np.float64]]
    cold: list[str]
    degraded: bool = False


class FakeState:
    """Counts each card's events; a flushed count survives, a kept one waits, the rest can be discarded."""

    behind = False

    def __init__(self) -> None:
        self.last: dict[str, int] = {}
        self.counts: dict[str, int] = {}
        self.kept: tuple[dict[str, int], dict[str, int]] = ({}, {})
        self.flushed: dict[str, int] = {}
        self.labels: list[tuple[str, bool, int]] = []
        self.fail_flush = False

    def fetch(self, transactions: Sequence[Transaction]) -> None:
        pass

    def last_event_us(self, card_ids: Sequence[str]) -> dict[str, int]:
        return {card: self.last[card] for card in card_ids if card in self.last}

    def observe_many(self, transactions: Sequence[Transaction]) -> list[FakeServed]:
        return [self._observe(item) for item in transactions]

    def _observe(self, item: Transaction) -> FakeServed:
        cold = [] if item.card_id in self.last else ["card"]
        self.last[item.card_id] = to_us(item.event_time)
        self.counts[item.card_id] = count = self.counts.get(item.card_id, 0) + 1
        values = np.array([item.amount_cents, count], float)
        return FakeServed(to_us(item.event_time) + count - 1, values, np.zeros((2, 6)), cold)

    def fetch_labels(self, targets: Sequence[LabelTarget]) -> None:
        pass

    def apply_label(self, target: LabelTarget, is_fraud: bool, known_us: int) -> None:
        self.labels.append((target.prediction_id, is_fraud, known_us))

    def keep(self) -> None:
        self.kept = (dict(self.last), dict(self.counts))

    def discard(self) -> None:
        self.last, self.counts = dict(self.kept[0]), dict(self.kept[1])

    def flush(self) -> None:
        if self.fail_flush:
            raise OSError("store is away")
        self.flushed = dict(self.kept[1])


class FakeScorer:
    """Probability grows with the amount: 1,000 cents give 0.1."""

    fail = False

    def predict_proba(self, features: Any, sequence: Any) -> Any:
        if self.fail:
            raise RuntimeError("model failed")
        return np.minimum(features[:, 0] / 10_000, 1.0)

    def attribute(self, features: Any, sequence: Any) -> Any:
        return np.stack([features[:, 0] / 1_000, -features[:, 1]], axis=1)


def live_model(version: str = "1", threshold: float = 0.5) -> LiveModel:
    """A version of the stand-in model."""
    return LiveModel(FakeScorer(), "risk", version, "run1", "risk_v1", "d1", ("amount", "count"), threshold, to_us(NOW))


class Rig:
    """A whole service over stand-ins, and an HTTP client that talks to it in process."""

    def __init__(self, path: Path, *, max_queued: int = 100, max_transactions: int = 10) -> None:
        self.state = FakeState()
        self.log = PredictionLog(path / "predictions.db")
        self.monitor = Monitor()
        self.max_transactions = max_transactions
        self.predictor = Predictor(self.state, self.log, live_model(), self.monitor, now_us=lambda: to_us(NOW))
        self.batcher = Batcher(self.predictor.run, max_batch_size=4, max_queued=max_queued, after=self.predictor.settle)
        self.monitor.watch_queue(self.batcher.queue)
        self.app = self.make_app(self.service())

    def service(self, **changes: Any) -> Service:
        """What the routes need, with changes."""
        made = Service(
            batcher=self.batcher,
            monitor=self.monitor,
            limits=Limits(self.max_transactions, 300_000_000),
            max_body_bytes=20_000,
            live=lambda: self.predictor.live,
            refused=lambda: "",
            healthy=lambda: self.predictor.healthy,
            shutdown=self.close,
            now_us=lambda: to_us(NOW),
        )
        return replace(made, **changes)

    def make_app(self, service: Service) -> RiskApp:
        """The application that takes the tests' key."""
        return RiskApp(service, Keyring(KEY))

    def client(self, key: str | None = KEY) -> httpx.AsyncClient:
        headers = {} if key is None else {"X-API-Key": key}
        return httpx.AsyncClient(transport=httpx.ASGITransport(app=self.app), base_url="http://test", headers=headers)

    def close(self) -> None:
        self.batcher.close()
        self.predictor.close()


@contextmanager
def rig(path: Path, **options: int) -> Iterator[Rig]:
    """A rig that is closed at the end."""
    made = Rig(path, **options)
    try:
        yield made
    finally:
        made.close()
