"""The service put together from a run folder, without Ray: real store, log and registry."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from deepseek_ray.config import ServingConfig
from deepseek_ray.data.feature_client import FeatureClient
from deepseek_ray.data.prediction_archive import read_predictions
from deepseek_ray.paths import RunPaths
from deepseek_ray.serving.service import REHEARSAL, RiskService
from tests.served_run import make_run
from tests.unit.test_prediction_log import row


@pytest.fixture
def service(tmp_path: Path) -> Iterator[RiskService]:
    run = make_run(tmp_path, customers=30, days=20, future_days=2)
    store = FeatureClient(run.paths)
    config = ServingConfig(compact_every_s=0.1)
    made = RiskService(run.paths, run.registry, store, store.declaration(), config, "a-key-for-the-tests")
    yield made
    made.close()


def test_the_rehearsal_before_the_first_request_leaves_no_trace(service: RiskService, tmp_path: Path) -> None:
    assert read_predictions(RunPaths(tmp_path)).height == 0
    assert service.log.by_transaction([REHEARSAL.transaction_id]) == {}
    assert service.features.last_event_us([REHEARSAL.card_id]) == {}
    assert service.features.peek(REHEARSAL).cold == ["card", "terminal", "device"]


def test_the_log_is_compacted_without_being_asked(service: RiskService, tmp_path: Path) -> None:
    service.log.commit([row(1), row(2)])
    service.start()
    give_up = time.monotonic() + 60
    while service.predictor.archived < 2:
        assert time.monotonic() < give_up
        time.sleep(0.05)
    service.predictor.settle()
    assert [served.values.size for name in ("p1", "p2") if (served := service.log.get(name))] == [0, 0]
    assert read_predictions(RunPaths(tmp_path))["prediction_id"].to_list() == ["p1", "p2"]
