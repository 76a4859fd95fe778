"""The decision: features, model, log — one batch at a time, on the batcher's only worker thread.

What a crash may not break: an answered event is in the log and in the feature state; an unanswered
one is in both or in neither. Hence the order within a batch: feature state changes in memory, the
log commits (durable), the answers leave, and only then does the state reach its store. A crash
before the commit loses nothing that anyone was told; a crash after it leaves log rows that the
store lacks, and ``LiveFeatures.recover`` replays exactly those at the next start.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from deepseek_ray.data.events import Feedback, Prediction, Reason, Transaction, to_us
from deepseek_ray.data.prediction_log import LabelTarget, LoggedFeedback, LoggedPrediction, PredictionLog
from deepseek_ray.errors import DeepseekRayError, RequestError, StaleEventError
from deepseek_ray.logs import get_logger
from deepseek_ray.serving.monitor import Monitor

logger = get_logger(__name__)

FloatArray = npt.NDArray[np.float64]
MAX_REASONS = 5

C = TypeVar("C")


class Served(Protocol):
    """One event's features as they stood at its moment."""

    @property
    def order_us(self) -> int: ...
    @property
    def values(self) -> FloatArray: ...
    @property
    def sequence(self) -> FloatArray: ...
    @property
    def cold(self) -> Sequence[str]: ...


class FeatureState(Protocol):
    """The incremental feature engine over a store whose writes can wait."""

    def last_event_us(self, card_ids: Sequence[str]) -> Mapping[str, int]:
        """Time of each known card's last event."""

    def observe_many(self, transactions: Sequence[Transaction]) -> Sequence[Served]:
        """Compute features and take the events into the state, in memory."""

    def apply_label(self, target: LabelTarget, is_fraud: bool, known_us: int) -> None:
        """Take a label into the state, in memory."""

    def keep(self) -> None:
        """Make the changes so far final: the log holds them."""

    def discard(self) -> None:
        """Undo what changed since the last ``keep``."""

    def flush(self) -> None:
        """Write what was kept to the store."""


class Scorer(Protocol):
    """A loaded model."""

    def predict_proba(self, features: FloatArray, sequence: FloatArray) -> FloatArray:
        """Fraud probability [n] of values [n, F] and sequences [n, N, C]."""

    def attribute(self, features: FloatArray, sequence: FloatArray) -> FloatArray:
        """Log-odds contribution [n, F] of each feature."""


@dataclass(frozen=True)
class LiveModel:
    """A version that serves, and since when."""

    scorer: Scorer
    name: str
    version: str
    run_id: str
    feature_service: str
    feature_digest: str
    feature_names: tuple[str, ...]
    threshold: float
    since_us: int


@dataclass(frozen=True)
class ScoreCommand:
    """One request's transactions, and when it arrived (``time.perf_counter``)."""

    transactions: Sequence[Transaction]
    received_s: float = field(default_factory=time.perf_counter)


@dataclass(frozen=True)
class FeedbackCommand:
    """One request's labels."""

    feedback: Sequence[Feedback]


@dataclass(frozen=True)
class ScoreResult:
    """Predictions in the order of the request; ``repeated`` says how many had been made before."""

    predictions: list[Prediction]
    repeated: int


@dataclass(frozen=True)
class FeedbackResult:
    """How many labels were new, and how many were known already."""

    accepted: int
    repeated: int


@dataclass(frozen=True)
class ThresholdCommand:
    """A new threshold for the version that serves; ``model_version`` guards against a swap, "" does not."""

    threshold: float
    model_version: str = ""


Command = ScoreCommand | FeedbackCommand | ThresholdCommand
Result = ScoreResult | FeedbackResult | LiveModel


@dataclass
class _Plan:
    """What a batch will do: new events in order, and the answers already at hand."""

    stored: dict[str, LoggedPrediction]
    last_us: dict[str, int]
    fresh: dict[str, Transaction] = field(default_factory=dict)
    received_s: dict[str, float] = field(default_factory=dict)
    refused: dict[int, Exception] = field(default_factory=dict)


