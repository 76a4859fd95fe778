"""The replay memory: balanced, fair over time, the same after a restart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from deepseek_ray.errors import CheckpointError, DataError
from deepseek_ray.online.replay import Reservoir


def make_rows(start: int, count: int, fraud_every: int = 10) -> dict[str, npt.NDArray[Any]]:
    order = np.arange(start, start + count, dtype=np.int64)
    features = np.stack([order, order * 2], axis=1).astype(np.float32)
    return {
        "label": (order % fraud_every == 0).astype(np.int8),
        "order_us": order,
        "features": features,
        "card": np.array([f"c{i}" for i in order]),
    }


def test_both_classes_keep_their_room() -> None:
    memory = Reservoir(50)
    memory.add(make_rows(0, 2000))
    rows = memory.rows()
    assert len(memory) == 100
    assert rows["label"].sum() == 50
    assert memory.seen == {0: 1800, 1: 200}
    np.testing.assert_array_equal(rows["features"][:, 0], rows["order_us"])
    np.testing.assert_array_equal(rows["card"], [f"c{i}" for i in rows["order_us"]])


def test_few_frauds_are_all_kept() -> None:
    memory = Reservoir(50)
    memory.add(make_rows(0, 100, fraud_every=50))
    assert memory.num_kept(1) == 2
    assert memory.num_kept(0) == 50


def test_weights_restore_the_true_share_of_fraud() -> None:
    memory = Reservoir(30)
    memory.add(make_rows(0, 1000))
    weights, label = memory.weights(), memory.rows()["label"]
    assert weights.sum() == pytest.approx(1000)
    assert weights[label == 1].sum() == pytest.approx(100)


def test_the_choice_does_not_depend_on_the_batches() -> None:
    whole, parts = Reservoir(20, seed=3), Reservoir(20, seed=3)
    whole.add(make_rows(0, 500))
    for start in range(0, 500, 7):
        parts.add(make_rows(start, min(7, 500 - start)))
    np.testing.assert_array_equal(whole.rows()["order_us"], parts.rows()["order_us"])


def test_another_seed_chooses_other_rows() -> None:
    one, two = Reservoir(20, seed=1), Reservoir(20, seed=2)
    one.add(make_rows(0, 500))
    two.add(make_rows(0, 500))
    assert set(one.rows()["order_us"]) != set(two.rows()["order_us"])


def test_old_and_new_rows_have_the_same_chance() -> None:
    kept = []
    for seed in range(200):
        memory = Reservoir(20, seed=seed)
        memory.add(make_rows(1, 200, fraud_every=1000))
        kept.append(memory.rows()["order_us"])
    counts = np.histogram(np.concatenate(kept), bins=4, range=(1, 201))[0]
    assert counts == pytest.approx(np.full(4, 1000), rel=0.12)


def test_a_restart_changes_nothing(tmp_path: Path) -> None:
    straight, stopped = Reservoir(20, seed=5), Reservoir(20, seed=5)
    straight.add(make_rows(0, 300))
    stopped.add(make_rows(0, 300))
    stopped.save(tmp_path / "replay.npz")
    again = Reservoir.load(tmp_path / "replay.npz")
    for memory in (straight, again):
        memory.add(make_rows(300, 2000))
    for name, array in straight.rows().items():
        np.testing.assert_array_equal(array, again.rows()[name])
    assert list(tmp_path.iterdir()) == [tmp_path / "replay.npz"]


def test_an_empty_memory_can_be_kept_too(tmp_path: Path) -> None:
    Reservoir(5).save(tmp_path / "replay.npz")
    again = Reservoir.load(tmp_path / "replay.npz")
    assert (len(again), again.rows(), again.weights().size) == (0, {}, 0)


def test_a_torn_file_is_reported(tmp_path: Path) -> None:
    memory = Reservoir(20)
    memory.add(make_rows(0, 100))
    file = tmp_path / "replay.npz"
    memory.save(file)
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(CheckpointError, match="cannot be read"):
        Reservoir.load(file)
    with pytest.raises(CheckpointError, match="cannot be read"):
        Reservoir.load(tmp_path / "none.npz")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": np.array([0, 2], dtype=np.int8)}, "neither 0 nor 1"),
        ({"order_us": np.arange(3)}, "has 3 rows"),
        ({"card": np.array(["a", None], dtype=object)}, "object"),
        ({"features": np.zeros((2, 5), dtype=np.float32)}, "does not fit"),
        ({"extra": np.zeros(2)}, "does not fit"),
    ],
)
def test_rows_that_do_not_fit_are_refused(change: dict[str, npt.NDArray[Any]], message: str) -> None:
    memory = Reservoir(20)
    memory.add(make_rows(0, 100))
    with pytest.raises(DataError, match=message):
        memory.add({**make_rows(0, 2), **change})


def test_labels_are_needed() -> None:
    with pytest.raises(DataError, match="label"):
        Reservoir(20).add({"features": np.zeros((2, 5))})


def test_there_must_be_room() -> None:
    with pytest.raises(ValueError, match="capacity"):
        Reservoir(0)


KEY = ("card", "order_us")


def as_fraud(rows: dict[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
    return {**rows, "label": np.ones(len(rows["label"]), dtype=np.int8)}


def test_a_row_taken_back_is_gone_and_may_come_as_a_fraud(tmp_path: Path) -> None:
    memory = Reservoir(500)
    memory.add(make_rows(1, 100, fraud_every=1000))
    memory.withdraw(make_rows(7, 2), KEY)
    assert (memory.seen, len(memory)) == ({0: 98, 1: 0}, 98)
    memory.add(as_fraud(make_rows(7, 2)))
    rows = memory.rows()
    assert sorted(rows["order_us"]) == list(range(1, 101))
    assert rows["order_us"][rows["label"] == 1].tolist() == [7, 8]
    memory.save(tmp_path / "replay.npz")
    assert Reservoir.load(tmp_path / "replay.npz").seen == {0: 98, 1: 2}


def test_a_row_that_was_thinned_out_can_be_taken_back_too() -> None:
    memory = Reservoir(20)
    memory.add(make_rows(1, 200, fraud_every=1000))
    gone = next(at for at in range(1, 201) if at not in memory.rows()["order_us"])
    memory.withdraw(make_rows(gone, 1), KEY)
    assert (memory.seen, memory.num_kept(0)) == ({0: 199, 1: 0}, 20)


def test_what_lacks_a_number_is_filled_once() -> None:
    memory = Reservoir(20)
    rows = make_rows(1, 10, fraud_every=5)
    memory.add({**rows, "logit": np.where(rows["order_us"] == 3, 7.0, np.nan).astype(np.float32)})
    memory.fill("logit", lambda kept: kept["order_us"] * 2.0)
    filled = dict(zip(memory.rows()["order_us"].tolist(), memory.rows()["logit"].tolist(), strict=True))
    assert filled == {at: 7.0 if at == 3 else 2.0 * at for at in range(1, 11)}
    memory.fill("logit", lambda kept: 1 / 0)


def test_the_choice_stays_fair_after_rows_were_taken_back() -> None:
    kept = []
    for seed in range(300):
        memory = Reservoir(20, seed=seed)
        memory.add(make_rows(1, 100, fraud_every=1000))
        memory.withdraw(make_rows(1, 20), KEY)
        memory.add(as_fraud(make_rows(1, 20)))
        memory.add(make_rows(101, 120, fraud_every=1000))
        rows = memory.rows()
        assert len(rows["label"]) - rows["label"].sum() == memory.num_kept(0)
        kept.append(rows["order_us"][rows["label"] == 0])
    counts = np.histogram(np.concatenate(kept), bins=4, range=(21, 221))[0]
    assert counts == pytest.approx(np.full(4, counts.mean()), rel=0.12)
