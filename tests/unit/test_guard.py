"""Each trigger by itself, and none of them on an arm that is as good as the champion."""

from __future__ import annotations

import numpy as np
import pytest

from deepseek_ray.data.log_follower import Decided, Labelled
from deepseek_ray.serving.arm_metrics import CallCounts
from deepseek_ray.serving.guard import Record, Room, StepRecord, Verdict, judge
from deepseek_ray.serving.traffic import Limits

LIMITS = Limits()
CALM = CallCounts(500, 0, (3.0,) * 500)


def record(scores: np.ndarray, *, missed: int = 0, alarms: int = 0, prefix: str = "c") -> Record:
    made = Record()
    rows = [Decided(f"p{i}", f"{prefix}{i % 400}", "1", float(score), False, i) for i, score in enumerate(scores)]
    for row in rows:
        made.decided(row)
    for row in rows[:missed]:
        made.labelled(Labelled(row, True))
    for row in rows[:alarms]:
        made.labelled(Labelled(row._replace(review=True), False))
    return made


def uniform(rows: int, seed: int, power: float = 1.0) -> np.ndarray:
    return np.random.default_rng(seed).random(rows) ** power


def verdict(arm: Record, calls: CallCounts = CALM, champion: Record | None = None) -> Verdict:
    rival = champion or record(uniform(4_000, 0), missed=100, alarms=100, prefix="d")
    return judge([StepRecord(0.2, arm, rival)], calls, CALM, LIMITS)


def test_an_arm_like_the_champion_is_healthy() -> None:
    found = verdict(record(uniform(1_000, 1), missed=25, alarms=25))
    assert (found.cause, found.why) == ("", "")
    assert found.psi is not None
    assert found.psi < 0.05
    assert all(p > 0.05 for p in found.p_values.values())


@pytest.mark.parametrize(
    ("arm", "calls", "cause"),
    [
        (record(uniform(1_000, 1)), CallCounts(200, 12, (3.0,) * 200), "error-rate"),
        (record(uniform(1_000, 1)), CallCounts(2, 2, ()), "error-rate"),
        (record(uniform(1_000, 1)), CallCounts(200, 0, (3.0,) * 190 + (80.0,) * 10), "latency"),
        (record(uniform(1_000, 1, power=3)), CALM, "score-shift"),
        (record(uniform(1_000, 1), missed=80), CALM, "quality"),
        (record(uniform(1_000, 1), alarms=80), CALM, "quality"),
    ],
)
def test_each_trigger_names_its_cause(arm: Record, calls: CallCounts, cause: str) -> None:
    found = verdict(arm, calls)
    assert found.cause == cause
    assert found.why


def test_one_failed_call_too_few_calls_and_too_few_scores_prove_nothing() -> None:
    assert verdict(record(uniform(1_000, 1)), CallCounts(60, 1, (500.0,) * 59)).cause == ""
    few = verdict(record(uniform(400, 1, power=9)))
    assert (few.cause, few.psi) == ("", None)


def test_scores_of_a_handful_of_cards_are_not_compared() -> None:
    one_card = Record()
    for number in range(2_000):
        one_card.decided(Decided(f"p{number}", "c1", "1", 0.9, False, number))
    assert verdict(one_card).psi is None


def test_slow_beside_a_champion_that_is_slow_too_is_the_machines_fault() -> None:
    slow = CallCounts(200, 0, (60.0,) * 200)
    found = judge([StepRecord(0.2)], slow, CallCounts(200, 0, (50.0,) * 200), LIMITS)
    assert found.cause == ""


def test_a_card_is_counted_once_for_all_its_frauds() -> None:
    unlucky = Record()
    for number in range(50):
        unlucky.labelled(Labelled(Decided(f"p{number}", "c1", "2", 0.1, False, number), True))
    assert (unlucky.labels, unlucky.frauds, len(unlucky.bad_cards["missed_fraud"])) == (50, 50, 1)


def test_a_full_step_notes_no_more_cards_on_either_side() -> None:
    room = Room(100)
    arm, champion = Record(room=room), Record(room=room)
    for number in range(1_000):  # the arm's share is a fifth, and it is no worse
        side = arm if number % 5 == 0 else champion
        side.labelled(Labelled(Decided(f"p{number}", f"c{number}", "1", 0.1, False, number), True))
    assert [len(side.bad_cards["missed_fraud"]) for side in (arm, champion)] == [20, 80]
    assert judge([StepRecord(0.2, arm, champion)], CALM, CALM, LIMITS).cause == ""
    arm.labelled(Labelled(Decided("p", "c0", "1", 0.9, True, 0), False))
    assert len(arm.bad_cards["false_alarm"]) == 1  # the other kind has a room of its own


def test_at_one_hundred_percent_scores_are_compared_with_the_champions_last_ones() -> None:
    before = StepRecord(0.2, record(uniform(600, 1)), record(uniform(4_000, 0), prefix="d"))
    now = StepRecord(1.0, record(uniform(900, 2, power=3), missed=300))
    found = judge([before, now], CALM, CallCounts(0, 0, ()), LIMITS)
    assert found.cause == "score-shift"
    assert found.evidence["missed_fraud"] <= 0  # nobody beside it to compare with


def test_late_labels_of_an_earlier_step_still_count() -> None:
    before = StepRecord(0.2, record(uniform(600, 1), missed=120), record(uniform(900, 0), missed=100, prefix="d"))
    assert judge([before, StepRecord(0.5)], CALM, CALM, LIMITS).cause == "quality"
