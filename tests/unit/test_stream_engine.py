"""The stream engine gives what the batch engine gives, bit for bit, and guards its state."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import numpy as np
import polars as pl
import pytest

from deepseek_ray.data import batch_engine, windows
from deepseek_ray.data.events import DAY_US, Transaction
from deepseek_ray.data.state import MemoryStore
from deepseek_ray.data.stream_engine import Served, StreamEngine
from deepseek_ray.errors import FeatureError, StaleEventError
from tests.unit.feature_worlds import world

DELAY = 7
DECLARATION = windows.load()


def engine(store: MemoryStore | None = None, vector: str = "default", delay: float = DELAY) -> StreamEngine:
    spec = DECLARATION.vector(vector)
    return StreamEngine(DECLARATION, spec, store or MemoryStore(), label_delay_days=delay, sequence_len=6)


def transaction(row: dict[str, Any]) -> Transaction:
    return Transaction(**{name: row[name] for name in Transaction.model_fields})


def play(stream: StreamEngine, history: pl.DataFrame, *, also_labels_of: pl.DataFrame | None = None) -> list[Served]:
    """Serve the rows in order; each fraud's label is applied as soon as an event passes its position."""
    known = history if also_labels_of is None else pl.concat([also_labels_of, history])
    pending = known.filter(pl.col("is_fraud") == 1).sort("label_us").to_dicts()
    served = []
    for row in history.iter_rows(named=True):
        while pending and pending[0]["label_us"] <= row["order_us"]:
            label = pending.pop(0)
            ids = label["card_id"], label["terminal_id"], label["device_id"]
            stream.apply_label(*ids, label["order_us"], True, label["label_us"])
        served.append(stream.observe(transaction(row)))
    return served


def assert_equal(served: list[Served], table: batch_engine.FeatureTable, rows: slice = slice(None)) -> None:
    np.testing.assert_array_equal([s.order_us for s in served], table.order_us[rows])
    values = np.array([s.values for s in served])
    for column, name in enumerate(table.names):
        np.testing.assert_array_equal(values[:, column], table.values[rows, column], err_msg=name)
    np.testing.assert_array_equal(np.array([s.sequence for s in served]), table.sequence[rows])


@pytest.mark.parametrize(
    ("vector", "seed", "cards", "delay"),
    [("wide", 1, 10, 7.0), ("default", 2, 60, 7.0), ("default", 3, 3, 0.0), ("handbook", 4, 10, 1.5)],
)
def test_served_vectors_equal_the_batch_engine(vector: str, seed: int, cards: int, delay: float) -> None:
    history = world(500, seed, cards=cards, delay=delay, days=160)
    spec = DECLARATION.vector(vector)
    table = batch_engine.compute(history, spec, label_delay_days=delay, sequence_len=6)
    assert_equal(play(engine(vector=vector, delay=delay), history), table)


def test_serving_goes_on_from_warmed_states() -> None:
    history = world(900, seed=5, cards=15, days=200)
    stream = engine(vector="wide")
    past, future = history.head(600), history.tail(300)
    written = stream.warm(past)
    owners = past["card_id"].n_unique() + past["terminal_id"].n_unique()
    assert written == owners + past.filter(pl.col("device_id") != "unknown")["device_id"].n_unique()
    table = batch_engine.compute(history, DECLARATION.vector("wide"), label_delay_days=DELAY, sequence_len=6)
    assert_equal(play(stream, future, also_labels_of=past), table, slice(600, None))


def test_a_batch_equals_single_events() -> None:
    history = world(200, seed=6, days=30)
    single, batched = engine(), engine()
    txs = [transaction(row) for row in history.iter_rows(named=True)]
    one_by_one = [single.observe(tx) for tx in txs]
    together = [s for first in range(0, 200, 50) for s in batched.observe_many(txs[first : first + 50])]
    for a, b in zip(one_by_one, together, strict=True):
        assert isinstance(b, Served)
        np.testing.assert_array_equal(a.values, b.values)
        np.testing.assert_array_equal(a.sequence, b.sequence)


def test_a_label_that_comes_after_served_events_does_not_change_them() -> None:
    """Known at day 8, applied after an event of day 9: it counts from the next event on, here and offline."""
    history = world(40, seed=7, cards=1, terminals=1, days=40).with_columns(is_fraud=pl.lit(0, pl.Int8))
    stream, store_rows = engine(), []
    for n, row in enumerate(history.iter_rows(named=True)):
        store_rows.append(stream.observe(transaction(row)))
        if n == 30:
            first = history.row(3, named=True)
            ids = first["card_id"], first["terminal_id"], first["device_id"]
            position = stream.apply_label(*ids, first["order_us"], True, first["order_us"] + 8 * DAY_US)
            assert position > row["order_us"]
            assert stream.apply_label(*ids, first["order_us"], True, 0) == position  # idempotent
    marked = history.with_row_index("n").with_columns(
        is_fraud=pl.when(pl.col("n") == 3).then(1).otherwise(0).cast(pl.Int8),
        label_us=pl.when(pl.col("n") == 3).then(position).otherwise(None).cast(pl.Int64),
    )
    table = batch_engine.compute(marked, DECLARATION.vector("default"), label_delay_days=DELAY, sequence_len=6)
    assert_equal(store_rows, table)