class Predictor:
    """Runs batches of commands. Everything here is called from one thread, save ``swap`` and ``live``.

    Args:
        state: incremental features.
        log: prediction log, this process being its only writer.
        live: the version to start with.
        skew_us: how far clocks of clients may be apart.
        now_us: clock, microseconds since the epoch.
    """

    def __init__(
        self,
        state: FeatureState,
        log: PredictionLog,
        live: LiveModel,
        monitor: Monitor,
        *,
        skew_us: int = 300_000_000,
        now_us: Callable[[], int] = lambda: time.time_ns() // 1_000,
    ) -> None:
        self._state = state
        self._log = log
        self._monitor = monitor
        self._skew_us = skew_us
        self._now_us = now_us
        self._horizon_us, last = log.horizon()
        self._applied = log.applied
        self._written = (last, self._applied[1])
        self._unflushed = self._closed = False
        self._swapping = threading.Lock()
        self.live = live
        self.swap(live)

    @property
    def healthy(self) -> bool:
        """False while feature state that was answered from waits for its store."""
        return not self._unflushed

    def swap(self, live: LiveModel) -> None:
        """Serve another version from the next batch on: one reference changes, nothing waits."""
        with self._swapping:
            self.live = live
        self._monitor.show_model(live.name, live.version, live.run_id, live.threshold)

    def run(self, commands: Sequence[Command]) -> list[Result | Exception]:
        """Execute a batch: labels and thresholds first, then scores; each command succeeds or fails as a whole."""
        results: list[Result | Exception] = [DeepseekRayError("not run")] * len(commands)
        scores = [(i, c) for i, c in enumerate(commands) if isinstance(c, ScoreCommand)]
        for index, command in enumerate(commands):
            if isinstance(command, FeedbackCommand):
                results[index] = _attempt(self._label, command)
            elif isinstance(command, ThresholdCommand):
                results[index] = _attempt(self._set_threshold, command)
        if scores:
            for (index, _), outcome in zip(scores, self._score([c for _, c in scores]), strict=True):
                results[index] = outcome
        return results

    def flush(self) -> None:
        """Write feature state to its store; on failure it stays in memory and is tried again."""
        try:
            with self._monitor.timed("flush"):
                self._state.flush()
        except Exception:
            self._unflushed = True
            self._monitor.pending.set(1)
            logger.exception("feature state could not be written; it stays in memory and in the prediction log")
            return
        if self._unflushed:
            self._monitor.pending.set(0)
        self._unflushed = False
        self._applied = self._written

    def close(self) -> None:
        """Flush, and note in the log that nothing is left to replay. Closing twice is closing once."""
        if self._closed:
            return
        self._closed = True
        self.flush()
        self._log.commit(applied_predictions=self._applied[0], applied_feedback=self._applied[1])
        self._log.close()

    def _score(self, commands: Sequence[ScoreCommand]) -> list[Result | Exception]:
        live = self.live  # read once: a swap never splits a batch
        try:
            plan = self._plan(commands)
            rows = self._decide(plan, live) if plan.fresh else {}
        except Exception as error:
            self._state.discard()
            return [error] * len(commands)
        return [plan.refused.get(i) or _answer(command, plan, rows) for i, command in enumerate(commands)]

    def _plan(self, commands: Sequence[ScoreCommand]) -> _Plan:
        events = [event for command in commands for event in command.transactions]
        with self._monitor.timed("check"):
            stored = self._log.by_transaction([event.transaction_id for event in events])
            last_us = dict(self._state.last_event_us(list({event.card_id for event in events})))
        plan = _Plan(stored, last_us)
        for index, command in enumerate(commands):
            try:
                _admit(command, plan)
            except (RequestError, StaleEventError) as error:
                plan.refused[index] = error
        return plan

    def _decide(self, plan: _Plan, live: LiveModel) -> dict[str, LoggedPrediction]:
        events = list(plan.fresh.values())
        with self._monitor.timed("features"):
            served = self._state.observe_many(events)
        values = np.stack([item.values for item in served])
        sequence = np.stack([item.sequence for item in served])
        with self._monitor.timed("model"):
            probability = live.scorer.predict_proba(values, sequence)
        with self._monitor.timed("reasons"):
            reasons = explain(live, values, sequence, probability)
        rows = [
            self._row(event, item, float(p), why, live, plan.received_s[event.transaction_id])
            for event, item, p, why in zip(events, served, probability, reasons, strict=True)
        ]
        with self._monitor.timed("log"):
            last, _ = self._log.commit(rows, applied_predictions=self._applied[0], applied_feedback=self._applied[1])
        self._state.keep()
        self._written = (last, self._written[1])
        self._horizon_us = max(self._horizon_us, *(row.order_us for row in rows))
        self._count(rows)
        return {row.transaction.transaction_id: row for row in rows}

    def _row(
        self,
        event: Transaction,
        served: Served,
        probability: float,
        reasons: tuple[Reason, ...],
        live: LiveModel,
        received_s: float,
    ) -> LoggedPrediction:
        now_us = self._now_us()
        return LoggedPrediction(
            prediction_id=f"p{now_us:014x}{secrets.token_hex(6)}",
            transaction=event,
            order_us=served.order_us,
            values=served.values,
            sequence=served.sequence,
            probability=probability,
            threshold=live.threshold,
            decision="review" if probability >= live.threshold else "approve",
            cold=tuple(served.cold),
            reasons=reasons,
            model_name=live.name,
            model_version=live.version,
            run_id=live.run_id,
            feature_service=live.feature_service,
            feature_digest=live.feature_digest,
            latency_ms=round((time.perf_counter() - received_s) * 1e3, 3),
            logged_us=now_us,
        )

    def _count(self, rows: Sequence[LoggedPrediction]) -> None:
        self._monitor.batch_size.observe(len(rows))
        for row in rows:
            self._monitor.predictions.labels(row.decision, row.model_version).inc()
            self._monitor.score.labels(row.model_version).observe(row.probability)
            for key in row.cold:
                self._monitor.cold.labels(key).inc()

    def _label(self, command: FeedbackCommand) -> FeedbackResult:
        targets = self._log.label_targets([item.prediction_id for item in command.feedback])
        fresh: dict[str, Feedback] = {}
        for index, item in enumerate(command.feedback):
            target = _target(item, targets.get(item.prediction_id), self._skew_us, index)
            if _is_new_label(item, target, fresh.get(item.prediction_id)):
                fresh[item.prediction_id] = item
        rows = [self._feedback_row(item) for item in fresh.values()]
        if rows:
            _, last = self._log.commit(feedback=rows)
            self._written = (self._written[0], last)
            for row in rows:
                self._state.apply_label(targets[row.prediction_id], row.is_fraud, row.known_us)
            self._state.keep()
        for label in fresh.values():
            self._monitor.feedback.labels(str(label.is_fraud).lower(), "accepted").inc()
        return FeedbackResult(len(rows), len(command.feedback) - len(rows))

    def _set_threshold(self, command: ThresholdCommand) -> LiveModel:
        with self._swapping:
            version = self.live.version
            if command.model_version not in ("", version):
                raise RequestError(
                    f"Version {version} serves, not {command.model_version!r}.",
                    status=409,
                    kind="other-version",
                    field="model_version",
                    fix="read GET /v1/risk/model and decide again",
                )
            self._log.set_threshold(version, command.threshold, self._now_us())
            self.live = live = replace(self.live, threshold=command.threshold)
        self._monitor.threshold.set(live.threshold)
        return live

    def _feedback_row(self, item: Feedback) -> LoggedFeedback:
        observed_us = to_us(item.observed_at)
        # No event served so far has counted this label, whatever its sender says about when it became known.
        known_us = max(observed_us, self._horizon_us + 1)
        after_seq, now_us = self._written[0], self._now_us()
        return LoggedFeedback(item.prediction_id, item.is_fraud, observed_us, known_us, after_seq, now_us)


