"""A small run that can be updated: a champion that knows one pattern, and a log of decisions about another.

As a program it updates the run and dies, without warning, right after a step: ``python -m tests.update_run RUN STEP``.
"""

from __future__ import annotations

import functools
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from deepseek_ray import settings
from deepseek_ray.config import Config, build_config
from deepseek_ray.data.datasets import RiskDataset
from deepseek_ray.data.events import DAY_US
from deepseek_ray.data.prediction_log import LoggedFeedback, PredictionLog
from deepseek_ray.models import RiskModel
from deepseek_ray.online import cycle
from deepseek_ray.online.ledger import Ledger
from deepseek_ray.paths import RunPaths
from deepseek_ray.registry import CHAMPION, InputSchema, Lineage, Registry, TrafficBook
from deepseek_ray.serving.release_desk import ReleaseDesk
from tests.served_run import promote
from tests.unit.serving_parts import event
from tests.unit.test_prediction_log import row
from tests.unit.update_parts import NEW_TEST, OLD, OLD_TEST, SHAPE, TRAIN, make_rows, train_on

FIRST_SERVED_DAY = 60
ROWS_A_DAY = 40
SETTINGS: dict[str, Any] = {
    "data": {"label_delay_days": 2.0},
    "train": TRAIN.model_dump(),
    "update": {"epochs": 4, "lr": 5e-3, "replay_fraction": 0.5, "min_labels": 20, "memory_rows": 400},
    "gate": {
        "max_calibration_error": 1.0, "max_p99_ms": 1_000.0, "max_forgetting": 0.1, "max_cp100_drop": 1.0,
        "max_average_precision_drop": 0.05, "max_label_shift": 2.0,
    },
}  # fmt: skip


def make_config(**changes: Any) -> Config:
    """Settings of the run; ``changes`` by dotted name."""
    return build_config(SETTINGS, overrides=changes)


@functools.cache
def old_season_model() -> RiskModel:
    """A model that knows the old season; trained once a process."""
    return train_on(OLD, NEW_TEST, SHAPE, epochs=6, feature_service="risk_default_v1", feature_digest="d")


def make_run(folder: Path) -> tuple[RunPaths, Registry]:
    """Version 1, which knows the old season, is champion; the log is empty."""
    paths, model = RunPaths(folder).create(), old_season_model()
    settings.store(paths, make_config())
    OLD.save(paths.datasets / "train.safetensors")
    OLD_TEST.save(paths.datasets / "holdout.safetensors")
    registry = Registry.open(paths)
    end = str(np.datetime64(int(OLD.day.max()), "D"))
    lineage = Lineage(data_digest=OLD.digest, git_commit="c", train_start="1970-01-01", train_end=end)
    with registry.tracking.start_run("train") as run:
        info = registry.register(
            model.save_pretrained(paths.root / "model"), run.run_id, InputSchema.of(model.config), lineage,
            tags={"threshold": "0.4"},
        )  # fmt: skip
    promote(registry, info.version)
    return paths, registry


def serve_days(
    paths: RunPaths,
    first: int,
    count: int,
    *,
    rows: RiskDataset | None = None,
    wrong: Callable[[int], bool] | None = None,
) -> None:
    """Log decisions of the new season, and the labels of all but every fifth genuine one.

    Args:
        first: day after the first served one.
        count: days.
        rows: instead of the new season's.
        wrong: which decisions get the wrong label, by number.
    """
    rows = rows or make_rows(100 + first, count * ROWS_A_DAY, new=True)
    log = PredictionLog(paths.prediction_log, synchronous="NORMAL")
    predictions, labels = [], []
    for number in range(count * ROWS_A_DAY):
        name = first * ROWS_A_DAY + number
        order_us = (FIRST_SERVED_DAY + first) * DAY_US + number * DAY_US // ROWS_A_DAY
        fraud = bool(rows.label[number]) != bool(wrong and wrong(number))
        transaction = event(name, card=f"c{name}")
        values, sequence = rows.features[number].astype(np.float64), rows.sequence[number].astype(np.float64)
        predictions.append(row(name, transaction=transaction, order_us=order_us, values=values, sequence=sequence))
        if fraud or name % 5:
            labels.append(LoggedFeedback(f"p{name}", fraud, order_us, order_us, name, order_us))
    log.commit(predictions, labels)
    log.close()


def late_label(paths: RunPaths, number: int, *, is_fraud: bool) -> None:
    """Log a label that comes after the delay."""
    log = PredictionLog(paths.prediction_log, synchronous="NORMAL")
    log.commit([], [LoggedFeedback(f"p{number}", is_fraud, 1, 1, number, 1)])
    log.close()


STEPS: dict[str, tuple[Any, str]] = {
    "trained": (cycle, "train"),
    "registered": (cycle, "register"),
    "noted": (Ledger, "write"),
    "crowned": (Registry, "_crown"),
    "promoted": (Registry, "offer"),
    "kept": (cycle, "keep"),
    "admitted": (TrafficBook, "admit"),
}


def main(run: str, step: str) -> None:
    """Update and die after the step."""
    owner, name = STEPS[step]
    real = getattr(owner, name)

    def last(*args: Any, **options: Any) -> None:
        real(*args, **options)
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(owner, name, last)
    torch.set_num_threads(1)
    paths = RunPaths(Path(run))
    registry = Registry.open(paths, create=False)
    assert registry.version_of(CHAMPION)
    config = make_config()
    cycle.update(config, paths, registry, route=ReleaseDesk(registry, config) if step == "admitted" else None)


if __name__ == "__main__":
    main(*sys.argv[1:])
