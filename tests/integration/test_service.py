"""The service put together from a run folder, without Ray: real store, log and registry."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from deepseek_ray.config import ServingConfig
from deepseek_ray.data.feature_client import FeatureClient
from deepseek_ray.data.prediction_archive import read_predictions
from deepseek_ray.paths import RunPaths
from deepseek_ray.serving.service import REHEARSAL, RiskService
from tests.served_run import make_run


@pytest.fixture
def service(tmp_path: Path) -> Iterator[RiskService]:
    run = make_run(tmp_path, customers=30, days=20, future_days=2)
    store = FeatureClient(run.paths)
    made = RiskService(run.paths, run.registry, store, store.declaration(), ServingConfig(), "a-key-for-the-tests")
    yield made
    made.close()


def test_the_rehearsal_before_the_first_request_leaves_no_trace(service: RiskService, tmp_path: Path) -> None:
    assert read_predictions(RunPaths(tmp_path)).height == 0
    assert service.log.by_transaction([REHEARSAL.transaction_id]) == {}
    assert service.features.last_event_us([REHEARSAL.card_id]) == {}
    assert service.features.peek(REHEARSAL).cold == ["card", "terminal", "device"]
