"""After a replay: does every served vector and score recompute, and what did the update bring?

python -m pipelines.risk.review --run runs/mine

Frozen champion, updated challenger and a full retrain are scored on the same served rows: those after the update's
last training label. The old pattern is judged on the days held out before the drift.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import polars as pl

from deepseek_ray import metrics, models
from deepseek_ray.cli import add_settings, guarded, settings_of
from deepseek_ray.config import Config
from deepseek_ray.data import table
from deepseek_ray.data.datasets import RiskDataset
from deepseek_ray.data.prediction_archive import read_predictions, stack_sequences, stack_values
from deepseek_ray.data.served import matured_rows, to_rows
from deepseek_ray.data.verify import verify_run
from deepseek_ray.errors import DataError
from deepseek_ray.online.gate import relative_drop
from deepseek_ray.paths import RunPaths, write_stage
from deepseek_ray.registry import Registry
from deepseek_ray.train.trainer import fit


def main(argv: Sequence[str] | None = None) -> int:
    """Review; exit status 1 when a vector or a score does not recompute."""
    parser = argparse.ArgumentParser(prog="deepseek-ray review", description="Verify a replay and judge its update.")
    add_settings(parser)
    parser.add_argument("--no-retrain", action="store_true", help="leave out the full retrain")
    options = parser.parse_args(argv)
    config, paths = settings_of(options)
    registry = Registry.open(paths, config.stores, name=config.model_name, create=False)
    verified = verify(config, paths, registry)
    if (paths.results / "update.json").exists():
        _compare(config, paths, registry, retrain=not options.no_retrain)
    return 0 if verified["feature_differences"] == 0 and verified["served_offline_max_diff"] <= 1e-6 else 1


def verify(config: Config, paths: RunPaths, registry: Registry) -> dict[str, Any]:
    """Recompute all served vectors and scores; writes results/verify.json."""
    delay, length = config.data.label_delay_days, config.features.sequence_len
    found = verify_run(paths, config.features.vector, label_delay_days=delay, sequence_len=length)
    logged = read_predictions(paths)
    largest = 0.0
    for version, rows in logged.partition_by("model_version", as_dict=True).items():
        model = registry.get(str(version[0])).load().model
        again = model.predict_proba(stack_values(rows), stack_sequences(rows))
        largest = max(largest, float(np.abs(again - rows["probability"].to_numpy()).max()))
    stage = {"feature_rows": found.rows, "feature_differences": found.num_differences}
    stage |= {"served_offline_max_diff": largest}
    write_stage(paths, "verify", stage)
    print(f"{found.rows} served vectors, {found.num_differences} differences; largest score difference {largest:.2g}")
    return stage


def _compare(config: Config, paths: RunPaths, registry: Registry, *, retrain: bool) -> None:
    stage = json.loads((paths.results / "update.json").read_text(encoding="utf-8"))
    champion, challenger = (registry.get(stage[name]) for name in ("champion_version", "challenger_version"))
    folders = {"frozen": champion.path, "updated": challenger.path}
    if retrain:
        folders["full_retrain"] = _retrain(config, paths, champion.schema, stage["trained_until_us"])
    after = _rows_after(paths, champion.schema.columns, stage["trained_until_us"])
    parts = {"after_drift": after, "old_pattern": RiskDataset.load(paths.datasets / "holdout.safetensors").labelled()}
    for name, rows in parts.items():
        stage[name] = {kind: _figures(folder, rows) for kind, folder in folders.items()}
    new, old = stage["after_drift"], stage["old_pattern"]
    stage["update_gain"] = new["updated"]["average_precision"] / new["frozen"]["average_precision"] - 1
    stage["update_forgetting"] = relative_drop(*(old[kind]["average_precision"] for kind in ("frozen", "updated")))
    replay = json.loads((paths.results / "replay.json").read_text(encoding="utf-8"))
    stage["update_failed_requests"] = replay.get("update_failed_requests")
    write_stage(paths, "update", stage)
    print(f"update: gain {stage['update_gain']:+.1%} after, {stage['update_forgetting']:+.1%} lost on the old")


def _rows_after(paths: RunPaths, columns: tuple[str, ...], until_us: int) -> RiskDataset:
    """Served rows younger than the update's data, with the truth that only a replay knows today."""
    truth = table.read(paths.transactions).select("transaction_id", truth="is_fraud", scenario="fraud_scenario")
    logged = read_predictions(paths).filter(pl.col("order_us") > until_us).join(truth, on="transaction_id")
    if not logged.height or not logged["truth"].sum():
        raise DataError("No fraud was served after the update's data.", fix="replay more days after --update-after")
    return to_rows(logged, columns, logged["truth"].to_numpy(), logged["scenario"].to_numpy())


def _retrain(config: Config, paths: RunPaths, schema: Any, until_us: int) -> Any:
    old = RiskDataset.load(paths.datasets / "train.safetensors")
    served = matured_rows(paths, schema.columns, schema.feature_digest, config.data.label_delay_days)
    whole = old.concat(served.select(served.order_us <= until_us))
    alone = config.model_copy(update={"train": config.train.model_copy(update={"ablation": False})})
    return fit(whole.save(paths.datasets / "full.safetensors"), alone, paths, name="full_retrain").model_dir


def _figures(folder: Any, rows: RiskDataset) -> dict[str, float]:
    score = models.load(folder).predict_proba(rows.features, rows.sequence)
    kinds = metrics.by_scenario(rows.label, score, rows.scenario)
    return {
        "average_precision": metrics.average_precision(rows.label, score),
        "cp100": metrics.cp100(score, rows.card, rows.day, rows.label),
        **{f"recall_scenario_{kind}": value for kind, value in kinds.items()},
    }


if __name__ == "__main__":
    sys.exit(guarded(main))
