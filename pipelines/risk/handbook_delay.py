"""What label delay costs: weekly retraining on late labels against daily increments on early ones, on the same rows.

Run by ``python -m pipelines.risk.handbook --experiment delay``. Both sides score every payment of the test weeks, each
with terminal and card features whose labels respect its own delay. Before each week, the weekly side trains a new
model on the ``--history-days`` whose labels it knows by then. The daily side trains once before the first week; on
each morning it goes on with the one day whose labels have become known.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepseek_ray import metrics
from deepseek_ray.config import Config
from deepseek_ray.data import handbook, protocol
from deepseek_ray.data.datasets import RiskDataset
from deepseek_ray.logs import get_logger
from deepseek_ray.online.replay import Reservoir
from deepseek_ray.online.updater import remember
from deepseek_ray.online.walk import Effort, Incremental, Retrained, date_of, days, newest_known

FPR = 0.01
LATE_DAYS, EARLY_DAYS = 7, 1
WEEK = 7
log = get_logger("pipelines.risk.handbook")

Scores = NDArray[np.float64]


def run(options: argparse.Namespace, config: Config) -> dict[str, Any]:
    """Both sides, week by week.

    Raises:
        DataError: the data hold no day of a test week or of a history.
    """
    first = protocol.day_number(options.test_start)
    late, late_ceiling = _rows(options, config, LATE_DAYS, first)
    late_score, late_effort = _weekly(late, first, options, config)
    test = days(late, first, first + WEEK * options.weeks - 1)
    del late  # a gigabyte, before the other side computes its own
    early, early_ceiling = _rows(options, config, EARLY_DAYS, first)
    early_score, early_effort = _daily(early, first, options, config)
    ceilings, scores = (late_ceiling, early_ceiling), (late_score, early_score)
    weeks = [_week(test, first + WEEK * number, scores, ceilings) for number in range(options.weeks)]
    return _summary(weeks) | {
        "test_start": str(options.test_start), "history_days": options.history_days, "weeks": weeks,
        "effort_7d": vars(late_effort), "effort_1d": vars(early_effort),
    }  # fmt: skip


def show(result: dict[str, Any]) -> Iterator[str]:
    """Lines of a table."""
    yield "recall at 1 % false positives; its ceiling; false positives at the weekly model's recall"
    yield f"{'week':12}{'7 days':>8}{'ceiling':>9}{'1 day':>8}{'ceiling':>9}{'weekly':>8}{'daily':>8}"
    mean = result | {"test_start": "all"}
    for row in [*result["weeks"], mean]:
        yield (
            f"{row['test_start']:12}{row['recall_7d']:8.3f}{row['ceiling_7d']:9.3f}{row['recall_1d']:8.3f}"
            f"{row['ceiling_1d']:9.3f}{row['false_positives_7d']:8d}{row['false_positives_1d']:8d}"
        )
    yield (
        f"of the ceiling: {result['of_ceiling_7d']:.3f} weekly, {result['of_ceiling_1d']:.3f} daily; "
        f"change of false positives {result['false_positive_change']:+.1%}"
    )


def _rows(options: argparse.Namespace, config: Config, delay: int, first: int) -> tuple[RiskDataset, Scores]:
    """All rows from the first day of history to the last test day, and what is knowable of the test rows."""
    table = handbook.read(options.data, label_delay_days=delay)
    day, last = protocol.day_numbers(table), first + WEEK * options.weeks - 1
    wanted = np.flatnonzero((day > newest_known(first, delay) - options.history_days) & (day <= last))
    (rows,) = protocol.datasets(
        table, config.features.vector, [wanted], delay_days=delay, sequence_len=config.features.sequence_len
    )
    test = np.flatnonzero((day >= first) & (day <= last))
    return rows, protocol.knowable(table, test, delay_days=delay)


def _weekly(rows: RiskDataset, first: int, options: argparse.Namespace, config: Config) -> tuple[Scores, Effort]:
    learner, scores = Retrained(config), []
    for start in range(first, first + WEEK * options.weeks, WEEK):
        known = newest_known(start, LATE_DAYS)
        learner.learn(days(rows, known - options.history_days + 1, known))
        scores.append(learner.score(days(rows, start, start + WEEK - 1)))
        log.info("weekly: scored the week from %s, %.0f s of training so far", date_of(start), learner.effort.seconds)
    return np.concatenate(scores), learner.effort


def _daily(rows: RiskDataset, first: int, options: argparse.Namespace, config: Config) -> tuple[Scores, Effort]:
    known = newest_known(first, EARLY_DAYS)
    history = days(rows, known - options.history_days + 1, known)
    start, memory, scores = Retrained(config), Reservoir(config.update.memory_rows, config.seed), []
    start.learn(history)
    remember(memory, history)
    with tempfile.TemporaryDirectory() as folder:
        learner = Incremental(start.fitted, memory, config, Path(folder))
        for today in range(first, first + WEEK * options.weeks):
            if today > first:
                new = newest_known(today, EARLY_DAYS)
                learner.learn(days(rows, new, new))
            scores.append(learner.score(days(rows, today, today)))
            log.info("daily: scored %s, %.0f s of increments so far", date_of(today), learner.effort.seconds)
    return np.concatenate(scores), start.effort + learner.effort


def _week(test: RiskDataset, start: int, scores: tuple[Scores, ...], ceilings: tuple[Scores, ...]) -> dict[str, Any]:
    part = (test.day >= start) & (test.day < start + WEEK)
    label, (late, early) = test.label[part], (score[part] for score in scores)
    recall = [metrics.recall_at_fpr(label, score, FPR) for score in (late, early)]
    ceiling = [metrics.recall_at_fpr(label, score[part], FPR) for score in ceilings]
    return {
        "test_start": str(date_of(start)), "rows": int(part.sum()), "frauds": int(label.sum()),
        "recall_7d": recall[0], "recall_1d": recall[1], "ceiling_7d": ceiling[0], "ceiling_1d": ceiling[1],
        "false_positives_7d": metrics.false_positives_at_recall(label, late, recall[0]),
        "false_positives_1d": metrics.false_positives_at_recall(label, early, recall[0]),
        "average_precision_7d": metrics.average_precision(label, late),
        "average_precision_1d": metrics.average_precision(label, early),
    }  # fmt: skip


def _summary(weeks: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over the weeks; false positives of all of them."""
    names = [name for name in weeks[0] if name.startswith(("recall", "ceiling", "average_precision"))]
    mean = {name: float(np.mean([week[name] for week in weeks])) for name in names}
    late, early = (sum(week[f"false_positives_{side}"] for week in weeks) for side in ("7d", "1d"))
    return mean | {
        "of_ceiling_7d": mean["recall_7d"] / mean["ceiling_7d"],
        "of_ceiling_1d": mean["recall_1d"] / mean["ceiling_1d"],
        "false_positives_7d": late,
        "false_positives_1d": early,
        "false_positive_change": (early - late) / late if late else float("nan"),
    }
