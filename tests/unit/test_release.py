"""A release, from the gate to champion or back: pure turns, and a service that takes them by a clock of the test's."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from deepseek_ray.config import ReleaseConfig, build_config
from deepseek_ray.data.evidence import GATES, Check, GateDecision
from deepseek_ray.data.shadow_scores import Beside, Mistake
from deepseek_ray.errors import ConfigError, RegistryUnavailableError
from deepseek_ray.serving.release import Trial as ShadowVerdict
from deepseek_ray.serving.release import View, stands, start, taken, turn
from deepseek_ray.serving.release_steps import ReleaseSteps
from deepseek_ray.serving.rollout import Rollout
from deepseek_ray.serving.shadow import ShadowScorer
from deepseek_ray.serving.shadow_trial import ShadowTrial, record_of
from deepseek_ray.serving.traffic import NO_TRAFFIC, Arm, Release, Shadow, TrafficPolicy
from tests.unit.serving_parts import NOW, live_model
from tests.unit.test_rollout import LIMITS, NOW_US, Trial, fails

SETTINGS = ReleaseConfig(shadow_s=60, shadow_decisions=100, steps=[40, 80], dwell_s=60, min_decisions=100)
EMPTY = TrafficPolicy(limits=LIMITS, salt="a1", since_us=NOW_US - 1)


def first(**changes: Any) -> TrafficPolicy:
    """A release of version 2, compared with champion 1, that began at noon."""
    made = start(EMPTY, "2", "1", SETTINGS.model_copy(update=changes))
    return made.model_copy(update={"since_us": NOW_US - 1, "salt": "a1"})


def view(after_s: float = 60.0, champion: str = "1", scored: int = 100, **changes: str) -> View:
    return View(NOW_US + round(after_s * 1e6), champion, changes.pop("refused", ""), ShadowVerdict(scored, **changes))


def test_a_release_begins_as_shadow_and_its_policy_holds_all_that_is_known() -> None:
    policy = first()
    assert (policy.arms, policy.shadow, policy.limits) == ((), Shadow(version="2"), LIMITS)
    assert TrafficPolicy.parse(policy.model_dump_json()) == policy
    since = NOW.isoformat(timespec="seconds").replace("12:00:00", "11:59:59")
    assert stands(policy) == f"version 2 is the shadow since {since}; canary 40 % after 60 s and 100 decisions"
    at_once = first(shadow_s=0)
    assert (at_once.shadow, at_once.arms) == (None, (Arm(alias="canary", version="2", percent=40),))
    assert "80 % after 60 s and 100 decisions" in stands(at_once)
    assert "; champion after " in stands(at_once.grown(80))


def test_nothing_that_has_traffic_is_pushed_aside() -> None:
    assert taken(NO_TRAFFIC) == taken(EMPTY) == stands(EMPTY) == ""
    assert "a release is under way: version 2" in taken(first())
    by_hand = TrafficPolicy(arms=(Arm(alias="challenger", version="3", percent=5),), shadow=Shadow(version="4"))
    assert taken(by_hand) == "the traffic is in use by hand: challenger (version 3) 5 %, shadow (version 4)"
    with pytest.raises(ValueError, match="in use by hand"):
        start(by_hand, "2", "1", SETTINGS)


@pytest.mark.parametrize(
    ("seen", "action", "why"),
    [
        (view(59), "", ""),
        (view(scored=99), "", ""),
        (view(), "advance", "healthy"),
        (view(cause="score-shift", why="moved"), "rollback", "moved"),
        (view(0, refused="torn"), "rollback", "torn"),
        (view(0, champion="3"), "rollback", "version 3 is the champion now, it was compared with version 1"),
        (view(0, champion="2"), "promote", "it is the champion"),
        (View(NOW_US, "1"), "", ""),
    ],
)
def test_each_turn_of_the_shadow(seen: View, action: str, why: str) -> None:
    policy = first()
    move = turn("text", policy, seen)
    assert (move.action, move.why) == (action, why) if move else action == ""
    if move is None or move.action == "advance":
        return
    assert (move.after.release, move.after.shadow, move.after.arms) == (None, None, ())
    assert (move.after.limits, move.after.revision) == (LIMITS, policy.revision + 1)


def test_on_the_steps_only_another_champion_or_a_refusal_ends_it_here() -> None:
    policy = first().begun().grown(80)
    assert policy.release == first().release
    assert turn("text", policy, View(NOW_US + 10**12, "1")) is None
    for seen in (View(NOW_US, "3"), View(NOW_US, "1", refused="torn")):
        move = turn("text", policy, seen)
        assert move is not None
        assert move.summary == "version 2: canary 80 % -> taken back"


def test_a_release_needs_its_version_in_the_traffic() -> None:
    release = Release(version="2", champion="1")
    with pytest.raises(ConfigError, match="the release of version 2 needs it as shadow, or as the only arm"):
        TrafficPolicy.make(release=release, shadow=Shadow(version="3"))
    with pytest.raises(ConfigError, match="needs it as shadow"):
        TrafficPolicy.make(release=release, arms=(Arm(alias="canary", version="2", percent=5),))


@pytest.mark.parametrize("steps", [[], [5, 1], [0, 5], [5, 101], [1, 1]])
def test_steps_that_do_not_rise_to_100_at_most_are_refused_by_name(steps: list[float]) -> None:
    with pytest.raises(ConfigError, match=r"release\.steps"):
        build_config(overrides={"release.steps": steps})


def test_only_the_first_difference_of_a_card_with_one_wrong_side_counts() -> None:
    told = [("c1", True, True), ("c1", True, False), ("c2", True, False), ("c3", False, True), ("c1", False, False)]
    record = record_of(Beside(3, [(0.3, 0.4, "c3"), (0.1, 0.2, "c1")], [Mistake(*one) for one in told]))
    assert record.share == 0.5
    assert record.arm.bad_cards == {"missed_fraud": {"c1"}, "false_alarm": {"c3"}}
    assert record.champion.bad_cards == {"missed_fraud": {"c2"}, "false_alarm": {"c1"}}
    assert (list(record.arm.scores), list(record.champion.scores), record.arm.cards) == (
        [0.1, 0.3], [0.2, 0.4], {"c1", "c3"},
    )  # fmt: skip


class Released(Trial):
    """A service with a release of version 2; the test is the clock and the watcher."""

    def __init__(self, path: Path) -> None:
        self.failed: tuple[Check, ...] = ()
        self.refusals: dict[str, str] = {}
        self.path, self.shadow = path, None
        super().__init__(path)
        self.predictor._now_us = lambda: time.time_ns() // 1_000  # later policies begin by the same clock
        self.shadow = ShadowScorer(lambda: self.predictor.plan.shadow, path / "shadow.db", self.metrics)
        self.offered = 0.0
        self.predictor.witness = self._offer
        self.registry.aliases["champion"] = "1"
        self.registry.traffic = first().model_dump_json()
        self.follow()

    def restart(self) -> Rollout:
        book: Any = self.registry
        trial = ShadowTrial(self.path / "shadow.db", self.log.path, self._calls, look_s=0)
        steps = ReleaseSteps(trial, lambda: self.refusals, self._decision)
        clock = lambda: self.now_us  # noqa: E731
        return Rollout(self.predictor, lambda: book, self.log.path, self.metrics, releases=steps, now_us=clock)

    def _offer(self, rows: Any) -> None:
        assert self.shadow is not None
        self.offered += len(rows) if self.predictor.plan.shadow else 0
        self.shadow.offer(rows)

    def _calls(self, version: str) -> Any:
        assert self.shadow is not None
        return self.shadow.calls(version)

    def _decision(self, version: str) -> GateDecision:
        passed = tuple(Check(name, True, 1.0, 1.0) for name in GATES)
        return GateDecision(name="risk", version=version, champion_version="1", checks=self.failed or passed)

    def follow(self) -> TrafficPolicy:
        """What the watcher does."""
        policy = TrafficPolicy.parse(self.registry.traffic)
        self.put(policy)
        live = replace(live_model("2"), scorer=self.scorer) if policy.shadow else None
        self.predictor.reroute(lambda plan: replace(plan, shadow=live))
        if (version := self.registry.aliases["champion"]) != self.predictor.live.version:
            self.predictor.swap(replace(live_model(version), scorer=self.scorer))
            self.predictor.reroute(lambda plan: plan.without(["canary"]))
        return policy

    def drain(self) -> None:
        """Wait until the shadow has scored all it was offered."""
        give_up = time.monotonic() + 20
        while self.shown("shadow_transactions_total") + self.shown("shadow_failed_total") < self.offered:
            assert time.monotonic() < give_up
            time.sleep(0.01)

    def shown(self, name: str) -> float:
        return self.monitor.registry.get_sample_value(f"deepseek_ray_{name}", {"version": "2"}) or 0.0

    def tick(self, after_s: float = 0.0) -> list[tuple[str, str, str]]:
        """Let time pass, look, and let the watcher follow; all moves so far."""
        self.now_us = max(self.now_us, TrafficPolicy.parse(self.registry.traffic).since_us) + round(after_s * 1e6)
        self.rollout.tick()
        self.follow()
        return self.moved()

    def close(self) -> None:
        assert self.shadow is not None
        self.shadow.close()
        super().close()


@pytest.fixture
def made(tmp_path: Path) -> Iterator[Released]:
    released = Released(tmp_path)
    yield released
    released.close()


TAKEN_BACK = [("rollback", "the service", "version 2: shadow -> taken back")]


def to_canary(made: Released) -> None:
    made.score(150)
    made.drain()
    assert made.tick(61)[-1][:2] == ("advance", "the service")
    made.rollout = made.restart()


def test_a_healthy_version_goes_from_shadow_over_each_step_to_champion(made: Released) -> None:
    assert {version for version, _ in made.score(150)} == {"1"}
    made.drain()
    assert made.tick(30) == [], "too early"
    assert made.tick(61) == [("advance", "the service", "version 2: shadow -> canary 40 %")]
    made.rollout = made.restart()
    assert {version for version, _ in made.score(400)} == {"1", "2"}
    made.follow()
    made.tick(61)
    made.score(400)
    made.tick(61)
    assert made.moved()[1:] == [
        ("advance", "the service", "canary (version 2) 40 % -> 80 %"),
        ("promote", "the service", "version 2: canary 80 % -> champion"),
    ]
    assert made.registry.aliases["champion"] == "2"
    policy = TrafficPolicy.parse(made.registry.traffic)
    assert (policy.release, policy.arms, policy.shadow, policy.limits) == (None, (), None, LIMITS)
    assert {version for version, _ in made.score(20)} == {"2"}
    assert len(made.tick(10**6)) == 3


def test_a_shadow_that_scores_otherwise_never_answers_anyone(made: Released) -> None:
    made.scorer.bend = lambda p: p**3
    assert {version for version, _ in made.score(300)} == {"1"}
    made.drain()
    assert made.tick(1) == TAKEN_BACK
    assert "PSI" in made.registry.moved[0].why
    assert (made.registry.aliases["champion"], TrafficPolicy.parse(made.registry.traffic).shadow) == ("1", None)
    assert b'traffic_moves_total{action="rollback",cause="score-shift"} 1.0' in made.monitor.render()


def test_a_shadow_that_fails_is_taken_back(made: Released) -> None:
    made.scorer.bend = fails
    for _ in range(8):
        made.score(10)
        made.drain()
    assert made.tick(1) == TAKEN_BACK
    assert "model calls failed" in made.registry.moved[0].why


def test_a_shadow_that_misses_what_the_champion_finds_is_taken_back(made: Released) -> None:
    made.predictor.reroute(lambda plan: plan.with_threshold("2", 0.3))  # the champion reviews from 0.2 on
    made.predictor.reroute(lambda plan: plan.with_threshold("1", 0.2))
    rows = made.score(600)
    made.drain()
    apart = [ident for n, (_, ident) in enumerate(rows) if 0.2 <= (100 + 37 * (n % 120)) / 10_000 < 0.3]
    made.now_us += 1_000_000
    made.rollout.tick()
    assert made.moved() == [], "scores alone say nothing"
    made.label(apart[:12], is_fraud=True)
    made.rollout.tick()
    assert made.moved() == TAKEN_BACK
    assert "missed fraud" in made.registry.moved[0].why


def test_a_version_that_cannot_be_loaded_does_not_hold_up_the_next(made: Released) -> None:
    made.refusals = {"shadow": "a file is altered"}
    assert made.tick() == TAKEN_BACK
    assert made.registry.moved[0].why == "a file is altered"


def test_a_bad_canary_is_taken_back_and_its_release_with_it(made: Released) -> None:
    to_canary(made)
    made.scorer.bend = fails
    assert {version for _ in range(6) for version, _ in made.score(20)} == {"1"}
    assert made.tick()[-1] == ("rollback", "the service", "canary (version 2) 40 % -> 0 %")
    assert TrafficPolicy.parse(made.registry.traffic).release is None
    assert made.registry.aliases["champion"] == "1"
    assert len(made.tick(10**6)) == 2


def test_another_champion_ends_the_release(made: Released) -> None:
    to_canary(made)
    made.registry.aliases["champion"] = "9"
    made.follow()
    assert made.tick()[-1] == ("rollback", "the service", "version 2: canary 40 % -> taken back")


def at_the_end(made: Released) -> None:
    to_canary(made)
    made.registry.traffic = made.follow().grown(80).model_dump_json()
    made.follow()
    made.score(200)


def test_what_the_gate_refuses_at_the_end_is_taken_back(made: Released) -> None:
    at_the_end(made)
    made.failed = (Check("average_precision", False, 0.1, 0.5),)
    made.tick(61)
    assert made.tick()[-1] == ("rollback", "the service", "version 2: canary 80 % -> taken back")
    assert "average_precision" in made.registry.moved[-1].why
    assert made.registry.aliases["champion"] == "1"


def test_somebody_who_takes_the_traffic_back_in_the_last_moment_wins(made: Released) -> None:
    at_the_end(made)
    made.registry.traffic = TrafficPolicy.parse(made.registry.traffic).ended().model_dump_json()
    made.now_us += 10**12
    made.rollout.tick()  # the service has not seen it yet
    assert (made.registry.aliases["champion"], len(made.moved())) == ("1", 1)
    made.follow()
    assert len(made.tick(10**6)) == 1


def test_a_crash_between_champion_and_traffic_is_made_good(made: Released) -> None:
    at_the_end(made)
    made.registry.aliases["champion"] = "2"
    made.follow()
    made.rollout = made.restart()
    assert made.tick()[-1] == ("promote", "the service", "version 2: canary 80 % -> champion")
    assert TrafficPolicy.parse(made.registry.traffic).arms == ()


def test_with_the_registry_away_the_last_move_waits(made: Released) -> None:
    at_the_end(made)
    made.now_us = TrafficPolicy.parse(made.registry.traffic).since_us + 61_000_000
    made.registry.away = True
    for _ in range(2):
        with pytest.raises(RegistryUnavailableError):
            made.rollout.tick()
    made.registry.away = False
    assert made.tick()[-1] == ("promote", "the service", "version 2: canary 80 % -> champion")
