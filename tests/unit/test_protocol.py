"""The handbook's protocol: what trains, what is tested, which cards are known, what can be known at all."""

from __future__ import annotations

import os
from datetime import UTC, date, datetime, timedelta

import numpy as np
import polars as pl
import pytest

from deepseek_ray import metrics
from deepseek_ray.data import handbook, protocol
from deepseek_ray.data.datasets import RiskDataset
from deepseek_ray.data.table import to_table
from deepseek_ray.errors import DataError
from deepseek_ray.train.yardsticks import fit_lightgbm_published, fit_logistic

DAY_ONE = date(2018, 4, 1)


def payments(*rows: tuple[int, str, str, int]) -> pl.DataFrame:
    """One payment a row at noon: day counted from 0, card, terminal, kind of fraud or 0."""
    noon = datetime(2018, 4, 1, 12, tzinfo=UTC)
    frame = pl.DataFrame(
        {
            "transaction_id": [f"tx{number:03d}" for number in range(len(rows))],
            "event_time": [noon + timedelta(days=row[0]) for row in rows],
            "card_id": [row[1] for row in rows],
            "terminal_id": [row[2] for row in rows],
            "amount_cents": [1_000] * len(rows),
            "is_fraud": [int(row[3] > 0) for row in rows],
            "fraud_scenario": [row[3] for row in rows],
        }
    )
    return to_table(frame, label_delay_days=2)


def cut(table: pl.DataFrame, **changes: int) -> protocol.Split:
    """Two days of training from the third day on, labels after two days, three test days from the eighth on."""
    days = {"train_days": 2, "delay_days": 2, "test_days": 3, "history_days": 3} | changes
    start, test = DAY_ONE + timedelta(days=2), DAY_ONE + timedelta(days=7)
    return protocol.split(table, train_start=start, test_start=test, **days)


def test_periods_are_whole_days_and_history_ends_with_the_train_period() -> None:
    rows = cut(payments(*((day, f"c{day}", "t", 0) for day in range(12))))
    assert rows.train.tolist() == [2, 3]
    assert rows.history.tolist() == [1, 2, 3]
    assert rows.test.tolist() == [7, 8, 9]


def test_a_card_with_a_fraud_in_training_is_never_tested() -> None:
    rows = cut(payments((2, "bad", "t", 1), (7, "bad", "t", 0), (7, "good", "t", 0), (9, "bad", "t", 1)))
    assert rows.test.tolist() == [2]


def test_a_later_fraud_removes_its_card_when_its_label_is_known_and_not_before() -> None:
    # a fraud on day 5 is known two days after the end of its day: on day 8, not on day 7
    table = payments((2, "x", "t", 0), (5, "card", "t", 1), (7, "card", "t", 0), (8, "card", "t", 0))
    assert cut(table).test.tolist() == [2]
    # one day later, it is unknown on both days
    table = payments((2, "x", "t", 0), (6, "card", "t", 1), (7, "card", "t", 0), (8, "card", "t", 0))
    assert cut(table).test.tolist() == [2, 3]


def test_a_fraud_before_the_train_period_is_forgotten() -> None:
    table = payments((1, "card", "t", 1), (2, "x", "t", 0), (7, "card", "t", 0))
    assert cut(table).test.tolist() == [2]


def test_a_test_period_whose_train_labels_are_unknown_is_refused() -> None:
    table = payments(*((day, "c", "t", 0) for day in range(12)))
    with pytest.raises(DataError, match="not more than 4 days after"):
        cut(table, delay_days=4)
    cut(table, delay_days=3)


def test_a_period_without_rows_is_named() -> None:
    with pytest.raises(DataError, match="The test period holds no transactions"):
        cut(payments((2, "a", "t", 0), (3, "b", "t", 0)))


def test_a_compromised_terminal_is_knowable_only_after_a_labelled_fraud_there() -> None:
    table = payments(
        (0, "a", "t1", 2),  # the first fraud there: nothing known tells it
        (1, "b", "t1", 2),  # the first one's label takes two days
        (2, "c", "t1", 2),  # known
        (2, "d", "t2", 2),  # another terminal
        (30, "e", "t1", 2),  # exactly 28 days after the last one: all forgotten
    )
    assert protocol.knowable(table, np.arange(5), delay_days=2).tolist() == [0, 0, 1, 0, 0]


