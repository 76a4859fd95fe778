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
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TypeVar

import numpy as np

from deepseek_ray.data.events import Feedback, Prediction, Reason, Transaction, to_us
from deepseek_ray.data.prediction_log import LabelTarget, LoggedFeedback, LoggedPrediction, PredictionLog
from deepseek_ray.errors import (
    DeepseekRayError,
    EnvironmentProblemError,
    FeatureError,
    RequestError,
    ServingError,
    StaleEventError,
)
from deepseek_ray.logs import get_logger, trace_of
from deepseek_ray.serving.admission import Plan, admit, is_new_label, label_target
from deepseek_ray.serving.arms import ArmPlan, Outcome
from deepseek_ray.serving.commands import (
    Command,
    FeatureState,
    FeedbackCommand,
    FeedbackResult,
    FloatArray,
    LiveModel,
    Result,
    ScoreCommand,
    ScoreResult,
    Served,
    TaskCommand,
    TaskResult,
    ThresholdCommand,
)
from deepseek_ray.serving.monitor import Monitor
from deepseek_ray.serving.shapes import padded

logger = get_logger(__name__)

MAX_REASONS = 5
DEGRADED = "degraded"
"""Stands in the log for the feature digest where histories could not be read."""
DROPPED_A_BATCH = 100
"""Vectors dropped after a batch: a few milliseconds, and more than a batch adds."""

C = TypeVar("C")


