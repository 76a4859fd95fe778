"""The published protocol of the fraud detection handbook: its yardsticks first, then our model on the same test week.

python -m pipelines.risk.handbook --data DIR --json OUT

Published yardsticks train on one week of 15 features, or on ``--history-days`` with seven features of the card's own
history; our model trains on the ``--history-days`` with the default vector. All are tested on the same rows.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from deepseek_ray import metrics, models
from deepseek_ray.cli import guarded
from deepseek_ray.config import Config
from deepseek_ray.data import batch_engine, handbook, protocol, windows
from deepseek_ray.data.datasets import RiskDataset
from deepseek_ray.data.periods import to_dataset
from deepseek_ray.errors import ConfigError
from deepseek_ray.logs import get_logger
from deepseek_ray.paths import RunPaths
from deepseek_ray.presets import PRESETS, load_preset
from deepseek_ray.train.trainer import fit
from deepseek_ray.train.yardsticks import fit_lightgbm_published, fit_logistic

FIGURES = ("auc", "average_precision", "cp100", "recall_at_1pct_fpr")
log = get_logger("pipelines.risk.handbook")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the protocol, print a table, write JSON."""
    options = _parser().parse_args(argv)
    if not options.data:
        raise ConfigError("There is no data folder.", fix="give --data DIR with handbook-shaped parquet")
    config = load_preset(options.preset, overrides=[*options.overrides, f"seed={options.seed}"])
    start = time.perf_counter()
    transactions = handbook.read(options.data, label_delay_days=options.delay_days)
    rows = protocol.split(
        transactions, train_start=options.train_start, train_days=options.train_days, delay_days=options.delay_days,
        test_start=options.test_start, test_days=options.test_days, history_days=options.history_days,
    )  # fmt: skip
    log.info("%d train rows, %d with history, %d to test on", len(rows.train), len(rows.history), len(rows.test))
    with tempfile.TemporaryDirectory() as folder:
        scores = _scores(transactions, rows, config, options, RunPaths(Path(folder)))
    result = _result(transactions, rows, scores, options) | {"wall_s": time.perf_counter() - start}
    _print(result, scores)
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0


def _scores(
    transactions: pl.DataFrame, rows: protocol.Split, config: Config, options: argparse.Namespace, paths: RunPaths
) -> dict[str, Any]:
    """Scores of the test rows by name; the model's has no prefix in the result."""
    made: dict[str, Any] = {"ceiling": protocol.knowable(transactions, rows.test, delay_days=options.delay_days)}
    week, test = _datasets(transactions, "handbook", rows.train, rows.test, options)
    made["logistic"] = fit_logistic(week).predict_proba(test.features)
    made["lightgbm"] = fit_lightgbm_published(week).predict_proba(test.features)
    history, test = _datasets(transactions, "handbook_history", rows.history, rows.test, options)
    made["lightgbm_history"] = fit_lightgbm_published(history).predict_proba(test.features)
    history, test = _datasets(transactions, "default", rows.history, rows.test, options)
    made["lightgbm_default"] = fit_lightgbm_published(history).predict_proba(test.features)
    fitted = fit(history.save(paths.create().datasets / "history.safetensors"), config, paths, name="handbook")
    for name, job in fitted.jobs.items():
        made[name] = models.load(job.model_dir).predict_proba(test.features, test.sequence)
    return made


def _datasets(
    transactions: pl.DataFrame, vector: str, train: Any, test: Any, options: argparse.Namespace
) -> tuple[RiskDataset, RiskDataset]:
    length = 16 if vector == "default" else 0
    spec = windows.load().vector(vector)
    log.info("computing %d features of %d transactions", len(spec.names), transactions.height)
    table = batch_engine.compute(transactions, spec, label_delay_days=options.delay_days, sequence_len=length)
    return to_dataset(table.take(train), transactions), to_dataset(table.take(test), transactions)


def _result(
    transactions: pl.DataFrame, rows: protocol.Split, scores: dict[str, Any], options: argparse.Namespace
) -> dict[str, Any]:
    test = transactions[rows.test]
    label, card = test["is_fraud"].to_numpy(), test["card_id"].rank("dense").to_numpy()
    day, scenario = protocol.day_numbers(test), test["fraud_scenario"].to_numpy()
    result: dict[str, Any] = {
        "seed": options.seed, "delay_days": options.delay_days, "train_start": str(options.train_start),
        "train_days": options.train_days, "history_days": options.history_days, "test_start": str(options.test_start),
        "rows_train": len(rows.train), "rows_history": len(rows.history), "rows_test": len(rows.test),
        "frauds_test": int(label.sum()),
    }  # fmt: skip
    for name, score in scores.items():
        prefix = "" if name == "moe" else f"{name}_"
        found = metrics.evaluate(label, score, card=card, day=day)
        result |= {prefix + figure: found[figure] for figure in FIGURES}
        for kind in (1, 2, 3):  # frauds of one kind against all genuine rows
            part = (scenario == kind) | (label == 0)
            value = metrics.auc(label[part], np.asarray(score)[part]) if (scenario == kind).any() else None
            result[f"{prefix}auc_scenario_{kind}"] = value
    return result


def _print(result: dict[str, Any], scores: dict[str, Any]) -> None:
    print(f"seed {result['seed']}, label delay {result['delay_days']} days, test from {result['test_start']}")
    print(f"{'':18}" + "".join(f"{figure:>20}" for figure in FIGURES))
    for name in scores:
        prefix = "" if name == "moe" else f"{name}_"
        print(f"{name:18}" + "".join(f"{result[prefix + figure]:20.4f}" for figure in FIGURES))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="deepseek-ray handbook", description="The handbook's published protocol.")
    parser.add_argument("--data", default=os.environ.get("DEEPSEEK_RAY_HANDBOOK"), help="folder of handbook parquet")
    parser.add_argument("--json", type=Path, help="write every figure here")
    parser.add_argument("--train-start", type=date.fromisoformat, default=date(2018, 7, 25))
    parser.add_argument("--train-days", type=int, default=7)
    parser.add_argument("--delay-days", type=int, default=7)
    parser.add_argument("--test-start", type=date.fromisoformat, default=date(2018, 8, 8))
    parser.add_argument("--test-days", type=int, default=7)
    parser.add_argument("--history-days", type=int, default=100, help="days that end with the train period")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--preset", default="handbook", choices=sorted(PRESETS))
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="SECTION.NAME=VALUE")
    return parser


if __name__ == "__main__":
    sys.exit(guarded(main))