def test_the_other_kinds_of_fraud_are_knowable_and_genuine_payments_are_not_fraud() -> None:
    table = payments((0, "a", "t", 1), (1, "b", "t", 3), (2, "c", "t", 0))
    assert protocol.knowable(table, np.array([2, 0, 1]), delay_days=2).tolist() == [0, 1, 1]


def test_without_a_delay_a_fraud_still_does_not_reveal_itself() -> None:
    table = payments((0, "a", "t", 2), (1, "b", "t", 2))
    assert protocol.knowable(table, np.arange(2), delay_days=0).tolist() == [0, 1]


needs_handbook = pytest.mark.skipif(
    "DEEPSEEK_RAY_HANDBOOK" not in os.environ, reason="DEEPSEEK_RAY_HANDBOOK names no folder"
)


def published_rows(vector: str, first: date, history_days: int) -> tuple[RiskDataset, RiskDataset, RiskDataset]:
    """Train week, history and test week of the published split, from the days since ``first``."""
    table = handbook.read(os.environ["DEEPSEEK_RAY_HANDBOOK"], label_delay_days=7)
    table = table.filter(pl.col("event_time").dt.date().is_between(first, date(2018, 8, 14)))
    days = {"train_days": 7, "delay_days": 7, "test_days": 7, "history_days": history_days}
    rows = protocol.split(table, train_start=date(2018, 7, 25), test_start=date(2018, 8, 8), **days)
    parts = [rows.train, rows.history, rows.test]
    week, history, test = protocol.datasets(table, vector, parts, delay_days=7, sequence_len=0)
    return week, history, test


@needs_handbook
def test_the_published_rows_and_the_figures_of_one_train_week_come_back() -> None:
    # 15 June lies further back than any window looks from the train week
    train, _, test = published_rows("handbook", date(2018, 6, 15), history_days=7)
    assert (len(train), len(test)) == (67_240, 58_264)
    score = fit_logistic(train).predict_proba(test.features)
    assert metrics.average_precision(test.label, score) == pytest.approx(0.605, abs=0.01)
    assert metrics.auc(test.label, score) == pytest.approx(0.870, abs=0.01)
    score = fit_lightgbm_published(train).predict_proba(test.features)
    assert metrics.average_precision(test.label, score) == pytest.approx(0.649, abs=0.01)


@needs_handbook
def test_the_figure_of_a_hundred_days_with_card_history_comes_back() -> None:
    _, train, test = published_rows("handbook_history", date(2018, 4, 1), history_days=100)
    score = fit_lightgbm_published(train).predict_proba(test.features)
    assert metrics.average_precision(test.label, score) == pytest.approx(0.726, abs=0.01)


@needs_handbook
def test_the_ceilings_of_the_protocols_test_weeks_come_back() -> None:
    table = handbook.read(os.environ["DEEPSEEK_RAY_HANDBOOK"], label_delay_days=7)
    found = []
    for number in range(4):
        later = timedelta(days=7 * number)
        rows = protocol.split(
            table, train_start=date(2018, 7, 25) + later, test_start=date(2018, 8, 8) + later,
            train_days=7, delay_days=7, test_days=7, history_days=7,
        )  # fmt: skip
        known = protocol.knowable(table, rows.test, delay_days=7)
        found.append(metrics.recall_at_fpr(table["is_fraud"].to_numpy()[rows.test], known))
    assert found == pytest.approx([0.784, 0.760, 0.799, 0.746], abs=0.001)


@needs_handbook
@pytest.mark.parametrize(("delay", "recall"), [(0, 0.976), (1, 0.953), (3, 0.910), (7, 0.825), (14, 0.673)])
def test_the_ceilings_by_label_delay_come_back(delay: int, recall: float) -> None:
    table = handbook.read(os.environ["DEEPSEEK_RAY_HANDBOOK"], label_delay_days=delay)
    day = protocol.day_numbers(table)
    first = day.max() - 18 * 7 + 1  # the last 18 weeks, with all cards
    found = []
    for start in range(first, day.max(), 7):
        rows = np.flatnonzero((day >= start) & (day < start + 7))
        known = protocol.knowable(table, rows, delay_days=delay)
        found.append(metrics.recall_at_fpr(table["is_fraud"].to_numpy()[rows], known))
    assert np.mean(found) == pytest.approx(recall, abs=0.0025)
