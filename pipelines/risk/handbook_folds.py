"""The published protocol on several weeks in a row: each fold a train week, a delay, a test week, seven days apart.

Run by ``python -m pipelines.risk.handbook --experiment folds``; with the default dates and ``--weeks 4`` these are the
handbook's prequential folds. Each fold trains our model anew on its ``--history-days`` and, beside it, LightGBM with
fixed settings on the same rows. The known cards are left out of each test week as published.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import numpy as np
import polars as pl

from deepseek_ray.config import Config
from deepseek_ray.data import handbook, protocol
from deepseek_ray.data.datasets import RiskDataset
from deepseek_ray.logs import get_logger
from deepseek_ray.online.walk import Retrained
from deepseek_ray.train.yardsticks import fit_lightgbm_published
from pipelines.risk.handbook_protocol import FIGURES, figures, prefix_of

MODELS = ("ceiling", "lightgbm", "moe")
log = get_logger("pipelines.risk.handbook")


def run(options: argparse.Namespace, config: Config) -> dict[str, Any]:
    """Every fold, and the means over the folds under the names of the figures.

    Raises:
        DataError: the data do not hold the days of a fold.
    """
    table = handbook.read(options.data, label_delay_days=options.delay_days)
    splits = [_split(table, options, timedelta(days=7 * number)) for number in range(options.weeks)]
    wanted = np.unique(np.concatenate([rows for split in splits for rows in (split.history, split.test)]))
    (rows,) = protocol.datasets(
        table, config.features.vector, [wanted],
        delay_days=options.delay_days, sequence_len=config.features.sequence_len,
    )  # fmt: skip
    folds = []
    for number, split in enumerate(splits):
        train, test = (rows.select(np.searchsorted(wanted, part)) for part in (split.history, split.test))
        folds.append(_fold(table, split, train, test, options, config))
        log.info("fold %d of %d: average precision %.3f", number + 1, len(splits), folds[-1]["average_precision"])
    names = [prefix_of(model) + figure for model in MODELS for figure in FIGURES]
    means = {name: float(np.mean([fold[name] for fold in folds])) for name in names}
    return means | {"delay_days": options.delay_days, "history_days": options.history_days, "folds": folds}


def show(result: dict[str, Any]) -> Iterator[str]:
    """Lines of a table."""
    yield f"label delay {result['delay_days']} days, {result['history_days']} days of history"
    yield f"{'test week':12}{'':10}" + "".join(f"{figure:>20}" for figure in FIGURES)
    for fold in [*result["folds"], result | {"test_start": "mean"}]:
        for model in MODELS:
            cells = "".join(f"{fold[prefix_of(model) + figure]:20.4f}" for figure in FIGURES)
            yield f"{fold['test_start']:12}{model:10}{cells}"


def _split(table: pl.DataFrame, options: argparse.Namespace, later: timedelta) -> protocol.Split:
    return protocol.split(
        table, train_start=options.train_start + later, train_days=options.train_days, delay_days=options.delay_days,
        test_start=options.test_start + later, test_days=options.test_days, history_days=options.history_days,
    )  # fmt: skip


def _fold(
    table: pl.DataFrame,
    split: protocol.Split,
    train: RiskDataset,
    test: RiskDataset,
    options: argparse.Namespace,
    config: Config,
) -> dict[str, Any]:
    learner = Retrained(config)
    learner.learn(train)
    scores = {
        "ceiling": protocol.knowable(table, split.test, delay_days=options.delay_days),
        "lightgbm": fit_lightgbm_published(train).predict_proba(test.features),
        "moe": learner.score(test),
    }
    rows = table[split.test]
    start = rows["event_time"].dt.date().min()
    counts = {"rows_train": len(train), "rows_test": len(test), "frauds_test": int(test.label.sum())}
    return {"test_start": str(start), **counts, **figures(rows, scores), "train_s": learner.effort.seconds}