class Predictor:
    """Runs batches of commands. Everything here is called from one thread, save ``swap``, ``crown``, ``reroute``,
    ``plan``, ``live`` and ``archived``.

    Attributes:
        plan: the champion and the arms beside it.
        buckets: sizes that batches are padded to, ascending.
        witness: shown each batch of logged rows, on the worker's thread: it must not block or raise.
        archived: last row number that the archive holds; the vectors up to there are dropped, some after each batch.

    Args:
        state: incremental features.
        log: prediction log, this process being its only writer.
        live: the version to start with.
        skew_us: how far clocks of clients may be apart.
        buckets: sizes that batches are padded to before the model sees them; see ``shapes.padded``.
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
        buckets: Sequence[int] = (),
        now_us: Callable[[], int] = lambda: time.time_ns() // 1_000,
    ) -> None:
        self._state = state
        self._log = log
        self._monitor = monitor
        self._skew_us = skew_us
        self.buckets = tuple(sorted(set(buckets)))
        self._now_us = now_us
        self._horizon_us, last = log.horizon()
        self._applied = log.applied
        self._written = (last, self._applied[1])
        self._unflushed = self._unlogged = self._closed = False
        self.archived = self._dropped = 0
        self._swapping = threading.Lock()
        self.witness: Callable[[Sequence[LoggedPrediction]], None] = lambda rows: None
        self.plan = ArmPlan(live)
        self.swap(live)

    @property
    def live(self) -> LiveModel:
        """The champion that serves."""
        return self.plan.champion

    @property
    def healthy(self) -> bool:
        """False while the log cannot be written, or feature state that was answered from waits for its store."""
        return not self._unflushed and not self._unlogged

    def swap(self, live: LiveModel) -> None:
        """Serve another version from the next batch on: one reference changes, nothing waits."""
        self.reroute(lambda plan: replace(plan, champion=live))
        self._monitor.show_model(live.name, live.version, live.run_id, live.threshold)

    def crown(self, version: str) -> bool:
        """Let a loaded version serve as champion, as it is by then; False: it is not loaded.

        Found and swapped in one step: a threshold that somebody sets in between would be lost.
        """

        def crowned(plan: ArmPlan) -> ArmPlan:
            loaded = plan.versions.get(version)
            return replace(plan, champion=loaded) if loaded else plan

        self.reroute(crowned)
        live = self.live
        if live.version != version:
            return False
        self._monitor.show_model(live.name, live.version, live.run_id, live.threshold)
        return True

    def reroute(self, change: Callable[[ArmPlan], ArmPlan]) -> None:
        """Make the next plan out of the present one, from the next batch on."""
        with self._swapping:
            self.plan = change(self.plan)

    def run(self, commands: Sequence[Command]) -> list[Result | Exception]:
        """Execute a batch: labels and thresholds first, then scores; each command succeeds or fails as a whole."""
        results: list[Result | Exception] = [DeepseekRayError("not run")] * len(commands)
        scores = [(i, c) for i, c in enumerate(commands) if isinstance(c, ScoreCommand)]
        for index, command in enumerate(commands):
            if isinstance(command, FeedbackCommand):
                results[index] = _attempt(self._label, command)
            elif isinstance(command, ThresholdCommand):
                results[index] = _attempt(self._set_threshold, command)
            elif isinstance(command, TaskCommand):
                results[index] = _attempt(_work, command)
        if scores:
            arms = self.plan  # read once: a swap never splits a batch
            for (index, _), outcome in zip(scores, self._score([c for _, c in scores], arms), strict=True):
                results[index] = outcome
        return results

    def hand_over(self, state: FeatureState, take_over: Callable[[], None], live: LiveModel) -> None:
        """Go on with other features and their version; from within a :class:`TaskCommand` only.

        Args:
            state: the other features.
            take_over: brings them up to the end of the log and writes them to their store.
            live: a version that reads them; the arms, which do not, end.
        """
        self._state.flush()
        if self._state.behind:
            raise ServingError("The feature store is away.", fix="it is tried again")
        take_over()
        self._state = state
        self._applied = self._written
        self.reroute(lambda plan: ArmPlan(live))
        self._monitor.show_model(live.name, live.version, live.run_id, live.threshold)

    def flush(self) -> None:
        """Write feature state to its store; on failure it stays in memory and is tried again."""
        try:
            with self._monitor.timed("flush"):
                self._state.flush()
        except Exception as error:
            self._unflushed = True
            self._monitor.pending.set(1)
            logger.error("feature state stays in memory and in the prediction log, not written: %s", trace_of(error))
            return
        self._monitor.pending.set(int(self._state.behind))
        self._unflushed = False
        if not self._state.behind:
            self._applied = self._written

    def settle(self, *, write: bool = True) -> None:
        """What waits until a batch's answers have left: feature state, and a few vectors that the archive holds.

        Args:
            write: whether feature state is written this time.
        """
        if write:
            self.flush()
        if self._unlogged:  # a balancer that hears 503 sends nothing that would write: try it with nothing to say
            with suppress(EnvironmentProblemError):
                self._commit()
        last = self.archived
        if self._dropped < last and not self._log.drop_vectors(last, DROPPED_A_BATCH):
            self._dropped = last

    def close(self) -> None:
        """Flush, and note in the log that nothing is left to replay. Closing twice is closing once."""
        if self._closed:
            return
        self._closed = True
        self.flush()
        try:
            self._commit()
        finally:
            self._log.close()

    def _score(self, commands: Sequence[ScoreCommand], arms: ArmPlan) -> list[Result | Exception]:
        try:
            plan = self._plan(commands)
            rows = self._decide(plan, arms) if plan.fresh else {}
        except Exception as error:
            self._state.discard()
            if isinstance(error, FeatureError) and len(commands) > 1:  # one card's broken state fails its own request
                return [outcome for command in commands for outcome in self._score([command], arms)]
            return [error] * len(commands)
        return [plan.refused.get(i) or _answer(command, plan, rows) for i, command in enumerate(commands)]

    def _plan(self, commands: Sequence[ScoreCommand]) -> Plan:
        events = [event for command in commands for event in command.transactions]
        with self._monitor.timed("check"):
            stored = self._log.by_transaction([event.transaction_id for event in events])
            self._state.fetch(events)
            last_us = dict(self._state.last_event_us(list({event.card_id for event in events})))
        plan = Plan(stored, last_us)
        for index, command in enumerate(commands):
            try:
                admit(command, plan)
            except (RequestError, StaleEventError) as error:
                plan.refused[index] = error
        return plan

    def _decide(self, plan: Plan, arms: ArmPlan) -> dict[str, LoggedPrediction]:
        events = list(plan.fresh.values())
        with self._monitor.timed("features"):
            served = self._state.observe_many(events)
        values = np.stack([item.values for item in served])
        sequence = np.stack([item.sequence for item in served])
        outcomes = arms.score([event.card_id for event in events], values, sequence, self._ask)
        chance = secrets.token_hex(6 * len(events))  # asked of the system once
        rows = [
            self._row(event, item, outcome, plan.received_s[event.transaction_id], chance[12 * n : 12 * n + 12])
            for n, (event, item, outcome) in enumerate(zip(events, served, outcomes, strict=True))
        ]
        with self._monitor.timed("log"):
            last, _ = self._commit(rows)
        self._state.keep()
        self._written = (last, self._written[1])
        self._horizon_us = max(self._horizon_us, *(row.order_us for row in rows))
        self._count(rows)
        self.witness(rows)
        return {row.transaction.transaction_id: row for row in rows}

    def _ask(
        self, live: LiveModel, values: FloatArray, sequence: FloatArray
    ) -> tuple[FloatArray, list[tuple[Reason, ...]]]:
        with self._monitor.timed("model"):
            probability = padded(live.scorer.predict_proba, values, sequence, self.buckets)
        with self._monitor.timed("reasons"):
            return probability, explain(live, values, sequence, probability, self.buckets)

    def _row(
        self, event: Transaction, served: Served, outcome: Outcome, received_s: float, chance: str
    ) -> LoggedPrediction:
        live, probability, reasons = outcome
        now_us = self._now_us()
        return LoggedPrediction(
            prediction_id=f"p{now_us:014x}{chance}",
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
            # no vector of the declaration: neither verified nor trained on
            feature_digest=DEGRADED if served.degraded else live.feature_digest,
            latency_ms=round((time.perf_counter() - received_s) * 1e3, 3),
            logged_us=now_us,
        )

    def _count(self, rows: Sequence[LoggedPrediction]) -> None:
        self._monitor.batch_size.observe(len(rows))
        scores = {version: self._monitor.score.labels(version) for version in {row.model_version for row in rows}}
        for row in rows:
            scores[row.model_version].observe(row.probability)
        decisions = Counter((row.decision, row.model_version) for row in rows)
        for labels, times in decisions.items():
            self._monitor.predictions.labels(*labels).inc(times)
        self._monitor.degraded.inc(sum(row.feature_digest == DEGRADED for row in rows))
        for key, times in Counter(key for row in rows for key in row.cold).items():
            self._monitor.cold.labels(key).inc(times)

    def _label(self, command: FeedbackCommand) -> FeedbackResult:
        targets = self._log.label_targets([item.prediction_id for item in command.feedback])
        fresh: dict[str, Feedback] = {}
        for index, item in enumerate(command.feedback):
            target = label_target(item, targets.get(item.prediction_id), self._skew_us, index)
            if is_new_label(item, target, fresh.get(item.prediction_id)):
                fresh[item.prediction_id] = item
        rows = [self._feedback_row(item) for item in fresh.values()]
        if rows:
            self._take_labels(rows, targets)
        for label in fresh.values():
            self._monitor.feedback.labels(str(label.is_fraud).lower(), "accepted").inc()
        return FeedbackResult(len(rows), len(command.feedback) - len(rows))

    def _take_labels(self, rows: Sequence[LoggedFeedback], targets: Mapping[str, LabelTarget]) -> None:
        try:
            self._state.fetch_labels([targets[row.prediction_id] for row in rows])
            for row in rows:
                self._state.apply_label(targets[row.prediction_id], row.is_fraud, row.known_us)
            _, last = self._commit(feedback=rows)
        except Exception:
            self._state.discard()
            raise
        self._state.keep()
        self._written = (self._written[0], last)

    def _commit(
        self, rows: Sequence[LoggedPrediction] = (), feedback: Sequence[LoggedFeedback] = ()
    ) -> tuple[int, int]:
        """Write to the log; while it cannot be written the service says that it is not ready."""
        try:
            last = self._log.commit(
                rows, feedback, applied_predictions=self._applied[0], applied_feedback=self._applied[1]
            )
        except EnvironmentProblemError:
            if not self._unlogged:
                logger.exception("the prediction log cannot be written: decisions are refused until it can")
            self._unlogged = True
            self._monitor.unlogged.set(1)
            raise
        if self._unlogged:
            self._monitor.unlogged.set(0)
        self._unlogged = False
        return last

    def _set_threshold(self, command: ThresholdCommand) -> LiveModel:
        with self._swapping:
            serving = self.live.version
            version = command.model_version or serving
            if version not in self.plan.versions:
                raise RequestError(
                    f"Version {serving} serves, not {command.model_version!r}.",
                    status=409,
                    kind="other-version",
                    field="model_version",
                    fix="read GET /v1/risk/model and decide again",
                )
            self._log.set_threshold(version, command.threshold, self._now_us())
            self.plan = self.plan.with_threshold(version, command.threshold)
        self._monitor.threshold.set(self.live.threshold)
        return self.plan.versions[version]

    def _feedback_row(self, item: Feedback) -> LoggedFeedback:
        observed_us = to_us(item.observed_at)
        # No event served so far has counted this label, whatever its sender says about when it became known.
        known_us = max(observed_us, self._horizon_us + 1)
        after_seq, now_us = self._written[0], self._now_us()
        return LoggedFeedback(item.prediction_id, item.is_fraud, observed_us, known_us, after_seq, now_us)


def explain(
    live: LiveModel,
    values: FloatArray,
    sequence: FloatArray,
    probability: FloatArray,
    buckets: Sequence[int] = (),
) -> list[tuple[Reason, ...]]:
    """The features that speak loudest in each score that calls for a review; none for approvals.

    Args:
        values: float64[n, F].
        sequence: float64[n, N, C].
        probability: float64[n].
        buckets: sizes of batches that the model runs with, ascending; any size where there are none.
    """
    reasons: list[tuple[Reason, ...]] = [()] * len(probability)
    rows = np.flatnonzero(probability >= live.threshold)
    if not len(rows):
        return reasons
    shares = padded(live.scorer.attribute, values[rows], sequence[rows], buckets)
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
        degraded=row.feature_digest == DEGRADED,
    )


def _attempt(work: Callable[[C], Result], command: C) -> Result | Exception:
    try:
        return work(command)
    except Exception as error:
        return error


def _work(command: TaskCommand) -> TaskResult:
    command.work()
    return TaskResult()


def _answer(command: ScoreCommand, plan: Plan, rows: Mapping[str, LoggedPrediction]) -> ScoreResult:
    predictions = []
    repeated = 0
    for event in command.transactions:
        stored = plan.stored.get(event.transaction_id)
        repeated += stored is not None
        predictions.append(to_prediction(stored or rows[event.transaction_id]))
    return ScoreResult(predictions, repeated)
