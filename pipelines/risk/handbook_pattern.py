"""A fraud pattern that nobody has seen: increments against a full retrain, plain fine-tuning and a frozen model.

Run by ``python -m pipelines.risk.handbook --experiment new-pattern``. On the published days, ``--pattern`` begins on
``--test-start`` beside the published frauds. Weekly, each side learns from the labels known by then and scores the
week to come. The newest known week before the pattern trains nobody: it shows what is forgotten of the old patterns.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from deepseek_ray import metrics
from deepseek_ray.config import Config
from deepseek_ray.data import attacks, handbook, protocol
from deepseek_ray.data.datasets import RiskDataset
from deepseek_ray.data.fraud_patterns import drift_preset
from deepseek_ray.errors import ConfigError
from deepseek_ray.logs import get_logger
from deepseek_ray.online.replay import Reservoir
from deepseek_ray.online.updater import remember
from deepseek_ray.online.walk import Frozen, Incremental, Learner, Retrained, date_of, days, newest_known
from deepseek_ray.report.experiments import SIDES

PARTS = ("average_precision", "new_pattern", "old_patterns")
WEEK = 7
log = get_logger("pipelines.risk.handbook")


@dataclass(frozen=True)
class Material:
    """Rows of the experiment: all of them, the held-out week before the pattern, the pattern's first day and code."""

    rows: RiskDataset
    held_out: RiskDataset
    first: int
    scenario: int


def run(options: argparse.Namespace, config: Config) -> dict[str, Any]:
    """Every side, week by week; the first week, before any label of the pattern, is the same for all.

    Raises:
        ConfigError, DataError: fewer than two weeks; the data hold no day of a test week or of the history.
    """
    if options.weeks < 2:
        raise ConfigError(f"--weeks {options.weeks} leaves no week to learn the pattern in.", fix="give 2 or more")
    material = _material(options, config)
    champion = Retrained(config)
    champion.learn(_history(material, newest_known(material.first, options.delay_days), options))
    with tempfile.TemporaryDirectory() as folder:
        sides = _sides(champion, material, options, config, Path(folder))
        weeks = [_week(sides, material, number, options) for number in range(options.weeks)]
        held_out = {name: side.score(material.held_out) for name, side in sides.items()}
    old = {name: metrics.average_precision(material.held_out.label, score) for name, score in held_out.items()}
    given = {name: getattr(options, name) for name in ("pattern", "delay_days", "history_days")}
    return {**_summary(weeks[1:], old, sides), **given, "test_start": str(options.test_start), "weeks": weeks}


def show(result: dict[str, Any]) -> Iterator[str]:
    """Lines of a table."""
    yield f"pattern {result['pattern']} from {result['test_start']}, label delay {result['delay_days']} days, weekly"
    columns = ("all patterns", "new pattern", "old patterns", "forgetting", "week before", "samples", "seconds")
    yield f"{'average precision':20}" + "".join(f"{column:>14}" for column in columns)
    for name, (words, *_) in SIDES.items():
        own = {key.removeprefix(f"{name}_"): value for key, value in result.items() if key.startswith(f"{name}_")}
        cells = "".join(f"{own[key]:14.4f}" for key in PARTS)
        cells += f"{own['forgetting']:14.2%}{own['forgetting_held_out']:14.2%}"
        yield f"{words:20}{cells}{own['samples']:14d}{own['seconds']:14.1f}"
    yield (
        f"incremental / full retrain: average precision {result['of_full_retrain']:.4f}, "
        f"samples {result['compute_share']:.1%}, seconds {result['seconds_share']:.1%}"
    )


def _material(options: argparse.Namespace, config: Config) -> Material:
    (pattern,), delay = drift_preset(options.pattern), options.delay_days
    first = protocol.day_number(options.test_start)
    table = handbook.read(options.data, label_delay_days=delay)
    table = attacks.inject(table, pattern, first_day=first, label_delay_days=delay, seed=config.seed)
    day, held_out_end = protocol.day_numbers(table), newest_known(first, delay)
    begin = held_out_end - WEEK - options.history_days + 1
    wanted = np.flatnonzero((day >= begin) & (day < first + WEEK * options.weeks))
    (rows,) = protocol.datasets(
        table, config.features.vector, [wanted], delay_days=delay, sequence_len=config.features.sequence_len
    )
    return Material(rows, days(rows, held_out_end - WEEK + 1, held_out_end), first, pattern.scenario)


def _history(material: Material, known: int, options: argparse.Namespace) -> RiskDataset:
    """The newest ``history_days`` known days, and the held-out week taken out of them."""
    rows = days(material.rows, known - WEEK - options.history_days + 1, known)
    held_out = material.held_out.day
    return rows.select((rows.day < held_out.min()) | (rows.day > held_out.max()))


def _sides(
    champion: Retrained, material: Material, options: argparse.Namespace, config: Config, folder: Path
) -> dict[str, Learner]:
    memory = Reservoir(config.update.memory_rows, config.seed)
    remember(memory, _history(material, newest_known(material.first, options.delay_days), options))
    nothing, start = Reservoir(1, config.seed), champion.fitted
    return {
        "incremental": Incremental(start, memory, config, folder / "incremental"),
        "full_retrain": Retrained(config, start),
        "naive": Incremental(start, nothing, config, folder / "naive", remembers=False),
        "frozen": Frozen(start),
    }


def _week(sides: Mapping[str, Learner], material: Material, number: int, options: argparse.Namespace) -> dict[str, Any]:
    """Learn what has become known since the week before, then score a week."""
    start = material.first + WEEK * number
    if number:
        known = newest_known(start, options.delay_days)
        new, history = days(material.rows, known - WEEK + 1, known), _history(material, known, options)
        for name, side in sides.items():
            side.learn(history if name == "full_retrain" else new)
            log.info("%s: learnt for the week from %s, %.0f s so far", name, date_of(start), side.effort.seconds)
    test = days(material.rows, start, start + WEEK - 1)
    result: dict[str, Any] = {"test_start": str(date_of(start)), "rows": len(test), "frauds": int(test.label.sum())}
    new_frauds = test.scenario == material.scenario
    parts = (np.ones(len(test), dtype=bool), (test.label == 0) | new_frauds, ~new_frauds)
    for name, side in sides.items():
        score = side.score(test)
        for key, part in zip(PARTS, parts, strict=True):
            result[f"{name}_{key}"] = metrics.average_precision(test.label[part], score[part])
    return result


def _summary(weeks: list[dict[str, Any]], old: Mapping[str, float], sides: Mapping[str, Learner]) -> dict[str, Any]:
    """Means over the weeks; forgetting is relative to the frozen model, here and on the week before the pattern."""
    names = [f"{name}_{key}" for name in sides for key in PARTS]
    result: dict[str, Any] = {name: float(np.mean([week[name] for week in weeks])) for name in names}
    for name, side in sides.items():
        result[f"{name}_forgetting"] = 1 - result[f"{name}_old_patterns"] / result["frozen_old_patterns"]
        result |= {f"{name}_held_out": old[name], f"{name}_forgetting_held_out": 1 - old[name] / old["frozen"]}
        result |= {f"{name}_{key}": value for key, value in vars(side.effort).items()}
    own, full = sides["incremental"].effort, sides["full_retrain"].effort
    return result | {
        "of_full_retrain": result["incremental_average_precision"] / result["full_retrain_average_precision"],
        "forgetting": result["incremental_forgetting"],
        "compute_share": own.samples / full.samples, "seconds_share": own.seconds / full.seconds,
    }  # fmt: skip
