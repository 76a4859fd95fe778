"""A small fraud problem with an answer: rows for the tests of models and training."""

from __future__ import annotations

import numpy as np

from deepseek_ray.config import ModelConfig
from deepseek_ray.data.datasets import RiskDataset
from deepseek_ray.data.events import DAY_US
from deepseek_ray.models import RiskModelConfig

NUM_DAYS = 20
SHAPE = ModelConfig(d_model=16, num_layers=2, num_heads=2, num_experts=4, top_k=2, d_expert=8, num_bins=4, dropout=0.0)


def make_rows(n: int = 2_000, num_features: int = 6, sequence_len: int = 3, seed: int = 0) -> RiskDataset:
    """Fraud is likelier when feature 0 is large or a recent amount was large; the rest is noise."""
    rng = np.random.default_rng(seed)
    features = rng.lognormal(size=(n, num_features))
    sequence = rng.lognormal(size=(n, sequence_len, 6))
    sequence[..., 2:4] = rng.integers(0, 2, size=(n, sequence_len, 2))
    sequence[..., 4] = rng.integers(0, 5, size=(n, sequence_len))
    sequence[..., 5] = 0
    if sequence_len:
        sequence[:, -1, 1] = -1
    recent = sequence[:, :2, 0].max(1) > 3 if sequence_len else np.zeros(n)
    logit = 3.0 * (features[:, 0] > 2) + 3.0 * recent - 4.0
    label = rng.random(n) < 1 / (1 + np.exp(-logit))
    order_us = np.arange(n) * (NUM_DAYS * DAY_US // n)
    names = [f"f{index}" for index in range(num_features)]
    return RiskDataset.build(features, sequence, label, order_us, np.arange(n) % 50, feature_names=names)


def make_config(rows: RiskDataset, *, shape: ModelConfig = SHAPE, dense: bool = False) -> RiskModelConfig:
    """A model that fits the rows."""
    return RiskModelConfig(
        feature_names=rows.feature_names, sequence_len=rows.sequence.shape[1], shape=shape, dense=dense
    )