def test_peek_changes_nothing_and_equals_observe() -> None:
    stream, history = engine(), world(60, seed=8)
    play(stream, history.head(59))
    tx = transaction(history.row(59, named=True))
    peeked, again, observed = stream.peek(tx), stream.peek(tx), stream.observe(tx)
    np.testing.assert_array_equal(peeked.values, observed.values)
    np.testing.assert_array_equal(again.sequence, observed.sequence)


def test_a_stale_event_is_refused_alone_and_equal_time_is_allowed() -> None:
    row = world(1, seed=9).row(0, named=True)
    stream, tx = engine(), transaction(row)
    stale = tx.model_copy(update={"event_time": tx.event_time - timedelta(seconds=1)})
    first, error, second = stream.observe_many([tx, stale, tx])
    assert isinstance(error, StaleEventError)
    assert "1.000000 s older" in str(error)
    assert isinstance(first, Served)
    assert isinstance(second, Served)
    assert second.order_us == first.order_us + 1
    with pytest.raises(StaleEventError):
        stream.observe(stale)


def test_cold_owners_are_named_once() -> None:
    tx = transaction(world(1, seed=10).row(0, named=True)).model_copy(update={"device_id": "d1"})
    stream = engine()
    assert stream.observe(tx).cold == ["card", "terminal", "device"]
    assert stream.observe(tx).cold == []
    assert stream.observe(tx.model_copy(update={"device_id": "unknown", "card_id": "c99"})).cold == ["card"]


@pytest.mark.parametrize("damage", ["flip", "cut", "foreign"])
def test_a_corrupted_state_is_an_error_for_its_own_events_only(damage: str) -> None:
    store = MemoryStore()
    stream, tx = engine(store), transaction(world(1, seed=11).row(0, named=True))
    stream.observe(tx)
    key = next(key for key in store.blobs if "/card/" in key)
    blob = bytearray(store.blobs[key])
    blob[70] ^= 1
    store.blobs[key] = {"flip": bytes(blob), "cut": bytes(blob[:-3]), "foreign": b"x" * 64}[damage]
    bad, good = stream.observe_many([tx, tx.model_copy(update={"card_id": "other"})])
    assert isinstance(bad, FeatureError)
    assert "corrupted" in str(bad)
    assert isinstance(good, Served)
    with pytest.raises(FeatureError, match="corrupted"):
        stream.peek(tx)


def test_a_state_kept_for_other_windows_is_refused() -> None:
    store = MemoryStore()
    tx = transaction(world(1, seed=12).row(0, named=True))
    engine(store, delay=7).observe(tx)
    with pytest.raises(FeatureError, match="warm"):
        engine(store, delay=1).observe(tx)


def test_states_forget_what_no_window_needs() -> None:
    store = MemoryStore()
    play(engine(store), world(3000, seed=13, cards=2, terminals=2, days=300))
    card = max(len(blob) for key, blob in store.blobs.items() if "/card/" in key)
    assert card < 9 * 8 * 1500 * 67 / 300 * 1.3 + 4000


def test_after_a_crash_logged_events_and_labels_are_restored_once() -> None:
    history = world(80, seed=14, cards=2, terminals=2, days=20)
    store, lost = MemoryStore(), 60
    steady, crashed = engine(), engine(store)
    orders, txs = [], [transaction(row) for row in history.iter_rows(named=True)]
    for n, tx in enumerate(txs):
        steady.observe(tx)
        orders.append(crashed.observe_many([tx], write=n < lost)[0].order_us)  # type: ignore[union-attr]
    label = txs[5].card_id, txs[5].terminal_id, txs[5].device_id, orders[5]
    steady.apply_label(*label, True, 0)
    crashed.apply_label(*label, True, 0, write=False)
    restarted = engine(store)
    for n in range(lost - 10, len(txs)):
        restarted.restore(txs[n], orders[n])
    restarted.apply_label(*label, True, 0)
    restarted.apply_label(*label, True, 0)
    later = txs[-1].model_copy(update={"event_time": txs[-1].event_time + timedelta(days=1)})
    np.testing.assert_array_equal(restarted.observe(later).values, steady.observe(later).values)


def test_a_label_for_an_event_nobody_remembers_is_an_error() -> None:
    with pytest.raises(FeatureError, match="no event at order 5"):
        engine().apply_label("c", "t", "d", 5, True, 0)
    assert engine().apply_label("c", "t", "d", 5, False, 0) == 5 + DELAY * DAY_US


def test_a_vector_of_another_declaration_is_refused() -> None:
    other = windows.Declaration({"default": DECLARATION.vector("handbook")})
    with pytest.raises(FeatureError, match="not of this declaration"):
        StreamEngine(other, DECLARATION.vector("default"), MemoryStore(), label_delay_days=7, sequence_len=1)