def explain(
    live: LiveModel, values: FloatArray, sequence: FloatArray, probability: FloatArray
) -> list[tuple[Reason, ...]]:
    """The features that speak loudest in each score that calls for a review; none for approvals.

    Args:
        values: float64[n, F].
        sequence: float64[n, N, C].
        probability: float64[n].
    """
    reasons: list[tuple[Reason, ...]] = [()] * len(probability)
    rows = np.flatnonzero(probability >= live.threshold)
    if not len(rows):
        return reasons
    shares = live.scorer.attribute(values[rows], sequence[rows])
    for row, share in zip(rows, shares, strict=True):
        reasons[row] = _top(live.feature_names, values[row], share)
    return reasons


def _top(names: Sequence[str], values: FloatArray, shares: FloatArray) -> tuple[Reason, ...]:
    order = np.argsort(-np.abs(shares), kind="stable")[:MAX_REASONS]
    return tuple(
        Reason(feature=names[j], value=float(values[j]), contribution=float(shares[j])) for j in order if shares[j] != 0
    )


def to_prediction(row: LoggedPrediction) -> Prediction:
    """The answer that a logged row stands for; the same bytes each time it is asked for."""
    return Prediction(
        prediction_id=row.prediction_id,
        transaction_id=row.transaction.transaction_id,
        probability=row.probability,
        decision=row.decision,
        threshold=row.threshold,
        model_name=row.model_name,
        model_version=row.model_version,
        feature_service=row.feature_service,
        cold=list(row.cold),
        reasons=list(row.reasons),
        latency_ms=row.latency_ms,
    )


