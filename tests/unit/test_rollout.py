"""From the log and the calls to a move: back to the champion for each cause, up the schedule when all is well."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from deepseek_ray.data.events import Feedback, to_us
from deepseek_ray.errors import RegistryUnavailableError
from deepseek_ray.serving import arm_evidence
from deepseek_ray.serving.arm_evidence import ArmEvidence
from deepseek_ray.serving.arm_metrics import ArmMetrics, ArmTally
from deepseek_ray.serving.arms import LiveArm
from deepseek_ray.serving.commands import FeedbackCommand, FeedbackResult, ScoreCommand, ScoreResult
from deepseek_ray.serving.guard import Room
from deepseek_ray.serving.rollout import Rollout
from deepseek_ray.serving.traffic import Arm, Limits, Schedule, TrafficPolicy
from tests.unit.registry_parts import FakeRegistry
from tests.unit.serving_parts import NOW, FakeScorer, Rig, body, event, live_model

LIMITS = Limits(min_scores=50)
NOW_US = to_us(NOW)


class Wrong(FakeScorer):
    """Scores that a test can bend, for the canary."""

    bend: Any = staticmethod(lambda p: p)

    def predict_proba(self, features: Any, sequence: Any) -> Any:
        return self.bend(super().predict_proba(features, sequence))


class Trial(Rig):
    """A service with a canary at 40 % and a rollout that is ticked by hand."""

    def __init__(self, path: Path, *, schedule: Schedule | None = None) -> None:
        super().__init__(path, max_queued=10_000)
        arm = Arm(alias="canary", version="2", percent=40)
        self.policy = TrafficPolicy(arms=(arm,), limits=LIMITS, schedule=schedule, salt="a1", since_us=NOW_US - 1)
        self.registry = FakeRegistry(traffic=self.policy.model_dump_json())
        self.scorer = Wrong()
        self.metrics = ArmMetrics(self.monitor.registry)
        self.now_us = NOW_US
        self.numbers = iter(range(10**6))
        self.rollout = self.restart()
        self.put(self.policy)

    def restart(self) -> Rollout:
        book: Any = self.registry
        return Rollout(self.predictor, lambda: book, self.log.path, self.metrics, now_us=lambda: self.now_us)

    def put(self, policy: TrafficPolicy) -> None:
        arms = tuple(self._arm(arm) for arm in policy.arms)
        champion, text = ArmTally("champion", "1", self.metrics), policy.model_dump_json()
        self.predictor.reroute(lambda plan: replace(plan, policy=policy, text=text, tally=champion).with_arms(arms))

    def put_two(self) -> TrafficPolicy:
        """Let a challenger with the canary's scorer serve beside it."""
        arms = (*self.policy.arms, Arm(alias="challenger", version="3", percent=40))
        policy = TrafficPolicy(arms=arms, limits=LIMITS, salt="a1", since_us=NOW_US - 1)
        self.registry.traffic = policy.model_dump_json()
        self.put(policy)
        return policy

    def _arm(self, arm: Arm) -> LiveArm:
        live = replace(live_model(arm.version), scorer=self.scorer)
        return LiveArm(arm.alias, arm.percent, live, ArmTally(arm.alias, arm.version, self.metrics))

    def score(self, cards: int) -> list[tuple[str, str]]:
        """(version, prediction id) of new cards with amounts all over the range."""
        numbers = [next(self.numbers) for _ in range(cards)]
        events = [event(n, card=f"c{n}", amount=100 + 37 * (n % 120)) for n in numbers]
        result = self.predictor.run([ScoreCommand(events)])[0]
        assert isinstance(result, ScoreResult), result
        return [(one.model_version, one.prediction_id) for one in result.predictions]

    def label(self, ids: list[str], is_fraud: bool) -> None:
        items = [Feedback(prediction_id=one, is_fraud=is_fraud, observed_at=NOW) for one in ids]
        assert isinstance(self.predictor.run([FeedbackCommand(items)])[0], FeedbackResult)

    def moved(self) -> list[tuple[str, str, str]]:
        return [(move.action, move.who, move.summary) for move in self.registry.moved]


