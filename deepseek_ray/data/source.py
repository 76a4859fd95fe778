"""Where a run's transactions come from when no file is ingested: the generator, or a handbook folder."""

from __future__ import annotations

import polars as pl

from deepseek_ray.config import DataConfig
from deepseek_ray.data import handbook, transactions

SYNTHETIC = "synthetic"


def load(config: DataConfig, seed: int) -> pl.DataFrame:
    """The transactions table that ``config.source`` names: ``synthetic``, or a folder.

    Raises:
        ConfigError: a setting of the generator is not valid.
        DataError: the folder cannot be read.
    """
    if config.source == SYNTHETIC:
        return transactions.generate(config, seed)
    return handbook.read(config.source, label_delay_days=config.label_delay_days)
