"""The shadow sees everything and is seen by nobody."""

from __future__ import annotations

import asyncio
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deepseek_ray.data.prediction_log import LoggedFeedback
from deepseek_ray.serving.arm_metrics import ArmMetrics
from deepseek_ray.serving.commands import LiveModel
from deepseek_ray.serving.shadow import ShadowReport, ShadowScorer, compare
from tests.unit.serving_parts import FakeScorer, Rig, body, event, live_model, rig


class Slow(FakeScorer):
    """Waits until it is told to go on."""

    def __init__(self) -> None:
        self.go = threading.Event()

    def predict_proba(self, features: Any, sequence: Any) -> Any:
        self.go.wait(20)
        return np.sqrt(super().predict_proba(features, sequence))


def shadow_of(made: Rig, path: Path, live: LiveModel | None, **options: int) -> ShadowScorer:
    scorer = ShadowScorer(lambda: live, path / "shadow.db", ArmMetrics(made.monitor.registry), **options)
    made.predictor.witness = scorer.offer
    return scorer


async def send(made: Rig, count: int, first: int = 1) -> list[dict[str, Any]]:
    async with made.client() as client:
        events = [event(first + n, card=f"c{n}", amount=100 + 60 * n) for n in range(count)]
        answers = [await client.post("/v1/risk/score", json=body(one)) for one in events]
    assert {answer.status_code for answer in answers} == {200}
    return [answer.json() for answer in answers]


def test_a_shadow_that_hangs_delays_no_answer_and_drops_what_it_cannot_hold(tmp_path: Path) -> None:
    with rig(tmp_path) as made:
        scorer = Slow()
        shadow = shadow_of(made, tmp_path, replace(live_model("2"), scorer=scorer), queued_rows=10)
        start = time.perf_counter()
        answers = asyncio.run(send(made, 40))
        assert time.perf_counter() - start < 10
        assert {one["model_version"] for one in answers} == {"1"}
        scorer.go.set()
        shadow.close()
        dropped = made.monitor.registry.get_sample_value("deepseek_ray_shadow_dropped_total") or 0.0
        scored = made.monitor.registry.get_sample_value("deepseek_ray_shadow_transactions_total", {"version": "2"})
        assert dropped >= 40 - 10 - 10
        assert scored == 40 - dropped


def test_scores_are_compared_and_later_judged_by_labels(tmp_path: Path) -> None:
    with rig(tmp_path) as made:
        scorer = Slow()
        scorer.go.set()
        shadow = shadow_of(made, tmp_path, replace(live_model("2"), scorer=scorer), kept_rows=100)
        answers = asyncio.run(send(made, 120))
        shadow.close()
        labels = [LoggedFeedback(one["prediction_id"], n > 110, 1, 1, 1, 1) for n, one in enumerate(answers) if n > 90]
        made.log.commit(feedback=labels)
        report = compare(tmp_path / "shadow.db", made.log.path, "2")
        assert (report.scored, report.labels) == (100, 29)
        assert report.psi is not None
        assert report.psi > 0.25
        assert report.differing_decisions is not None
        assert 0 < report.differing_decisions < 1
        assert report.average_precision == report.served_average_precision == pytest.approx(1.0)
        assert compare(tmp_path / "shadow.db", made.log.path, "9").scored == 0


def test_a_failing_shadow_is_counted_and_goes_on(tmp_path: Path) -> None:
    with rig(tmp_path) as made:
        scorer = FakeScorer()
        scorer.fail = True
        shadow = shadow_of(made, tmp_path, replace(live_model("2"), scorer=scorer))
        asyncio.run(send(made, 3))
        while b'shadow_failed_total{version="2"} 3.0' not in made.monitor.render():
            time.sleep(0.01)
        scorer.fail = False
        asyncio.run(send(made, 3, first=50))
        shadow.close()
        assert b'shadow_transactions_total{version="2"} 3.0' in made.monitor.render()


def test_scores_that_cannot_be_kept_are_not_the_fault_of_the_version(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with rig(tmp_path) as made:
        shadow = shadow_of(made, tmp_path / "file", live_model("2"))
        asyncio.run(send(made, 3))
        shadow.close()
        assert b'shadow_failed_total{version="2"} 3.0' in made.monitor.render()
        calls = shadow.calls("2")
        assert (calls.calls > 0, calls.failed) == (True, 0)


def test_without_a_shadow_nothing_is_queued_or_written(tmp_path: Path) -> None:
    with rig(tmp_path) as made:
        shadow = shadow_of(made, tmp_path, None)
        asyncio.run(send(made, 3))
        shadow.close()
        assert not (tmp_path / "shadow.db").exists()
        assert compare(tmp_path / "shadow.db", made.log.path, "2") == ShadowReport("2", 0)
