"""Walking forward: what is known on a day, and learners that pay for what they train."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from deepseek_ray import metrics
from deepseek_ray.config import Config, build_config
from deepseek_ray.data.datasets import RiskDataset
from deepseek_ray.data.events import DAY_US
from deepseek_ray.errors import DataError
from deepseek_ray.online.replay import Reservoir
from deepseek_ray.online.updater import remember
from deepseek_ray.online.walk import Effort, Frozen, Incremental, Retrained, days, newest_known


def rows(num_days: int = 4, *, signal: int = 0, seed: int = 0) -> RiskDataset:
    """A hundred payments a day; fraud is a large value of one of two features."""
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(100 * num_days, 2))
    label = (features[:, signal] > 1).astype(np.int8)
    order = np.repeat(np.arange(num_days), 100) * DAY_US + np.tile(np.arange(100), num_days)
    empty = np.zeros((len(label), 0, 6))
    return RiskDataset.build(features, empty, label, order, np.arange(len(label)), feature_names=("a", "b"))


@pytest.fixture(scope="module")
def config() -> Config:
    shape = {"d_model": 8, "num_layers": 1, "num_heads": 1, "num_experts": 2, "top_k": 1, "d_expert": 8, "num_bins": 4}
    train = {"epochs": 4, "batch_size": 32, "negative_rate": 0.5}
    update = {"epochs": 4, "lr": 5e-3, "replay_fraction": 0.5, "min_labels": 10}
    return build_config({"model": shape, "train": train, "update": update})


def test_a_day_is_known_when_all_its_labels_are() -> None:
    # labels after one day: those of day 8 are complete at the end of day 9
    assert newest_known(10, 1) == 8
    assert newest_known(10, 7) == 2


def test_days_include_both_ends_and_missing_ones_are_named() -> None:
    assert np.unique(days(rows(), 1, 2).day).tolist() == [1, 2]
    with pytest.raises(DataError, match="no rows of the days 1970-01-08 to 1970-01-09; the data hold 1970-01-01 to"):
        days(rows(), 7, 8)


def test_a_retrained_model_learns_and_its_cost_is_counted_after_thinning(config: Config) -> None:
    data, learner = rows(), Retrained(config)
    learner.learn(data)
    assert metrics.auc(data.label, learner.score(data)) > 0.95
    frauds = int(data.label.sum())
    assert learner.effort.samples == 4 * (frauds + round((len(data) - frauds) * 0.5))
    assert learner.effort.seconds > 0


def test_an_increment_learns_the_new_and_leaves_the_start_as_it_was(config: Config, tmp_path: Path) -> None:
    old, new = rows(8), rows(8, signal=1, seed=1)
    start = Retrained(config)
    start.learn(old)
    memory = Reservoir(500, 0)
    remember(memory, old)
    frozen, before = Frozen(start.fitted), start.score(new)
    learner = Incremental(start.fitted, memory, config, tmp_path)
    for part in (days(new, 0, 3), days(new, 4, 7)):
        learner.learn(part)
    frozen.learn(new)
    assert metrics.auc(new.label, learner.score(new)) > metrics.auc(new.label, frozen.score(new)) + 0.1
    assert np.array_equal(frozen.score(new), before)
    assert frozen.effort == Effort()
    assert sum(memory.seen.values()) == len(old) + len(new)


def test_plain_fine_tuning_keeps_its_memory_empty(config: Config, tmp_path: Path) -> None:
    start = Retrained(config)
    start.learn(rows())
    learner = Incremental(start.fitted, Reservoir(1, 0), config, tmp_path, remembers=False)
    learner.learn(rows(seed=1))
    learner.learn(rows(seed=2))
    assert len(learner.memory) == 0
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["0", "1", "2"]


def test_smaller_batches_learn_more_from_the_same_rows(config: Config, tmp_path: Path) -> None:
    new, start = rows(8, signal=1, seed=1), Retrained(config)
    start.learn(rows(8))
    found = []
    for size in (0, 8):
        changed = config.model_copy(update={"update": config.update.model_copy(update={"batch_size": size})})
        learner = Incremental(start.fitted, Reservoir(1, 0), changed, tmp_path / str(size), remembers=False)
        learner.learn(new)
        found.append((learner.effort.samples, metrics.auc(new.label, learner.score(new))))
    assert found[0][0] == found[1][0]
    assert found[1][1] > found[0][1]