def _attempt(work: Callable[[C], Result], command: C) -> Result | Exception:
    try:
        return work(command)
    except Exception as error:
        return error


def _admit(command: ScoreCommand, plan: _Plan) -> None:
    """Take a request into the plan as a whole, or raise and leave the plan as it was."""
    fresh: dict[str, Transaction] = {}
    last_us: dict[str, int] = {}
    for index, event in enumerate(command.transactions):
        known = plan.stored.get(event.transaction_id)
        earlier = known.transaction if known else fresh.get(event.transaction_id, plan.fresh.get(event.transaction_id))
        if earlier is not None:
            _check_same(event, earlier, index)
            continue
        event_us = to_us(event.event_time)
        last = last_us.get(event.card_id, plan.last_us.get(event.card_id, event_us))
        if event_us < last:
            raise _stale(event, last, index)
        fresh[event.transaction_id] = event
        last_us[event.card_id] = event_us
    plan.fresh |= fresh
    plan.last_us |= last_us
    plan.received_s |= dict.fromkeys(fresh, command.received_s)


def _check_same(event: Transaction, earlier: Transaction, index: int) -> None:
    if event == earlier:
        return
    changed = next(name for name in Transaction.model_fields if getattr(event, name) != getattr(earlier, name))
    raise RequestError(
        f"Transaction {event.transaction_id!r} (number {index} of the request) was scored before with another "
        f"{changed}: {getattr(earlier, changed)!s}, now {getattr(event, changed)!s}.",
        status=409,
        kind="duplicate-transaction",
        field="transaction_id",
        fix="repeat a request unchanged, or give a new transaction a new id",
    )


def _stale(event: Transaction, last_us: int, index: int) -> RequestError:
    late_s = (last_us - to_us(event.event_time)) / 1e6
    return RequestError(
        f"event_time {event.event_time.isoformat()} of transaction {event.transaction_id!r} (number {index} of the "
        f"request) is {late_s:g} s older than the last event of card {event.card_id!r}.",
        status=409,
        kind="stale-event",
        field="event_time",
        fix="send a card's transactions in the order of their times",
    )


def _target(item: Feedback, target: LabelTarget | None, skew_us: int, index: int) -> LabelTarget:
    if target is None:
        raise RequestError(
            f"Prediction {item.prediction_id!r} (number {index} of the request) is not in the log.",
            status=404,
            kind="unknown-prediction",
            field="prediction_id",
            fix="send the prediction_id that the score response carried",
        )
    if to_us(item.observed_at) < target.event_us - skew_us:
        raise RequestError(
            f"observed_at {item.observed_at.isoformat()} lies before the transaction that it is about.",
            field="observed_at",
            kind="invalid-field",
            fix="send the time when the label became known",
        )
    return target


def _is_new_label(item: Feedback, target: LabelTarget, earlier: Feedback | None) -> bool:
    held = target.is_fraud if earlier is None else earlier.is_fraud
    if held is None:
        return True
    if held != item.is_fraud:
        raise RequestError(
            f"Prediction {item.prediction_id!r} is already labelled is_fraud={str(held).lower()}.",
            status=409,
            kind="conflicting-feedback",
            field="is_fraud",
            fix="settle which label is true; the first one stays",
        )
    return False


def _answer(command: ScoreCommand, plan: _Plan, rows: Mapping[str, LoggedPrediction]) -> ScoreResult:
    predictions = []
    repeated = 0
    for event in command.transactions:
        stored = plan.stored.get(event.transaction_id)
        repeated += stored is not None
        predictions.append(to_prediction(stored or rows[event.transaction_id]))
    return ScoreResult(predictions, repeated)