def fails(p: Any) -> Any:
    raise RuntimeError("broken weights")


@pytest.fixture
def trial(tmp_path: Path) -> Iterator[Trial]:
    made = Trial(tmp_path)
    yield made
    made.close()


ROLLED_BACK = [("rollback", "the service", "canary (version 2) 40 % -> 0 %")]


def test_an_arm_like_the_champion_stays(trial: Trial) -> None:
    trial.label([ident for _, ident in trial.score(600) if ident[-1] in "048"], is_fraud=True)
    trial.rollout.tick()
    report = trial.rollout.report["canary"]
    assert (trial.moved(), report["withdrawn"]) == ([], "")
    assert 200 < int(str(report["decisions"])) < 280
    shown = trial.monitor.registry.get_sample_value
    evidence = shown("deepseek_ray_arm_evidence", {"arm": "canary", "version": "2", "test": "missed_fraud"})
    assert evidence is not None
    assert evidence < 1


def test_failing_calls_take_the_traffic_back(trial: Trial) -> None:
    trial.scorer.bend = fails
    assert {version for _ in range(5) for version, _ in trial.score(20)} == {"1"}
    trial.rollout.tick()
    assert trial.moved() == ROLLED_BACK
    assert "5 of 5 model calls failed" in trial.registry.moved[0].why


def test_slow_calls_take_the_traffic_back(trial: Trial) -> None:
    for _ in range(120):
        trial.predictor.plan.arms[0].tally.answered(1, 0.2)
    trial.rollout.tick()
    assert trial.moved() == ROLLED_BACK
    assert "p99" in trial.registry.moved[0].why


def test_shifted_scores_take_the_traffic_back(trial: Trial) -> None:
    trial.scorer.bend = lambda p: p**3
    trial.score(600)
    trial.rollout.tick()
    assert trial.moved() == ROLLED_BACK
    assert "PSI" in trial.registry.moved[0].why


def test_missed_frauds_take_the_traffic_back_and_the_old_answers_stay(trial: Trial) -> None:
    rows = trial.score(500)
    ours = [ident for version, ident in rows if version == "2"]
    theirs = [ident for version, ident in rows if version == "1"]
    trial.label(ours[:50] + theirs[:12], is_fraud=True)
    trial.rollout.tick()
    assert trial.moved() == ROLLED_BACK
    assert "missed fraud" in trial.registry.moved[0].why
    assert TrafficPolicy.parse(trial.registry.traffic).arms == ()
    assert {version for version, _ in trial.score(50)} == {"1"}
    shown = trial.monitor.render()
    assert b'traffic_moves_total{action="rollback",cause="quality"} 1.0' in shown
    assert b'arm_mistaken_cards{arm="canary",kind="missed_fraud",version="2"} 50.0' in shown


def test_the_records_of_a_step_fill_one_room(trial: Trial, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arm_evidence, "Room", partial(Room, 40))
    trial.label([ident for _, ident in trial.score(300)], is_fraud=True)
    evidence = ArmEvidence(trial.policy, "1", trial.log.path)
    evidence.read()
    (step,) = evidence.steps("canary")
    both = [len(side.bad_cards["missed_fraud"]) for side in (step.arm, step.champion)]
    assert sum(both) == 40
    assert min(both) > 5
    assert step.arm.labels + step.champion.labels == 300


def test_the_evidence_survives_a_restart(trial: Trial) -> None:
    rows = trial.score(500)
    trial.rollout.tick()
    trial.label([ident for version, ident in rows if version == "2"][:50], is_fraud=True)
    trial.rollout = trial.restart()
    trial.rollout.tick()
    assert trial.moved() == ROLLED_BACK


