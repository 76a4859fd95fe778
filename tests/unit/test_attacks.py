"""A fraud pattern put into a table that knows nothing of it."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta

import numpy as np
import polars as pl
import pytest

from deepseek_ray.data import attacks
from deepseek_ray.data.events import delay_us
from deepseek_ray.data.fraud_patterns import TERMINAL_NIGHT
from deepseek_ray.data.protocol import day_number, day_numbers
from deepseek_ray.data.table import to_table
from deepseek_ray.errors import DataError

FIRST = day_number(date(2018, 4, 21))


@pytest.fixture(scope="module")
def table() -> pl.DataFrame:
    """Forty days of a thousand cards, one payment of 10.00 each noon."""
    noon = datetime(2018, 4, 1, 12, tzinfo=UTC)
    numbers = [(day, card) for day in range(40) for card in range(1_000)]
    frame = pl.DataFrame(
        {
            "transaction_id": [f"tx{day:02d}{card:03d}" for day, card in numbers],
            "event_time": [noon + timedelta(days=day) for day, _ in numbers],
            "card_id": [f"c{card}" for _, card in numbers],
            "terminal_id": [f"t{card % 50}" for _, card in numbers],
            "amount_cents": [1_000] * len(numbers),
            "is_fraud": [0] * len(numbers),
        }
    )
    return to_table(frame, label_delay_days=2)


def inject(table: pl.DataFrame, seed: int = 0, first: int = FIRST) -> pl.DataFrame:
    return attacks.inject(table, TERMINAL_NIGHT, first_day=first, label_delay_days=2, seed=seed)


def test_the_pattern_begins_on_its_day_at_its_hours_and_rate(table: pl.DataFrame) -> None:
    added = inject(table).filter(pl.col("fraud_scenario") == TERMINAL_NIGHT.scenario)
    assert day_numbers(added).min() == FIRST
    assert day_numbers(added).max() < FIRST + 20
    # 3.5 cards a day, 4 to 7 payments each, over 20 days
    assert 20 * 3.5 * 4 < len(added) < 20 * 3.5 * 7
    assert added["event_time"].dt.hour().max() < 7
    factor = added["amount_cents"].to_numpy() / 1_000
    assert 0.69 < factor.min() < 0.75
    assert 2.3 < factor.max() < 2.51


def test_what_was_there_is_as_it_was_and_labels_come_after_the_delay(table: pl.DataFrame) -> None:
    both = inject(table)
    old = both.filter(pl.col("fraud_scenario") == 0)
    assert old.drop("order_us", "label_us").equals(table.drop("order_us", "label_us"))
    added = both.filter(pl.col("fraud_scenario") > 0)
    assert added["is_fraud"].to_list() == [1] * len(added)
    assert np.array_equal((added["label_us"] - added["order_us"]).unique().to_numpy(), [delay_us(2)])
    # nothing but amount, time and terminal tells them: what the table does not know is unknown of them too
    for column in ("device_id", "country", "channel", "merchant_category"):
        assert both[column].unique().to_list() == ["unknown"]


def test_the_seed_decides_and_nothing_else(table: pl.DataFrame) -> None:
    assert inject(table).equals(inject(table))
    assert not inject(table).equals(inject(table, seed=1))


@pytest.mark.parametrize("first", [date(2018, 4, 1), date(2018, 5, 11)])
def test_a_day_outside_the_data_is_refused(table: pl.DataFrame, first: date) -> None:
    with pytest.raises(DataError, match="'terminal-night' cannot begin on"):
        inject(table, first=day_number(first))
