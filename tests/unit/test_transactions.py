"""The generator: seeded, close to the published statistics, with drift that can be scheduled."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import polars as pl
import pytest
from pydantic import TypeAdapter

from deepseek_ray.config import DataConfig
from deepseek_ray.data import table, transactions
from deepseek_ray.data.events import Transaction
from deepseek_ray.data.fraud_patterns import DRIFT_PRESETS, drift_preset
from deepseek_ray.errors import ConfigError

SIZE: dict[str, Any] = {"num_customers": 300, "num_terminals": 600, "num_days": 90, "replay_days": 30}
BASE = DataConfig(**SIZE)
DRIFTS = [name for name in DRIFT_PRESETS if name != "none"]
FACTS = ["event_time", "card_id", "terminal_id", "amount_cents", "device_id", "channel", "country", "fraud_scenario"]


@pytest.fixture(scope="module")
def base() -> pl.DataFrame:
    return transactions.generate(BASE, 0)


def drifted(name: str, **settings: Any) -> pl.DataFrame:
    return transactions.generate(DataConfig(**{**SIZE, **settings}, drift=name), 0)


def share(frame: pl.DataFrame, condition: pl.Expr) -> float:
    return float(frame.select(condition.mean()).item())


def test_the_table_is_canonical_and_in_order_of_time(base: pl.DataFrame) -> None:
    assert table.check(base).height > 40_000
    assert base["event_time"].is_sorted()
    assert base["transaction_id"].is_sorted()


def test_each_row_is_a_transaction(base: pl.DataFrame) -> None:
    rows = base.sample(200, seed=0).select(list(Transaction.model_fields)).to_dicts()
    assert len(TypeAdapter(list[Transaction]).validate_python(rows)) == 200


def test_the_seed_decides_everything(base: pl.DataFrame) -> None:
    assert transactions.generate(BASE, 0).equals(base)
    assert not transactions.generate(BASE, 1).equals(base)


def test_days_lie_in_the_asked_range(base: pl.DataFrame) -> None:
    begin = datetime(2026, 1, 1, tzinfo=UTC)
    assert base["event_time"].min() >= begin
    assert base["event_time"].max() < begin + timedelta(days=90)
    assert base["event_time"].dt.date().n_unique() == 90


def test_frauds_are_as_frequent_as_published(base: pl.DataFrame) -> None:
    counts = dict(base.filter(pl.col("is_fraud") == 1)["fraud_scenario"].value_counts().iter_rows())
    total = sum(counts.values())
    assert 0.006 <= total / base.height <= 0.011
    published = {1: 973 / 14_681, 2: 9_077 / 14_681, 3: 4_631 / 14_681}
    for scenario, expected in published.items():
        assert counts[scenario] / total == pytest.approx(expected, abs=0.12)


def test_amounts_follow_the_cards_mean(base: pl.DataFrame) -> None:
    genuine = base.filter(pl.col("fraud_scenario") == 0)
    assert genuine["amount_cents"].mean() / 100 == pytest.approx(52.5, rel=0.1)
    assert genuine["amount_cents"].max() <= transactions.LARGE_AMOUNT_CENTS
    assert base.filter(pl.col("fraud_scenario") == 1)["amount_cents"].min() > transactions.LARGE_AMOUNT_CENTS


def test_a_compromised_terminal_has_only_frauds_for_four_weeks(base: pl.DataFrame) -> None:
    frauds = base.filter(pl.col("fraud_scenario") == 2)
    terminal = frauds["terminal_id"][0]
    days = frauds.filter(pl.col("terminal_id") == terminal)["event_time"]
    assert days.max() - days.min() < timedelta(days=28)
    between = base.filter(pl.col("terminal_id") == terminal, pl.col("event_time").is_between(days.min(), days.max()))
    assert between["is_fraud"].to_list() == [1] * between.height


def test_a_card_sees_some_tens_of_terminals(base: pl.DataFrame) -> None:
    seen = base.group_by("card_id").agg(pl.col("terminal_id").n_unique())["terminal_id"]
    assert 20 <= seen.median() <= 80


def test_a_tiny_world_still_pays_and_has_frauds() -> None:
    config = DataConfig(num_customers=3, num_terminals=1, num_days=20, replay_days=5, drift="new-device")
    made = transactions.generate(config, 0)
    assert made["terminal_id"].unique().to_list() == ["t0"]
    assert made["is_fraud"].sum() > 0


def test_the_published_frauds_leave_no_trace_in_the_attributes(base: pl.DataFrame) -> None:
    online = base.filter(pl.col("channel") == "online").with_columns(
        new_device=~pl.col("device_id").is_in(
            base["device_id"].value_counts().filter(pl.col("count") > 2)["device_id"].implode()
        )
    )
    genuine, fraud = (online.filter(pl.col("is_fraud") == label) for label in (0, 1))
    assert abs(share(fraud, pl.col("new_device")) - share(genuine, pl.col("new_device"))) < 0.04
    assert abs(share(base.filter(pl.col("is_fraud") == 1), pl.col("channel") == "online") - 0.25) < 0.15


def test_owners_have_habits(base: pl.DataFrame) -> None:
    online = base.filter(pl.col("channel") == "online")
    assert "unknown" not in online["device_id"]
    favourite = online.group_by("card_id").agg(pl.col("device_id").mode().first().alias("mine"))
    assert share(online.join(favourite, on="card_id"), pl.col("device_id") == pl.col("mine")) > 0.7
    home = base.group_by("card_id").agg(pl.col("country").mode().sort().first().alias("home"))
    assert share(base.join(home, on="card_id"), pl.col("country") == pl.col("home")) > 0.7
    assert base.group_by("terminal_id").agg(pl.col("merchant_category").n_unique())["merchant_category"].max() == 1
    assert base.filter(pl.col("channel") == "contactless")["amount_cents"].max() <= transactions.CONTACTLESS_LIMIT_CENTS


@pytest.mark.parametrize("name", DRIFTS)
def test_a_drift_adds_its_frauds_and_leaves_the_other_payments_alone(name: str, base: pl.DataFrame) -> None:
    made = drifted(name)
    code = drift_preset(name)[0].scenario
    begin = datetime(2026, 1, 1, tzinfo=UTC) + timedelta(days=60)
    new = made.filter(pl.col("fraud_scenario") == code)
    assert new["event_time"].min() >= begin
    assert new["is_fraud"].min() == 1
    assert made.filter(pl.col("fraud_scenario") != code).select(FACTS).equals(base.select(FACTS))
    old = base.filter(pl.col("event_time") >= begin)["is_fraud"].sum()
    assert 0.5 <= new.height / old <= 2.0


def test_the_new_device_drift_shows_in_device_country_and_pace(base: pl.DataFrame) -> None:
    made = drifted("new-device").with_columns(gap=pl.col("event_time").diff().over("card_id").dt.total_seconds())
    new, old = made.filter(pl.col("fraud_scenario") == 4), made.filter(pl.col("fraud_scenario") < 4)
    assert set(new["channel"]) == {"online"}
    assert share(new, pl.col("device_id").is_in(old["device_id"].implode())) < 0.25
    assert share(new, pl.col("gap") <= 600) > 0.6
    assert share(old, pl.col("gap") <= 600) < 0.1
    homes = base.group_by("card_id").agg(pl.col("country").mode().first().alias("home"))
    assert share(new.join(homes, on="card_id"), pl.col("country") != pl.col("home")) > 0.5
    # Small and medium amounts: what the frozen model learned about large ones does not help.
    assert share(new, pl.col("amount_cents") > 22_000) == 0


def test_the_night_drift_hops_over_terminals() -> None:
    new = drifted("terminal-night").filter(pl.col("fraud_scenario") == 5)
    assert set(new["device_id"]) == {"unknown"}
    assert new["event_time"].dt.hour().max() <= 6
    assert new.group_by("card_id").agg(pl.col("terminal_id").n_unique())["terminal_id"].min() >= 3


def test_the_merchant_switch_buys_travel_and_electronics() -> None:
    new = drifted("merchant-switch").filter(pl.col("fraud_scenario") == 6)
    assert set(new["merchant_category"]) == {"travel", "electronics"}


def test_the_day_of_the_drift_can_be_set() -> None:
    made = drifted("new-device", drift_start_day=10).filter(pl.col("fraud_scenario") == 4)
    assert made["event_time"].min().date() == datetime(2026, 1, 11).date()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"drift": "new-devise"}, "new-devise.*choose one of none, new-device"),
        ({"drift": "new-device", "replay_days": 0}, "drift_start_day.* = 90 lies behind"),
        ({"start_date": "1.1.2026"}, "start_date.*1.1.2026"),
    ],
)
def test_a_wrong_setting_is_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        transactions.generate(DataConfig(**{**SIZE, **settings}), 0)