def test_with_the_registry_away_the_traffic_leaves_at_once_and_the_move_is_written_later(trial: Trial) -> None:
    trial.registry.away = True
    trial.scorer.bend = lambda p: p**3
    trial.score(600)
    for _ in range(2):
        with pytest.raises(RegistryUnavailableError):
            trial.rollout.tick()
    assert {version for version, _ in trial.score(50)} == {"1"}
    assert trial.rollout.withdrawn(trial.registry.traffic) == {"canary"}
    trial.registry.away = False
    trial.rollout.tick()
    trial.rollout.tick()
    assert trial.moved() == ROLLED_BACK


def test_a_move_by_somebody_else_does_not_save_a_bad_arm(trial: Trial) -> None:
    trial.scorer.bend = lambda p: p**3
    trial.score(600)
    trial.registry.traffic = trial.policy.grown(60).model_dump_json()
    trial.rollout.tick()
    assert trial.moved() == []
    assert trial.rollout.withdrawn(trial.registry.traffic) == {"canary"}
    trial.rollout.tick()
    assert TrafficPolicy.parse(trial.registry.traffic).arms == ()


def test_two_bad_arms_leave_in_one_move_that_names_both(trial: Trial) -> None:
    trial.put_two()
    trial.scorer.bend = fails
    for _ in range(5):
        trial.score(20)
    trial.rollout.tick()
    summary = "canary (version 2) 40 % -> 0 %, challenger (version 3) 40 % -> 0 %"
    assert trial.moved() == [("rollback", "the service", summary)]
    causes = trial.registry.moved[0].why.split("; challenger: ")
    assert [cause.count("5 of 5 model calls failed") for cause in causes] == [1, 1]
    assert TrafficPolicy.parse(trial.registry.traffic).arms == ()


def test_a_move_by_somebody_else_saves_neither_of_two_bad_arms(trial: Trial) -> None:
    policy = trial.put_two()
    trial.scorer.bend = fails
    for _ in range(5):
        trial.score(20)
    trial.registry.traffic = policy.model_copy(update={"salt": "b2"}).model_dump_json()
    trial.rollout.tick()
    assert trial.rollout.withdrawn(trial.registry.traffic) == {"canary", "challenger"}
    trial.rollout.tick()
    assert TrafficPolicy.parse(trial.registry.traffic).arms == ()


def test_decisions_beside_another_champion_are_not_held_against_an_arm(trial: Trial) -> None:
    rows = trial.score(400)
    trial.label([ident for version, ident in rows if version == "2"][:60], is_fraud=True)
    trial.predictor.swap(live_model("9"))
    trial.score(100)
    trial.rollout.tick()
    assert trial.moved() == []
    assert int(str(trial.rollout.report["canary"]["labels"])) == 0


def test_the_schedule_is_climbed_when_time_and_decisions_are_enough(tmp_path: Path) -> None:
    made = Trial(tmp_path, schedule=Schedule(steps=(40, 80), dwell_s=60, min_decisions=100))
    made.score(150)
    made.now_us += 120_000_000
    made.rollout.tick()
    assert made.moved() == [], "too few decisions"
    made.score(300)
    made.now_us -= 119_000_000
    made.rollout.tick()
    assert made.moved() == [], "too early"
    made.now_us += 119_000_000
    made.rollout.tick()
    assert made.moved() == [("advance", "the service", "canary (version 2) 40 % -> 80 %")]
    grown = TrafficPolicy.parse(made.registry.traffic)
    made.put(grown)
    made.score(500)
    made.rollout.tick()
    assert (grown.next_percent, len(made.moved())) == (None, 1), "the last step is left by the gate alone"
    made.close()


def test_no_request_fails_while_a_broken_arm_is_found_and_withdrawn(trial: Trial) -> None:
    async def story() -> list[int]:
        async with trial.client() as client:
            trial.scorer.bend = fails
            statuses = []
            for turn in range(6):
                events = [event(1_000 * turn + n, card=f"w{n}") for n in range(20)]
                answers = await asyncio.gather(*(client.post("/v1/risk/score", json=body(item)) for item in events))
                statuses += [answer.status_code for answer in answers]
                await asyncio.to_thread(trial.rollout.tick)
            return statuses

    assert set(asyncio.run(story())) == {200}
    assert trial.moved() == ROLLED_BACK
