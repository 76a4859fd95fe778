"""Warm start and measurement with the real model, a few rows and one epoch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import deepseek_ray.models as models
from deepseek_ray.config import GateConfig, ModelConfig, UpdateConfig
from deepseek_ray.data.datasets import RiskDataset
from deepseek_ray.data.evidence import VectorContract
from deepseek_ray.errors import DataError
from deepseek_ray.online.gate import decide
from deepseek_ray.online.measure import measure
from deepseek_ray.online.replay import Reservoir
from deepseek_ray.online.updater import recall, remember, take_back, warm_start
from deepseek_ray.train.step import EpochRecord
from tests.unit.update_parts import TRAIN, one_thread, precision, train_on  # noqa: F401 - a fixture

NAMES = ("amount", "old_pattern", "new_pattern")
SHAPE = ModelConfig(d_model=8, num_layers=1, num_heads=2, num_experts=4, d_expert=8, num_bins=4, dropout=0.0)
UPDATE = UpdateConfig(epochs=6, lr=5e-3, replay_fraction=0.5, min_labels=20)
CONTRACT = VectorContract(schema="s", feature_service="risk_default_v1", feature_digest="f")


def make_rows(seed: int, count: int, pattern: int) -> RiskDataset:
    """Fraud is what has one of the two pattern features set; one row in ten."""
    rng = np.random.default_rng(seed)
    label = (np.arange(count) % 10 == 0).astype(np.int8)
    features = np.column_stack([rng.uniform(0, 1, count), rng.uniform(0, 0.6, (count, 2))])
    features[label == 1, pattern] = rng.uniform(0.55, 1.0, int(label.sum()))
    return RiskDataset.build(
        features,
        np.tile([0.0, -1.0, 0.0, 0.0, 0.0, 0.0], (count, 2, 1)),
        label,
        np.arange(count) * 3_600_000_000,
        np.arange(count),
        feature_names=NAMES,
    )


OLD, NEW = make_rows(1, 600, pattern=1), make_rows(2, 600, pattern=2)
OLD_TEST, NEW_TEST = make_rows(3, 400, pattern=1), make_rows(4, 400, pattern=2)


@pytest.fixture(scope="module")
def champion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that knows the old pattern only."""
    return train_on(OLD, NEW, SHAPE, epochs=6).save_pretrained(tmp_path_factory.mktemp("champion"))


@pytest.fixture
def memory() -> Reservoir:
    memory = Reservoir(200, seed=0)
    remember(memory, OLD)
    return memory


def test_a_warm_start_learns_the_new_and_keeps_the_old(champion: Path, memory: Reservoir, tmp_path: Path) -> None:
    seen: list[EpochRecord] = []
    result = warm_start(champion, NEW, memory, tmp_path / "next", UPDATE, TRAIN, on_epoch=seen.append)
    assert precision(result.model_dir, NEW_TEST) > precision(champion, NEW_TEST) + 0.2
    assert precision(result.model_dir, OLD_TEST) > precision(champion, OLD_TEST) - 0.05
    assert (len(result.history), len(seen), result.num_new) == (6, 6, 600)
    assert result.num_replayed == pytest.approx(600, rel=0.05)  # half of each batch


def test_the_same_seed_gives_the_same_challenger(champion: Path, memory: Reservoir, tmp_path: Path) -> None:
    one_epoch = UPDATE.model_copy(update={"epochs": 1})
    paths = [tmp_path / name for name in "ab"]
    for path in paths:
        warm_start(champion, NEW, memory, path, one_epoch, TRAIN, seed=7)
    weights = [(path / "model.safetensors").read_bytes() for path in paths]
    assert weights[0] == weights[1]


def test_calibration_follows_held_out_rows(champion: Path, memory: Reservoir, tmp_path: Path) -> None:
    one_epoch = UPDATE.model_copy(update={"epochs": 1})
    result = warm_start(champion, NEW, memory, tmp_path / "next", one_epoch, TRAIN, held_out=NEW_TEST)
    model = models.load(result.model_dir)
    mean = model.predict_proba(NEW_TEST.features, NEW_TEST.sequence).mean()
    assert mean == pytest.approx(NEW_TEST.label.mean(), abs=0.01)


def test_without_memory_only_new_rows_are_used(champion: Path, tmp_path: Path) -> None:
    one_epoch = UPDATE.model_copy(update={"epochs": 1})
    assert warm_start(champion, NEW, Reservoir(10), tmp_path / "next", one_epoch, TRAIN).num_replayed == 0


def test_too_few_labels_are_refused(champion: Path, memory: Reservoir, tmp_path: Path) -> None:
    unknown = make_rows(5, 30, 1)
    unknown.label[5:] = -1
    with pytest.raises(DataError, match=r"5 new labels are fewer than update\.min_labels=20"):
        warm_start(champion, unknown, memory, tmp_path / "next", UPDATE, TRAIN)
    assert not (tmp_path / "next").exists()


def test_rows_of_another_vector_are_refused(champion: Path, memory: Reservoir, tmp_path: Path) -> None:
    other = RiskDataset(**{**vars(NEW), "feature_names": ("a", "b", "c")})
    with pytest.raises(DataError, match="another feature vector"):
        warm_start(champion, other, memory, tmp_path / "next", UPDATE, TRAIN)
    with pytest.raises(DataError, match="another feature vector"):
        remember(memory, other)


def test_memory_gives_back_what_it_was_given(memory: Reservoir, tmp_path: Path) -> None:
    memory.save(tmp_path / "replay.npz")
    rows = recall(Reservoir.load(tmp_path / "replay.npz"))
    assert (len(rows), int(rows.label.sum()), rows.feature_names) == (260, 60, NAMES)
    place = np.searchsorted(OLD.order_us, rows.order_us)
    np.testing.assert_array_equal(OLD.features[place], rows.features)
    with pytest.raises(DataError, match="empty"):
        recall(Reservoir(5))


def test_measured_evidence_passes_the_gate(champion: Path, memory: Reservoir, tmp_path: Path) -> None:
    result = warm_start(champion, NEW, memory, tmp_path / "next", UPDATE, TRAIN, held_out=make_rows(6, 400, 2))
    evidence = [
        measure(
            models.load(path), NEW_TEST, name="risk", version=version, contract=CONTRACT, old=OLD_TEST, timed_rows=20
        )
        for version, path in (("1", champion), ("2", result.model_dir))
    ]
    assert evidence[0].heldout_digest == evidence[1].heldout_digest
    assert evidence[1].average_precision == pytest.approx(precision(result.model_dir, NEW_TEST))
    bounds = GateConfig(max_calibration_error=0.2, max_p99_ms=1000, max_forgetting=0.1, max_cp100_drop=0.1)
    decision = decide(*evidence, bounds)
    assert decision.promote, decision.failed


def test_measuring_needs_a_fraud(champion: Path) -> None:
    with pytest.raises(DataError, match="hold no fraud"):
        measure(
            models.load(champion), NEW_TEST.select(NEW_TEST.label == 0), name="risk", version="1", contract=CONTRACT
        )


def test_a_row_that_is_taken_back_comes_again_as_a_fraud(memory: Reservoir) -> None:
    late = OLD.select(OLD.order_us == OLD.order_us[5])  # remembered as genuine
    take_back(memory, late)
    assert memory.seen == {0: 539, 1: 60}
    remember(memory, RiskDataset(**{**vars(late), "label": np.ones(1, dtype=np.int8)}))
    rows = recall(memory)
    assert rows.label[rows.order_us == OLD.order_us[5]].tolist() == [1]
    assert memory.seen == {0: 539, 1: 61}
