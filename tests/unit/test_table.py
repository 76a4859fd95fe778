"""The transactions table: types, order of arrival, label positions, digest, atomic files."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_ray.data import table
from deepseek_ray.data.events import DAY_US
from deepseek_ray.errors import DataError, EnvironmentProblemError, SchemaError

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)


def payments(*rows: tuple[str, int, str, str, str]) -> pl.DataFrame:
    """A frame of (transaction, microseconds after noon, card, terminal, device)."""
    return pl.DataFrame(
        {
            "transaction_id": [row[0] for row in rows],
            "event_time": [NOON + timedelta(microseconds=row[1]) for row in rows],
            "card_id": [row[2] for row in rows],
            "terminal_id": [row[3] for row in rows],
            "device_id": [row[4] for row in rows],
            "amount_cents": [100] * len(rows),
        },
        schema_overrides={"event_time": pl.Datetime("us", "UTC")},
    )


def after_noon(frame: pl.DataFrame) -> list[int]:
    noon_us = int(NOON.timestamp()) * 1_000_000
    return [value - noon_us for value in frame["order_us"].to_list()]


def test_missing_optional_columns_get_defaults() -> None:
    made = table.to_table(payments(("a", 0, "c1", "t1", "d1")).drop("device_id"), label_delay_days=7)
    assert made.columns == list(table.SCHEMA)
    assert made.row(0, named=True) | {"event_time": NOON} == {
        "transaction_id": "a",
        "event_time": NOON,
        "order_us": int(NOON.timestamp()) * 1_000_000,
        "card_id": "c1",
        "terminal_id": "t1",
        "amount_cents": 100,
        "device_id": "unknown",
        "channel": "unknown",
        "country": "unknown",
        "merchant_category": "unknown",
        "is_fraud": None,
        "fraud_scenario": 0,
        "label_us": None,
    }


def test_ties_of_a_card_terminal_or_device_are_moved_in_order_of_arrival() -> None:
    rows = payments(
        ("e", 0, "c9", "t9", "d9"),  # no tie
        ("a", 0, "c1", "t1", "d1"),
        ("b", 0, "c1", "t2", "unknown"),  # after a, same card
        ("c", 0, "c2", "t2", "unknown"),  # after b, same terminal
        ("d", 0, "c3", "t3", "d1"),  # after a, same device
    )
    assert after_noon(table.assign_order(rows)) == [0, 1, 2, 1, 0]


def test_an_unknown_device_orders_nothing() -> None:
    rows = payments(("a", 0, "c1", "t1", "unknown"), ("b", 0, "c2", "t2", "unknown"))
    assert after_noon(table.assign_order(rows)) == [0, 0]


def test_a_moved_tie_pushes_the_next_event_of_the_card() -> None:
    rows = payments(("a", 0, "c1", "t1", "unknown"), ("b", 0, "c1", "t2", "unknown"), ("c", 1, "c1", "t3", "unknown"))
    assert after_noon(table.assign_order(rows)) == [0, 1, 2]


def test_a_file_with_one_time_stamp_takes_the_slow_way_and_the_same_order() -> None:
    rows = payments(*((f"a{number:03}", 0, "c1", "t1", "d1") for number in range(100)))
    assert after_noon(table.assign_order(rows)) == list(range(100))


events = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 2), st.integers(0, 2), st.integers(0, 2)), max_size=60)


@given(events)
@settings(max_examples=60, deadline=None)
def test_the_order_is_what_one_pass_with_last_values_gives(rows: list[tuple[int, int, int, int]]) -> None:
    frame = payments(
        *((f"x{i:03}", t, f"c{c}", f"t{k}", f"d{d}" if d else "unknown") for i, (t, c, k, d) in enumerate(rows))
    )
    ordered = table.assign_order(frame)
    last: dict[str, int] = {}
    for row in ordered.iter_rows(named=True):
        keys = [row["card_id"], row["terminal_id"], *([row["device_id"]] if row["device_id"] != "unknown" else [])]
        event_us = round((row["event_time"] - NOON) / timedelta(microseconds=1)) + int(NOON.timestamp()) * 1_000_000
        expected = max([event_us, *(last[key] + 1 for key in keys if key in last)])
        assert row["order_us"] == expected
        last.update(dict.fromkeys(keys, expected))


def test_predecessors_may_be_absent() -> None:
    before = np.full((3, 2), -1)
    assert table.settle_order(np.array([5, 5]), before).tolist() == [5, 5]


def test_a_label_waits_for_the_delay_and_for_the_moment_it_became_known() -> None:
    known_us = int(NOON.timestamp()) * 1_000_000 + 9 * DAY_US
    rows = payments(*((name, 0, name, name, "unknown") for name in ("early", "late", "none")))
    labelled = rows.with_columns(
        is_fraud=pl.Series([1, 0, None], dtype=pl.Int8), label_us=pl.Series([None, known_us, known_us], dtype=pl.Int64)
    )
    made = table.to_table(labelled, label_delay_days=7)
    assert made["label_us"].to_list() == [made["order_us"][0] + 7 * DAY_US, known_us, None]


def test_a_fraction_of_a_day_delays_by_whole_microseconds() -> None:
    assert table.delay_us(1 / 3) == 28_800_000_000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (pl.lit(-1).alias("amount_cents"), "amount_cents.*-1"),
        (pl.lit(1.5).alias("amount_cents"), "amount_cents.*Float64"),
        (pl.lit("phone").alias("channel"), "channel.*phone"),
        (pl.lit(2, dtype=pl.Int8).alias("is_fraud"), "is_fraud.*2"),
        (pl.lit(None, dtype=pl.String).alias("card_id"), "card_id.*empty"),
        (pl.lit("same").alias("transaction_id"), "transaction_id.*same"),
        (pl.col("event_time").dt.replace_time_zone(None), "event_time.*Datetime"),
        (pl.lit("2026").alias("event_time"), "event_time.*String"),
        (pl.lit("many").alias("fraud_scenario"), "cannot be converted"),
    ],
)
def test_a_wrong_value_is_named_with_its_column(change: pl.Expr, message: str) -> None:
    rows = payments(("a", 0, "c1", "t1", "d1"), ("b", 5, "c1", "t1", "d1"))
    with pytest.raises(SchemaError, match=message):
        table.to_table(rows.with_columns(change), label_delay_days=7)


def test_a_missing_column_is_named() -> None:
    with pytest.raises(SchemaError, match=r"\['card_id'\] are missing"):
        table.to_table(payments(("a", 0, "c1", "t1", "d1")).drop("card_id"), label_delay_days=7)


def test_check_wants_exactly_our_columns_and_types() -> None:
    made = table.to_table(payments(("a", 0, "c1", "t1", "d1")), label_delay_days=7)
    with pytest.raises(SchemaError, match="expected exactly"):
        table.check(made.with_columns(extra=1))
    with pytest.raises(SchemaError, match="amount_cents"):
        table.check(made.with_columns(pl.col("amount_cents").cast(pl.Int32)))


def test_the_digest_sees_values_and_not_chunks() -> None:
    one = table.to_table(payments(("a", 0, "c1", "t1", "d1"), ("b", 1, "c2", "t2", "d2")), label_delay_days=7)
    two = pl.concat([one[:1], one[1:]], rechunk=False)
    assert table.digest(one) == table.digest(two)
    assert table.digest(one) != table.digest(one.with_columns(amount_cents=pl.lit(101, dtype=pl.Int64)))
    # The same letters, divided differently between two rows, are another table.
    assert table.digest(pl.DataFrame({"x": ["ab", "c"]})) != table.digest(pl.DataFrame({"x": ["a", "bc"]}))
    assert table.digest(pl.DataFrame({"x": [""]})) != table.digest(pl.DataFrame({"x": [None]}, schema={"x": pl.String}))


def test_a_table_comes_back_from_disk(tmp_path: Path) -> None:
    made = table.to_table(payments(("a", 0, "c1", "t1", "d1")), label_delay_days=7)
    table.write(made, tmp_path / "new" / "transactions.parquet")
    assert table.read(tmp_path / "new" / "transactions.parquet").equals(made)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["transactions.parquet"]


def test_a_table_that_cannot_be_read_says_why(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="ingest"):
        table.read(tmp_path / "none.parquet")
    (tmp_path / "torn.parquet").write_bytes(b"PAR1 torn")
    with pytest.raises(DataError, match="not readable parquet"):
        table.read(tmp_path / "torn.parquet")


def test_a_failed_write_keeps_the_old_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "transactions.parquet"
    old = table.to_table(payments(("a", 0, "c1", "t1", "d1")), label_delay_days=7)
    table.write(old, path)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(table.os, "fsync", full)
    with pytest.raises(EnvironmentProblemError, match="No space left"):
        table.write(old.clear(), path)
    assert table.read(path).equals(old)
    assert [found.name for found in tmp_path.iterdir()] == ["transactions.parquet"]
