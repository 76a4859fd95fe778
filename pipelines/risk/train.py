"""Features, model, ablation and yardsticks on one run; then register the model and ask the gate.

python -m pipelines.risk.train --run runs/mine --set train.epochs=8
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

import polars as pl

from deepseek_ray import models, settings
from deepseek_ray.cli import add_settings, guarded, settings_of
from deepseek_ray.config import Config
from deepseek_ray.data import engine, table
from deepseek_ray.data.datasets import RiskDataset
from deepseek_ray.data.feature_client import FeatureClient
from deepseek_ray.data.periods import Periods, periods, to_dataset
from deepseek_ray.data.windows import VectorSpec
from deepseek_ray.logs import get_logger
from deepseek_ray.online import trial
from deepseek_ray.online.threshold import THRESHOLD_TAG, policy_threshold
from deepseek_ray.paths import RunPaths, write_stage
from deepseek_ray.registry.package import InputSchema, Probes
from deepseek_ray.registry.tracking import Run, git_commit
from deepseek_ray.registry.versions import CHAMPION, Lineage, Registry, VersionInfo
from deepseek_ray.report.charts import CHARTS
from deepseek_ray.report.results import Results, Train
from deepseek_ray.train.evaluation import judge
from deepseek_ray.train.trainer import FitResult, fit
from deepseek_ray.train.yardsticks import Yardstick, fit_lightgbm, fit_logistic

CURVES = ("pr", "roc", "calibration", "experts", "loss", "importance")
log = get_logger("pipelines.risk.train")


def main(argv: Sequence[str] | None = None) -> int:
    """Train, judge, register; the last line says what the gate decided."""
    parser = argparse.ArgumentParser(prog="deepseek-ray train", description=__doc__.partition("\n")[0])
    add_settings(parser)
    config, paths = settings_of(parser.parse_args(argv), "train")
    transactions = table.read(paths.transactions)
    registry = Registry.open(paths.create(), config.stores, name=config.model_name)
    if registry.version_of(CHAMPION):  # the gate would turn down a version that reads something else
        settings.refuse_changes(paths, config, settings.FEATURES)
    with registry.tracking.start_run("train", tags={"stage": "train"}) as run:
        train_and_register(transactions, config, paths, registry, run)
    return 0


def train_and_register(
    transactions: pl.DataFrame, config: Config, paths: RunPaths, registry: Registry, run: Run
) -> VersionInfo:
    """The whole stage; writes results/train.json."""
    start = time.perf_counter()
    days = periods(transactions, config.data)
    settings.store(paths, config)
    spec, train, holdout = build_datasets(transactions, days, config, paths)
    log.info("%d rows to train on, %d held out, %d features", len(train), len(holdout), len(spec.names))
    rows = paths.datasets / "train.safetensors"
    fitted = fit(rows, config, paths, feature_service=spec.service, feature_digest=spec.digest)
    yardsticks = [fit_logistic(train, seed=config.seed), fit_lightgbm(train, seed=config.seed)]
    stage = judge(fitted, yardsticks, holdout) | _facts(config, spec, train, holdout, days)
    stage |= {"mlflow_run_id": run.run_id, "tracking_uri": registry.tracking.shown_uri}
    stage["wall_s"] = time.perf_counter() - start
    write_stage(paths, "train", stage)
    _log_run(run, config, stage, yardsticks)
    return _register(registry, run, fitted, holdout, stage, config)


def build_datasets(
    transactions: pl.DataFrame, days: Periods, config: Config, paths: RunPaths
) -> tuple[VectorSpec, RiskDataset, RiskDataset]:
    """Compute the vectors of all training and held-out days, store them offline, read them back point in time."""
    client = FeatureClient(paths, config.stores.online_store)
    client.apply()
    spec = client.declaration().vector(config.features.vector)
    known = transactions.filter(pl.col("order_us") < days.replay.start_us)
    engine.store(paths.transactions, spec, client, config, before_us=days.replay.start_us)
    made = []
    for name, period in (("train", days.train), ("holdout", days.holdout)):
        vectors = client.historical(period.filter(known).select("card_id", "order_us"), spec.service)
        made.append(to_dataset(vectors, known).labelled())
        made[-1].save(paths.datasets / f"{name}.safetensors")
    return spec, made[0], made[1]


def _facts(config: Config, spec: VectorSpec, train: RiskDataset, holdout: RiskDataset, days: Periods) -> dict[str, Any]:
    return {
        "train_from": str(days.train.start), "train_to": str(days.train.end),
        "holdout_from": str(days.holdout.start), "holdout_to": str(days.holdout.end),
        "seed": config.seed, "feature_service": spec.service, "feature_digest": spec.digest,
        "git_commit": git_commit(), "num_features": len(spec.names), "rows_train": len(train),
        "rows_holdout": len(holdout), "label_delay_days": config.data.label_delay_days, "data_digest": train.digest,
    }  # fmt: skip


def _log_run(run: Run, config: Config, stage: dict[str, Any], yardsticks: list[Yardstick]) -> None:
    run.log_params(config.model_dump() | {one.name: one.settings for one in yardsticks})
    run.set_tags({name: stage[name] for name in ("data_digest", "feature_service", "feature_digest")})
    for name, figures in stage["models"].items():
        numbers = {key: value for key, value in figures.items() if isinstance(value, float)}
        run.log_metrics({f"{name}.{key}": value for key, value in numbers.items()})
    for epoch, loss, precision in stage["loss"]:
        run.log_metrics({"train.loss": loss, "validation.average_precision": precision}, step=epoch)
    run.log_metrics({"expert_load.min": min(min(layer) for layer in stage["expert_load"]), "wall_s": stage["wall_s"]})
    results = Results(train=Train.model_validate(stage))
    for name in CURVES:
        if (figure := CHARTS[name][0](results)) is not None:
            run.log_figure(figure, f"curves/{name}.png")
    run.log_dict(stage, "train.json")


def _register(
    registry: Registry, run: Run, fitted: FitResult, holdout: RiskDataset, stage: dict[str, Any], config: Config
) -> VersionInfo:
    model = models.load(fitted.model_dir)
    schema, paths = InputSchema.of(model.config), registry.tracking.paths
    champion = registry.get(CHAMPION) if registry.version_of(CHAMPION) else None
    rows = trial.judging_rows(paths, champion, schema, stage["train_to"], holdout, config.data)
    log.info("judged on %d %s rows", len(rows), "held-out" if rows is holdout else "served")
    probes = Probes.of(model, holdout.features, holdout.sequence)
    lineage = Lineage(data_digest=stage["data_digest"], git_commit=stage["git_commit"],
                      train_start=stage["train_from"], train_end=stage["train_to"])  # fmt: skip
    scores = model.predict_proba(rows.features, rows.sequence)
    tags = {THRESHOLD_TAG: str(policy_threshold(scores, config.serving))}
    info = registry.register(fitted.model_dir, run.run_id, schema, lineage, probes=probes, tags=tags)
    decision = trial.judge(champion, info, rows, holdout, config.gate)  # a retrain knows no older days than these
    refusal = registry.offer(info.version, decision)
    print(f"version {info.version} of {info.name!r} {f'not promoted: {refusal}' if refusal else 'promoted'}")
    return info


if __name__ == "__main__":
    os.environ.setdefault("MPLBACKEND", "Agg")
    sys.exit(guarded(main))
