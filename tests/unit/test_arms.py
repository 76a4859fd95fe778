"""A batch split by arm: sticky, logged with the version that answered, and never failed by an arm."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deepseek_ray.serving.arm_metrics import ArmMetrics, ArmTally
from deepseek_ray.serving.arms import LiveArm
from deepseek_ray.serving.commands import LiveModel, ScoreCommand, ScoreResult
from deepseek_ray.serving.traffic import TrafficPolicy
from tests.unit.serving_parts import FakeScorer, Rig, body, event, live_model, rig

POLICY = TrafficPolicy(salt="a1")


class Tilted(FakeScorer):
    """Says one tenth more than the stand-in model, or fails as told."""

    answer: Any = None

    def predict_proba(self, features: Any, sequence: Any) -> Any:
        if isinstance(self.answer, Exception):
            raise self.answer
        tilted = super().predict_proba(features, sequence) + 0.1
        return tilted if self.answer is None else self.answer(tilted)


def put_arm(made: Rig, percent: float, *, answer: Any = None, threshold: float = 0.5) -> LiveArm:
    scorer = Tilted()
    scorer.answer = answer
    live: LiveModel = replace(live_model("2", threshold), scorer=scorer)
    metrics = ArmMetrics(made.monitor.registry)
    arm = LiveArm("canary", percent, live, ArmTally("canary", "2", metrics))
    tally = ArmTally("champion", "1", metrics)
    made.predictor.reroute(lambda plan: replace(plan, policy=POLICY, tally=tally).with_arms((arm,)))
    return arm


def versions(made: Rig, first: int, count: int = 40) -> dict[str, str]:
    """Version that answers each of some cards, in batches of several requests."""
    events = [event(first + n, card=f"c{n}", amount=1_000) for n in range(count)]
    results = made.predictor.run([ScoreCommand(events[n : n + 5]) for n in range(0, count, 5)])
    found = {}
    for result in results:
        assert isinstance(result, ScoreResult), result
        found |= {one.transaction_id: (one.model_version, one.probability) for one in result.predictions}
    cards = {item.transaction_id: item.card_id for item in events}
    assert all(p == pytest.approx({"1": 0.1, "2": 0.2}[version]) for version, p in found.values())
    return {cards[key]: version for key, (version, _) in found.items()}


def test_a_card_meets_the_same_arm_each_time_and_growth_moves_none_back(tmp_path: Path) -> None:
    with rig(tmp_path) as made:
        put_arm(made, 30)
        first, again = versions(made, 1), versions(made, 101)
        assert first == again
        assert set(first.values()) == {"1", "2"}
        made.predictor.reroute(lambda plan: plan.with_arms(tuple(replace(arm, percent=60.0) for arm in plan.arms)))
        grown = versions(made, 201)
        assert {card for card, version in first.items() if version == "2"} < {c for c, v in grown.items() if v == "2"}


def test_over_http_the_log_names_the_version_and_a_repeat_keeps_it(tmp_path: Path) -> None:
    async def story(made: Rig) -> None:
        async with made.client() as client:
            arm = put_arm(made, 100)
            first = await client.post("/v1/risk/score", json=body(event(1)))
            made.predictor.reroute(lambda plan: plan.without({"canary"}))
            again = await client.post("/v1/risk/score", json=body(event(1)))
            other = await client.post("/v1/risk/score", json=body(event(2)))
            assert again.content == first.content
            assert [answer.json()["model_version"] for answer in (first, other)] == ["2", "1"]
            row = made.log.get(first.json()["prediction_id"])
            assert row is not None
            assert (row.model_version, row.threshold) == ("2", arm.live.threshold)

    with rig(tmp_path) as made:
        asyncio.run(story(made))


@pytest.mark.parametrize(
    "answer",
    [
        RuntimeError("torn"),
        lambda p: p * np.nan,
        lambda p: p + 5,
        lambda p: p[:-1],
    ],
)
def test_whatever_an_arm_does_wrong_the_champion_answers_and_it_is_counted(tmp_path: Path, answer: Any) -> None:
    with rig(tmp_path) as made:
        arm = put_arm(made, 50, answer=answer)
        assert set(versions(made, 1).values()) == {"1"}
        counts = arm.tally.counts()
        assert (counts.calls, counts.failed) == (1, 1)
        assert b'arm_errors_total{arm="canary",version="2"} 1.0' in made.monitor.render()


def test_an_arm_decides_by_its_own_threshold_which_can_be_moved(tmp_path: Path) -> None:
    async def story(made: Rig) -> None:
        async with made.client() as client:
            put_arm(made, 100, threshold=0.15)
            answer = await client.post("/v1/risk/score", json=body(event(1)))
            assert answer.json()["decision"] == "review"
            moved = await client.post("/v1/risk/threshold", json={"threshold": 0.9, "model_version": "2"})
            assert (moved.json()["model_version"], moved.json()["threshold"]) == ("2", 0.9)
            assert (await client.post("/v1/risk/score", json=body(event(2)))).json()["decision"] == "approve"
            assert made.predictor.live.threshold == 0.5

    with rig(tmp_path) as made:
        asyncio.run(story(made))
