"""Search hyperparameters on the training days of a run: ASHA over tune_spaces/risk.py, a child run a trial.

python -m pipelines.risk.tune --run runs/mine --trials 12 --minutes 4

A trial trains in one process on all but the last training days and reports their average precision every epoch; as
many trials run at once as there are cores. The held-out days of the run stay unseen.
"""

from __future__ import annotations

import argparse
import math
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from deepseek_ray.cluster import local_cluster
from deepseek_ray.logs import QUIET_ENVIRONMENT, silence_telemetry

silence_telemetry()
os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")

# ruff: noqa: E402  the environment above is read when Ray is imported
import ray.tune
import torch
from ray.tune.schedulers import ASHAScheduler

from deepseek_ray.cli import add_settings, guarded, settings_arguments, settings_of
from deepseek_ray.config import Config, build_config
from deepseek_ray.data.datasets import RiskDataset
from deepseek_ray.errors import DataError
from deepseek_ray.models import RiskModel, RiskModelConfig
from deepseek_ray.paths import RunPaths, write_stage
from deepseek_ray.registry import Registry, Run, Tracking
from deepseek_ray.train.step import EpochRecord, Recipe, held_out_precision, train_in_process
from deepseek_ray.train.trainer import worker_environment
from tune_spaces.risk import SPACE

METRIC = "average_precision"


def main(argv: Sequence[str] | None = None) -> int:
    """Search, write results/tune.json, print the command that trains with the best settings."""
    parser = argparse.ArgumentParser(prog="deepseek-ray tune", description="Search hyperparameters.")
    add_settings(parser)
    parser.add_argument("--trials", type=int, default=12)
    parser.add_argument("--minutes", type=float, default=4.0, help="stop starting epochs after this time")
    options = parser.parse_args(argv)
    config, paths = settings_of(options)
    dataset = paths.datasets / "train.safetensors"
    if not dataset.exists():
        problem = f"There are no training rows at {str(dataset)!r}."
        raise DataError(problem, fix=f"deepseek-ray train --run {paths.root}")
    tracking = Registry.open(paths, config.stores, name=config.model_name).tracking
    with tracking.start_run("tune", tags={"stage": "tune"}) as parent:
        found = search(config, paths, dataset, tracking, parent, trials=options.trials, minutes=options.minutes)
    settings = shlex.join([*settings_arguments(options), *(f"--set={k}={v:.4g}" for k, v in found["best"].items())])
    print(f"best validation average precision {found[METRIC]:.4f} of {found['trials']} trials\nNext: "
          f"python -m pipelines.risk.train --run {paths.root} {settings}")  # fmt: skip
    return 0


def search(
    config: Config, paths: RunPaths, dataset: Path, tracking: Tracking, parent: Run, *, trials: int, minutes: float
) -> dict[str, Any]:
    """Run the trials; returns and writes the best settings with every trial's result."""
    trainable = ray.tune.with_parameters(_trial, base=config.model_dump(), dataset=str(dataset.resolve()))
    scheduler = ASHAScheduler(max_t=config.train.epochs, grace_period=1, reduction_factor=3)
    budget_s = max(minutes * 60, 1e-3)  # Tune takes 0 for no limit
    with local_cluster(os.cpu_count() or 1):
        tuner = ray.tune.Tuner(
            ray.tune.with_resources(trainable, {"cpu": 1}),
            param_space={name: sampler(spec) for name, spec in SPACE.items()},
            tune_config=ray.tune.TuneConfig(
                metric=METRIC, mode="max", num_samples=trials, scheduler=scheduler, time_budget_s=budget_s
            ),
            run_config=ray.tune.RunConfig(
                storage_path=str((paths.root / "tune").resolve()), callbacks=[_Children(tracking, parent)], verbose=0
            ),
        )
        results = tuner.fit()
    if all(math.isnan((one.metrics or {}).get(METRIC, math.nan)) for one in results):
        cause = f" The first to fail: {results.errors[0]}." if results.errors else ""
        problem = f"None of {len(results)} trials finished an epoch in --minutes {minutes:g}.{cause}"
        raise DataError(problem, fix="give more --minutes, or fewer rows: data.train_days")
    best = results.get_best_result()
    rows = [{"config": one.config, METRIC: (one.metrics or {}).get(METRIC)} for one in results]
    stage = {"best": best.config, METRIC: best.metrics[METRIC], "trials": len(rows), "results": rows,
             "mlflow_run_id": parent.run_id, "tracking_uri": tracking.shown_uri}  # fmt: skip
    parent.log_metrics({METRIC: stage[METRIC]})
    parent.log_params(best.config)
    write_stage(paths, "tune", stage)
    return stage


def sampler(spec: Mapping[str, Any]) -> Any:
    """A Tune distribution from its description."""
    ((kind, values),) = spec.items()
    return ray.tune.choice(values) if kind == "choice" else getattr(ray.tune, kind)(*values)


def _trial(settings: dict[str, Any], base: dict[str, Any], dataset: str) -> None:
    os.environ.update(QUIET_ENVIRONMENT | worker_environment(1))
    torch.set_num_threads(1)
    config = build_config(base, overrides=settings)
    rows = RiskDataset.load(Path(dataset)).labelled()
    early, late = rows.split_tail(config.train.validation_fraction)
    torch.manual_seed(config.seed)
    model = RiskModel(
        RiskModelConfig(feature_names=rows.feature_names, sequence_len=rows.sequence.shape[1], shape=config.model)
    )
    model.prepare(early.features, early.label)

    def report(record: EpochRecord) -> None:
        score = held_out_precision(model.predict_logits(late.features, late.sequence), late)
        ray.tune.report({METRIC: score, "loss": record.loss, "epoch": record.epoch})

    train_in_process(model, early, Recipe.of(config.train, seed=config.seed), report)


class _Children(ray.tune.Callback):
    """Writes each trial as a child run, from this process: SQLite takes one writer."""

    def __init__(self, tracking: Tracking, parent: Run) -> None:
        self._tracking, self._parent = tracking, parent
        self._runs: dict[str, Run] = {}

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        run = self._tracking.create_run(f"trial {trial.trial_id}", tags={"stage": "tune"}, parent=self._parent.run_id)
        run.log_params(trial.config)
        self._runs[trial.trial_id] = run

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        numbers = {METRIC: result[METRIC], "loss": result["loss"]}
        self._runs[trial.trial_id].log_metrics(numbers, step=result["epoch"])

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._runs[trial.trial_id].finish("FINISHED")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._runs[trial.trial_id].finish("FAILED")


if __name__ == "__main__":
    sys.exit(guarded(main))
