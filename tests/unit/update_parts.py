"""What tests of updates share: two seasons of fraud, a model that knows one pattern only, one thread."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import deepseek_ray.models as models
from deepseek_ray.config import ModelConfig, TrainConfig
from deepseek_ray.data.datasets import RiskDataset
from deepseek_ray.metrics import average_precision
from deepseek_ray.models import RiskModel, RiskModelConfig
from deepseek_ray.train.step import Recipe, train_in_process

TRAIN = TrainConfig(batch_size=64, negative_rate=0.5)
NAMES = ("season", "old_pattern", "new_pattern")
SHAPE = ModelConfig(d_model=16, num_layers=1, num_heads=2, num_experts=4, d_expert=16, num_bins=6, dropout=0.0)


def make_rows(seed: int, count: int, *, new: bool) -> RiskDataset:
    """In the old season fraud is what has the old pattern; in the new one what has the new, and the old is noise.

    Who learns the new season alone unlearns the old pattern.
    """
    rng = np.random.default_rng(seed)
    label = np.arange(count) % 8 == 0
    season = rng.uniform(0, 0.45, count) + 0.55 * new
    noise, pattern = rng.uniform(0, 1, count), np.where(label, rng.uniform(0.6, 1, count), rng.uniform(0, 0.65, count))
    columns = [season, noise, pattern] if new else [season, pattern, noise * 0.6]
    sequence = np.tile([0.0, -1.0, 0.0, 0.0, 0.0, 0.0], (count, 2, 1))
    order_us = np.arange(count) * 3_600_000_000
    return RiskDataset.build(np.column_stack(columns), sequence, label, order_us, np.arange(count), feature_names=NAMES)


OLD, NEW = make_rows(1, 800, new=False), make_rows(2, 800, new=True)
OLD_TEST, NEW_TEST = make_rows(3, 800, new=False), make_rows(4, 800, new=True)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Threads cost more than they give on models this small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def train_on(old: RiskDataset, new: RiskDataset, shape: ModelConfig, *, epochs: int, **contract: str) -> RiskModel:
    """A model that knows the old rows, with bins for all."""
    torch.manual_seed(0)
    model = RiskModel(RiskModelConfig(feature_names=old.feature_names, sequence_len=2, shape=shape, **contract))
    everything = old.concat(new)
    model.prepare(everything.features, everything.label)
    train_in_process(model, old, Recipe.of(TRAIN, epochs=epochs, lr=1e-2))
    return model


def precision(path: Path, rows: RiskDataset) -> float:
    return average_precision(rows.label, models.load(path).predict_proba(rows.features, rows.sequence))
