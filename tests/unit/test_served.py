"""Training rows out of the log: the served vectors, with labels that came or whose time has passed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from deepseek_ray.data.events import DAY_US
from deepseek_ray.data.periods import card_numbers
from deepseek_ray.data.prediction_archive import compact, read_predictions
from deepseek_ray.data.prediction_log import LoggedPrediction, PredictionLog
from deepseek_ray.data.served import matured_rows, to_rows
from deepseek_ray.errors import DataError
from deepseek_ray.paths import RunPaths
from tests.unit.serving_parts import event
from tests.unit.test_prediction_log import label, row

COLUMNS = ("amount", "count")
DIGEST = "d"


def at_day(number: int, day: float, **changes: object) -> LoggedPrediction:
    """Decision ``p<number>`` on a day counted from 0, of card ``c<number>``."""
    order_us = round(day * DAY_US)
    return row(number, order_us=order_us, transaction=event(number, card=f"c{number}", amount=100 * number), **changes)


@pytest.fixture
def paths(tmp_path: Path) -> RunPaths:
    """Decisions of days 0, 1, 2.5, 5 and 8; the first and the last are frauds, the second is genuine."""
    log = PredictionLog(tmp_path / "predictions.db")
    log.commit([at_day(number, day) for number, day in enumerate((0.0, 1.0, 2.5, 5.0, 8.0), start=1)])
    log.commit(feedback=[label(1, True), label(2, False), label(5, True)])
    log.close()
    return RunPaths(tmp_path)


def test_only_whole_days_older_than_the_delay_train(paths: RunPaths) -> None:
    rows = matured_rows(paths, COLUMNS, DIGEST, label_delay_days=3.0)
    assert (rows.order_us / DAY_US).tolist() == [0.0, 1.0, 2.5]  # of day 5 only the first moment is three days old
    assert rows.label.tolist() == [1, 0, 0]  # no label in time means genuine
    assert rows.amount_cents.tolist() == [100, 200, 300]
    assert rows.day.tolist() == [0, 1, 2]


def test_vectors_are_the_served_ones(paths: RunPaths) -> None:
    rows = matured_rows(paths, COLUMNS, DIGEST, label_delay_days=3.0)
    np.testing.assert_array_equal(rows.features, np.array([[1, 1.1], [1, 2.1], [1, 3.1]], np.float32))
    assert rows.sequence.shape == (3, 2, 6)
    assert rows.feature_names == COLUMNS


def test_cards_have_the_numbers_of_every_other_dataset(paths: RunPaths) -> None:
    logged = read_predictions(paths).head(4)  # the last decision's day is not over
    rows = matured_rows(paths, COLUMNS, DIGEST, label_delay_days=0.0)
    assert rows.card.tolist() == card_numbers(logged["card_id"]).tolist()


def test_compacted_rows_read_the_same(paths: RunPaths) -> None:
    before = matured_rows(paths, COLUMNS, DIGEST, label_delay_days=3.0)
    compact(paths, prune=True)
    assert matured_rows(paths, COLUMNS, DIGEST, label_delay_days=3.0).digest == before.digest


def test_another_vector_is_left_out(paths: RunPaths) -> None:
    log = PredictionLog(paths.prediction_log)
    log.commit(
        [at_day(number, day, feature_digest="other", values=np.zeros(9)) for number, day in ((6, 2.0), (7, 3.0))]
    )
    log.close()
    assert len(matured_rows(paths, COLUMNS, DIGEST, label_delay_days=3.0)) == 3
    assert len(matured_rows(paths, tuple("abcdefghi"), "other", label_delay_days=0.0)) == 1


def test_nothing_old_enough_is_said_with_the_numbers(paths: RunPaths) -> None:
    with pytest.raises(DataError, match="None of 5 logged decisions is 30 days old"):
        matured_rows(paths, COLUMNS, DIGEST, label_delay_days=30.0)


def test_the_truth_may_come_from_elsewhere(paths: RunPaths) -> None:
    logged = read_predictions(paths).head(2)
    rows = to_rows(logged, COLUMNS, np.array([0, 1]), np.array([0, 4]))
    assert (rows.label.tolist(), rows.scenario.tolist()) == ([0, 1], [0, 4])
