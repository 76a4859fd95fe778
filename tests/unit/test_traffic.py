"""A card always meets the same arm, and a growing arm only takes cards from the champion."""

from __future__ import annotations

import numpy as np
import pytest

from deepseek_ray.errors import ConfigError
from deepseek_ray.serving.traffic import Arm, Limits, Schedule, Shadow, Split, TrafficPolicy

CARDS = [f"card-{number}" for number in range(5_000)]


def arm(percent: float, alias: str = "canary", version: str = "2") -> Arm:
    return Arm.model_validate({"alias": alias, "version": version, "percent": percent})


def members(split: Split, number: int = 0) -> set[str]:
    return {card for card in CARDS if split.arm_of(card) == number}


def test_each_arm_gets_its_share_and_the_champion_the_rest() -> None:
    split = Split([arm(5), arm(20, "challenger", "3")], "a1")
    shares = [len(members(split, number)) / len(CARDS) for number in (0, 1, -1)]
    np.testing.assert_allclose(shares, [0.05, 0.20, 0.75], atol=0.02)


def test_a_growing_arm_keeps_its_cards_and_leaves_the_other_arm_alone() -> None:
    other = arm(20, "challenger", "3")
    steps = [Split([arm(percent), other], "a1") for percent in (1, 5, 25, 80)]
    groups = [members(split) for split in steps]
    assert groups[0] < groups[1] < groups[2] < groups[3]
    assert len({frozenset(members(split, 1)) for split in steps}) == 1


def test_one_hundred_percent_is_everyone_and_an_empty_policy_no_one() -> None:
    assert members(Split([arm(100)], "7")) == set(CARDS)
    assert members(Split([arm(100, "challenger")], "7")) == set(CARDS)
    assert members(Split([], "7"), -1) == set(CARDS)


def test_places_are_the_same_in_every_process_and_other_salts_draw_others() -> None:
    assert Split([], "a1").place("card-1") == pytest.approx(7.837726088510822, abs=1e-12)
    one, two = members(Split([arm(10)], "a1")), members(Split([arm(10)], "a2"))
    assert len(one & two) / len(one) < 0.25


def test_a_policy_survives_its_text_and_no_text_is_no_arm() -> None:
    policy = TrafficPolicy(arms=(arm(5),), shadow=Shadow(version="4"), schedule=Schedule(), revision=3)
    assert TrafficPolicy.parse(policy.model_dump_json()) == policy
    assert TrafficPolicy.parse("").champion_percent == 100


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"arms": [arm(60), arm(50, "challenger")]}, "110 % of the traffic"),
        ({"arms": [arm(1), arm(2)]}, "canary, canary"),
        ({"arms": [{"alias": "champion", "version": "1", "percent": 1}]}, "arms.0.alias' = 'champion'"),
        ({"arms": [{"alias": "canary", "version": "x", "percent": 1}]}, "arms.0.version' = 'x'"),
        ({"arms": [{"alias": "canary", "version": "1", "percent": float("nan")}]}, "arms.0.percent"),
        ({"schedule": {}}, "exactly one arm, not 0"),
        ({"arms": [arm(1)], "schedule": {"steps": [5, 1]}}, "steps must rise"),
        ({"arms": [arm(1)], "schedule": {"steps": [5, 101]}}, "up to 100"),
        ({"limits": {"alpha": 0}}, "limits.alpha' = 0"),
        ({"colour": 1}, "colour"),
    ],
)
def test_a_wrong_policy_is_refused_by_field_and_value(fields: dict[str, object], why: str) -> None:
    with pytest.raises(ConfigError, match="deepseek-ray traffic set") as caught:
        TrafficPolicy.make(**fields)
    assert why in str(caught.value)


def test_text_that_is_no_policy_is_refused() -> None:
    with pytest.raises(ConfigError):
        TrafficPolicy.parse("{")


def test_the_schedule_climbs_and_remembers_its_steps() -> None:
    policy = TrafficPolicy(arms=(arm(1),), schedule=Schedule(), limits=Limits(max_psi=1))
    seen = [policy]
    while (percent := seen[-1].next_percent) is not None:
        seen.append(seen[-1].grown(percent))
    assert [(one.arms[0].percent, one.revision) for one in seen] == [(1, 0), (5, 1), (25, 2), (100, 3)]
    assert {one.salt for one in seen} == {policy.salt}
    assert [step.share("canary") for step in seen[-1].steps] == [0.01, 0.05, 0.25, 1.0]
    assert TrafficPolicy.parse(seen[-1].model_dump_json()) == seen[-1]


def test_another_version_or_a_smaller_share_begins_anew() -> None:
    policy = TrafficPolicy(arms=(arm(25),))
    for after in (TrafficPolicy(arms=(arm(25, version="3"),)), TrafficPolicy(arms=(arm(5),))):
        begun = policy.followed_by(after)
        assert (begun.past, begun.revision) == ((), 1)
        assert begun.salt != policy.salt


def test_a_withdrawn_arm_leaves_the_other_and_the_shadow() -> None:
    policy = TrafficPolicy(arms=(arm(5), arm(20, "challenger", "3")), shadow=Shadow(version="4"), revision=7)
    back = policy.without("canary")
    assert [one.alias for one in back.arms] == ["challenger"]
    assert (back.shadow, back.salt, back.revision) == (policy.shadow, policy.salt, 8)
    assert policy.steps[0].share("canary") == pytest.approx(5 / 80)
