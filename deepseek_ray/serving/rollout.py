"""Watches the arms that serve: back to the champion when one is worse, up the schedule when it is not.

A thread of its own, so that a registry that does not answer cannot delay a rollback: the arm loses its traffic in this
process first, and the registry is told as soon as it listens.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from deepseek_ray.errors import RegistryError, RegistryUnavailableError
from deepseek_ray.logs import get_logger
from deepseek_ray.periodic import Periodic
from deepseek_ray.registry import TrafficBook, Words
from deepseek_ray.serving.arm_evidence import ArmEvidence
from deepseek_ray.serving.arm_metrics import ArmMetrics, CallCounts
from deepseek_ray.serving.arms import ArmPlan, LiveArm
from deepseek_ray.serving.guard import Record, StepRecord, Verdict, judge
from deepseek_ray.serving.moves import Fall, Move, rollback
from deepseek_ray.serving.predictor import Predictor
from deepseek_ray.serving.release import champion_move, refused_move
from deepseek_ray.serving.release_steps import ReleaseSteps
from deepseek_ray.serving.traffic import TrafficPolicy

logger = get_logger(__name__)

WHO = "the service"
NO_CALLS = CallCounts(0, 0, ())


class Rollout(Periodic):
    """Judges the arms every so often.

    Args:
        predictor: whose plan is watched.
        book: opens the traffic of the registry.
        log_path: the prediction log.
        metrics: where evidence and moves are shown.
        releases: moves releases on; None: there are none.
        every_s: time between two looks.
        now_us: clock, microseconds since the epoch.
    """

    def __init__(
        self,
        predictor: Predictor,
        book: Callable[[], TrafficBook],
        log_path: Path,
        metrics: ArmMetrics,
        *,
        releases: ReleaseSteps | None = None,
        every_s: float = 1.0,
        now_us: Callable[[], int] = lambda: time.time_ns() // 1_000,
    ) -> None:
        super().__init__("the watch over the arms", every_s, self.tick)
        self._predictor = predictor
        self._book = book
        self._log_path = log_path
        self._metrics = metrics
        self._releases = releases
        self._now_us = now_us
        self._evidence: tuple[tuple[str, str], ArmEvidence] | None = None
        self._withdrawn: dict[str, frozenset[str]] = {}
        self._pending: Move | None = None
        self._reports: dict[str, dict[str, object]] = {}

    @property
    def report(self) -> dict[str, dict[str, object]]:
        """What is known of each arm, by alias."""
        return self._reports

    def withdrawn(self, text: str) -> frozenset[str]:
        """Aliases that this process took the traffic from under the policy of that text."""
        return self._withdrawn.get(text, frozenset())

    def tick(self) -> None:
        """Look once.

        Raises:
            EnvironmentProblemError: the log cannot be read.
            RegistryError: the registry does not take a move; it is tried again the next time.
        """
        plan = self._predictor.plan
        if plan.arms:
            evidence = self._evidence_of(plan)
            evidence.read(lambda: not self._stop.is_set())
            self._reports = {arm.alias: self._judge(plan, arm, evidence.steps(arm.alias)) for arm in plan.arms}
        else:
            self._evidence, self._reports = None, {}
        if self._releases is not None and self._pending is None:
            self._pending = self._releases.look(plan, self._now_us())
        self._tell(plan)

    def _evidence_of(self, plan: ArmPlan) -> ArmEvidence:
        key = (plan.text, plan.champion.version)
        if self._evidence is None or self._evidence[0] != key:
            self._evidence = (key, ArmEvidence(plan.policy, plan.champion.version, self._log_path))
        return self._evidence[1]

    def _judge(self, plan: ArmPlan, arm: LiveArm, steps: list[StepRecord]) -> dict[str, object]:
        champion_calls = plan.tally.counts() if plan.tally else NO_CALLS
        calls = arm.tally.counts()
        verdict = judge(steps, calls, champion_calls, plan.policy.limits)
        self._show(arm, verdict, steps[-1].arm)
        if verdict.cause:
            self._withdraw(plan, arm, verdict)
        elif self._is_due(plan.policy, steps[-1]):
            self._advance(plan, arm)
        return _report(arm, steps[-1], calls, verdict)

    def _show(self, arm: LiveArm, verdict: Verdict, record: Record) -> None:
        self._metrics.labels.labels(arm.alias, arm.live.version).set(record.labels)
        for kind, cards in record.bad_cards.items():
            self._metrics.mistakes.labels(arm.alias, arm.live.version, kind).set(len(cards))
        for name, value in verdict.evidence.items():
            self._metrics.evidence.labels(arm.alias, arm.live.version, name).set(value)
        if verdict.psi is not None:
            self._metrics.psi.labels(arm.alias, arm.live.version).set(verdict.psi)

    def _withdraw(self, plan: ArmPlan, arm: LiveArm, verdict: Verdict) -> None:
        logger.error("%s (version %s) lost its traffic: %s", arm.alias, arm.live.version, verdict.why)
        waiting = self._pending.fallen if self._pending else ()
        others = [fall for fall in waiting if fall.arm.alias != arm.alias and fall.is_from(plan.policy)]
        self._pending = rollback(plan.text, plan.policy, (*others, Fall(arm, verdict.why)))
        self._take_traffic(plan.text, self._pending.fallen)
        self._metrics.moves.labels("rollback", verdict.cause).inc()

    def _take_traffic(self, text: str, fallen: tuple[Fall, ...]) -> None:
        gone = self.withdrawn(text) | {fall.arm.alias for fall in fallen}
        self._withdrawn[text] = gone
        self._predictor.reroute(lambda now: now.without(gone) if now.text == text else now)

    def _is_due(self, policy: TrafficPolicy, step: StepRecord) -> bool:
        last = policy.next_percent is None and (policy.release is None or self._releases is None)
        if policy.schedule is None or last or self._pending is not None:
            return False
        stayed_us = self._now_us() - policy.since_us
        return stayed_us >= policy.schedule.dwell_s * 1e6 and step.arm.decisions >= policy.schedule.min_decisions

    def _advance(self, plan: ArmPlan, arm: LiveArm) -> None:
        percent = plan.policy.next_percent
        if percent is None:
            self._pending = champion_move(plan.text, plan.policy, "healthy on every step")
            return
        summary = f"{arm.alias} (version {arm.live.version}) {arm.percent:g} % -> {percent:g} %"
        self._pending = Move(plan.text, plan.policy.grown(percent), "advance", "healthy", summary, cause="schedule")

    def _tell(self, plan: ArmPlan) -> None:
        """Write the pending move; it stays pending while the registry is away."""
        move = self._pending
        if move is None:
            return
        try:
            refusal = self._write(move)
        except RegistryUnavailableError:
            raise
        except RegistryError as error:
            logger.warning("%s was not written: %s", move.summary, error)
            self._pending = self._again(move)
            return
        if refusal:
            logger.error("%s was refused: %s", move.summary, refusal)
            self._pending = refused_move(move, plan.policy, refusal) if plan.text == move.before else None
            return
        logger.info("traffic: %s (%s)", move.summary, move.why)
        if move.cause:
            self._metrics.moves.labels(move.action, move.cause).inc()
        self._pending = None

    def _write(self, move: Move) -> str:
        book, words = self._book(), Words(move.action, WHO, move.why, move.summary)
        if move.crown and self._releases is not None:
            return self._releases.crown(book, move, words)
        book.move(move.before, move.after.model_dump_json(), **words._asdict())
        return ""

    def _again(self, move: Move) -> Move | None:
        """Somebody else moved the traffic first: theirs counts, but not where it lets withdrawn arms go on."""
        text = self._book().read()
        policy = TrafficPolicy.parse(text)
        fallen = tuple(fall for fall in move.fallen if fall.is_from(policy))
        if not fallen:
            return None
        self._take_traffic(text, fallen)
        return rollback(text, policy, fallen)


def _report(arm: LiveArm, step: StepRecord, calls: CallCounts, verdict: Verdict) -> dict[str, object]:
    record = step.arm
    return {
        "decisions": record.decisions,
        "reviews": record.reviews,
        "labels": record.labels,
        "frauds": record.frauds,
        "calls": calls.calls,
        "failed_calls": calls.failed,
        "psi": verdict.psi,
        "p_values": verdict.p_values,
        "withdrawn": verdict.why,
    }
