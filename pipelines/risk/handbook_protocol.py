"""The published protocol of the fraud detection handbook: its yardsticks first, then our model on the same test week.

Run by ``python -m pipelines.risk.handbook``. Published yardsticks train on one week of 15 features, or on
``--history-days`` with seven features of the card's own history; our model trains on the ``--history-days`` with the
default vector. All are tested on the same rows.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from deepseek_ray import metrics, models
from deepseek_ray.config import Config
from deepseek_ray.data import handbook, protocol
from deepseek_ray.logs import get_logger
from deepseek_ray.paths import RunPaths
from deepseek_ray.train.trainer import fit
from deepseek_ray.train.yardsticks import fit_lightgbm_published, fit_logistic

FIGURES = ("auc", "average_precision", "cp100", "recall_at_1pct_fpr")
log = get_logger("pipelines.risk.handbook")


def run(options: argparse.Namespace, config: Config) -> dict[str, Any]:
    """All models on the rows of one test week."""
    transactions = handbook.read(options.data, label_delay_days=options.delay_days)
    rows = protocol.split(
        transactions, train_start=options.train_start, train_days=options.train_days, delay_days=options.delay_days,
        test_start=options.test_start, test_days=options.test_days, history_days=options.history_days,
    )  # fmt: skip
    log.info("%d train rows, %d with history, %d to test on", len(rows.train), len(rows.history), len(rows.test))
    with tempfile.TemporaryDirectory() as folder:
        scores = _scores(transactions, rows, config, options, RunPaths(Path(folder)))
    return _result(transactions, rows, scores, options)


def show(result: dict[str, Any]) -> Iterator[str]:
    """Lines of a table."""
    yield f"label delay {result['delay_days']} days, test from {result['test_start']}"
    yield f"{'':18}" + "".join(f"{figure:>20}" for figure in FIGURES)
    for name in result["models"]:
        prefix = prefix_of(name)
        yield f"{name:18}" + "".join(f"{result[prefix + figure]:20.4f}" for figure in FIGURES)


def prefix_of(name: str) -> str:
    """Prefix of a model's figures; ours has none."""
    return "" if name == "moe" else f"{name}_"


def figures(test: pl.DataFrame, scores: dict[str, Any]) -> dict[str, Any]:
    """Every figure of every score of the test rows, under the prefix of its name."""
    label, card = test["is_fraud"].to_numpy(), test["card_id"].rank("dense").to_numpy()
    day, scenario = protocol.day_numbers(test), test["fraud_scenario"].to_numpy()
    result: dict[str, Any] = {}
    for name, score in scores.items():
        prefix = prefix_of(name)
        found = metrics.evaluate(label, score, card=card, day=day)
        result |= {prefix + figure: found[figure] for figure in FIGURES}
        for kind in (1, 2, 3):  # frauds of one kind against all genuine rows
            part = (scenario == kind) | (label == 0)
            value = metrics.auc(label[part], np.asarray(score)[part]) if (scenario == kind).any() else None
            result[f"{prefix}auc_scenario_{kind}"] = value
    return result


def _scores(
    transactions: pl.DataFrame, rows: protocol.Split, config: Config, options: argparse.Namespace, paths: RunPaths
) -> dict[str, Any]:
    """Scores of the test rows by name."""
    made: dict[str, Any] = {"ceiling": protocol.knowable(transactions, rows.test, delay_days=options.delay_days)}

    def datasets(vector: str, train: Any, sequence_len: int = 0) -> Any:
        parts = [train, rows.test]
        return protocol.datasets(
            transactions, vector, parts, delay_days=options.delay_days, sequence_len=sequence_len
        )  # fmt: skip

    week, test = datasets("handbook", rows.train)
    made["logistic"] = fit_logistic(week).predict_proba(test.features)
    made["lightgbm"] = fit_lightgbm_published(week).predict_proba(test.features)
    history, test = datasets("handbook_history", rows.history)
    made["lightgbm_history"] = fit_lightgbm_published(history).predict_proba(test.features)
    history, test = datasets(config.features.vector, rows.history, config.features.sequence_len)
    made["lightgbm_default"] = fit_lightgbm_published(history).predict_proba(test.features)
    fitted = fit(history.save(paths.create().datasets / "history.safetensors"), config, paths, name="handbook")
    for name, job in fitted.jobs.items():
        made[name] = models.load(job.model_dir).predict_proba(test.features, test.sequence)
    return made


def _result(
    transactions: pl.DataFrame, rows: protocol.Split, scores: dict[str, Any], options: argparse.Namespace
) -> dict[str, Any]:
    test = transactions[rows.test]
    return {
        "delay_days": options.delay_days, "train_start": str(options.train_start),
        "train_days": options.train_days, "history_days": options.history_days, "test_start": str(options.test_start),
        "rows_train": len(rows.train), "rows_history": len(rows.history), "rows_test": len(rows.test),
        "frauds_test": int(test["is_fraud"].sum()), "models": list(scores),
    } | figures(test, scores)  # fmt: skip
