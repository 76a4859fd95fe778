"""Drift and quality of a run: finds its champion's baseline and its newest decisions, and lets drift_report judge.

As a program, ``python -m deepseek_ray.online.drift_run RUN VERSION < settings.json``, it prints the report as JSON, or
null where nothing was served yet. The service runs it in a process of its own (serving/drift_watch.py). The registry is
asked and the model loaded only where the version has no baseline yet; else neither MLflow nor torch is imported.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from deepseek_ray.config import Config
from deepseek_ray.data.datasets import RiskDataset
from deepseek_ray.data.events import DAY_US
from deepseek_ray.data.prediction_span import newest_us, read_labelled, read_vectors
from deepseek_ray.data.served import matured_rows
from deepseek_ray.errors import DataError, DeepseekRayError
from deepseek_ray.logs import get_logger
from deepseek_ray.online.baseline import Baseline
from deepseek_ray.online.drift_report import DriftReport, judge_drift
from deepseek_ray.online.quality import matured_span
from deepseek_ray.paths import RunPaths

if TYPE_CHECKING:
    from deepseek_ray.registry import VersionInfo

log = get_logger(__name__)

_NICENESS = 10


def report_on(paths: RunPaths, config: Config, version: str, find: Callable[[str], VersionInfo]) -> DriftReport:
    """Judge the newest decisions of a run.

    Args:
        paths: the run with the log; baselines are kept in ``paths.baselines``.
        config: ``drift``, ``data.label_delay_days`` and ``model_name``.
        version: number of the version that serves.
        find: asks the registry for a version; called where it has no baseline yet.

    Raises:
        DataError: nothing was served yet, or there are no training rows to compare with.
        EnvironmentProblemError: the log cannot be read.
    """
    newest = newest_us(paths)
    if newest is None:
        raise DataError(f"No decision is logged in {str(paths.root)!r}.", fix="serve the run, then ask again")
    baseline = baseline_of(version, paths, config, find)
    bounds = config.drift
    start_us = newest + 1 - round(bounds.window_days * DAY_US)
    live = read_vectors(paths, start_us, newest + 1, bounds.max_rows)
    span = matured_span(newest, config.data.label_delay_days, bounds.quality_days)
    matured = read_labelled(paths, *span, bounds.max_matured_rows)
    return judge_drift(baseline, live, matured, newest, bounds)


def baseline_of(version: str, paths: RunPaths, config: Config, find: Callable[[str], VersionInfo]) -> Baseline:
    """The baseline of a version: kept from before, or measured now, which takes seconds.

    A version trained from scratch is compared with the run's training days and judged on its held-out days; an update
    with the served days that it learned from, and on the matured ones that came after them.

    Raises:
        DataError: the rows that it was trained on are not in the run.
    """
    file = paths.baselines / f"{config.model_name}-{version}.safetensors"
    if file.exists():
        return Baseline.load(file)
    info = find(version)
    train, held_out = _rows(info, paths, config)
    measured = Baseline.measure(version, info.schema.feature_digest, info.load().model, train, held_out)
    try:
        measured.save(file)
    except OSError as error:  # a folder that may only be read: measured again the next time
        log.warning("the baseline of version %s is not kept: %s", version, error)
    return measured


def _rows(info: VersionInfo, paths: RunPaths, config: Config) -> tuple[RiskDataset, RiskDataset | None]:
    """Rows that a version was trained on, and labelled rows from after them."""
    first, last = (_day(info.tags[name]) for name in ("train_start", "train_end"))
    file = paths.datasets / "train.safetensors"
    if file.exists():
        train = _between(RiskDataset.load(file), first, last)
        if len(train):
            return train, _after(RiskDataset.load(paths.datasets / "holdout.safetensors"), last)
    schema, elsewhere = info.schema, _elsewhere(info)
    try:
        served = matured_rows(paths, schema.columns, schema.feature_digest, config.data.label_delay_days)
    except DataError as error:  # none is old enough: the version cannot have learned from them
        raise elsewhere from error
    train = _between(served, first, last)
    if not len(train):
        raise elsewhere
    return train, _after(served, last)


def _elsewhere(info: VersionInfo) -> DataError:
    days = f"{info.tags['train_start']} to {info.tags['train_end']}"
    return DataError(
        f"Version {info.version} was trained on {days}; the run holds no row of these days.",
        fix="name the run that trained it with --run",
    )


def _between(rows: RiskDataset, first: int, last: int) -> RiskDataset:
    return rows.select((rows.day >= first) & (rows.day <= last))


def _after(rows: RiskDataset, last: int) -> RiskDataset:
    return rows.select(rows.day > last)


def _day(text: str) -> int:
    return int(np.datetime64(text, "D").astype(np.int64))


def main(argv: Sequence[str]) -> int:
    """Report on one run and version at a low priority; status 2 with one line when it cannot be done."""
    os.nice(_NICENESS)
    try:
        config, paths = Config.model_validate_json(sys.stdin.read()), RunPaths(Path(argv[0]))
        if newest_us(paths) is None:
            print("null")
            return 0
        report = report_on(paths, config, argv[1], lambda version: _found(paths, config, version))
    except DeepseekRayError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(report.plain()))
    return 0


def _found(paths: RunPaths, config: Config, version: str) -> VersionInfo:
    from deepseek_ray.registry import Registry  # seconds of imports

    return Registry.open(paths, config.stores, name=config.model_name, create=False).get(version)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
