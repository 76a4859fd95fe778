"""Which rows judge a version: the newest that neither side was trained on, and what the gate then says."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from deepseek_ray.config import Config, DataConfig
from deepseek_ray.data.datasets import RiskDataset
from deepseek_ray.data.events import DAY_US
from deepseek_ray.data.evidence import GateDecision
from deepseek_ray.data.prediction_log import PredictionLog
from deepseek_ray.online.trial import judge, judging_rows
from deepseek_ray.paths import RunPaths
from deepseek_ray.registry import InputSchema
from pipelines.risk import train
from tests.unit.serving_parts import event
from tests.unit.test_prediction_log import label, row

NAMES = ("old_pattern", "new_pattern")
SCHEMA = InputSchema(
    columns=NAMES, sequence_len=2, sequence_channels=6, feature_service="risk_default_v1", feature_digest="d"
)
DATA = DataConfig(label_delay_days=2.0, holdout_days=3)


class Model:
    """Scores a row by one of its features."""

    def __init__(self, column: int) -> None:
        self.column = column

    def predict_proba(self, features: Any, sequence: Any) -> Any:
        return np.clip(features[:, self.column], 0.0, 1.0)


def version(number: str, column: int, train_end: str = "1970-01-02") -> Any:
    """A version that knows one of the patterns."""
    return SimpleNamespace(
        name="risk", version=number, schema=SCHEMA, tags={"train_end": train_end},
        load=lambda: SimpleNamespace(model=Model(column)),
    )  # fmt: skip


KNOWS_OLD, KNOWS_NEW = version("2", 0), version("1", 1, "1970-01-06")


@pytest.fixture
def holdout() -> RiskDataset:
    """Days 2 and 3: fraud is what has the old pattern."""
    label = np.arange(40) % 10 == 0
    features = np.stack([np.where(label, 0.9, 0.01), np.where(label, 0.8, 0.01)], axis=1)
    order_us = 2 * DAY_US + np.arange(40) * DAY_US // 20
    return RiskDataset.build(features, np.zeros((40, 2, 6)), label, order_us, np.arange(40), feature_names=NAMES)


@pytest.fixture
def paths(tmp_path: Path) -> RunPaths:
    """Days 4 to 13 were served, ten decisions each; the first of each day is a fraud of the new pattern."""
    log = PredictionLog(tmp_path / "predictions.db")
    for number in range(100):
        fraud = number % 10 == 0
        served = row(
            number,
            order_us=4 * DAY_US + number * DAY_US // 10,
            transaction=event(number, card=f"c{number}"),
            values=np.array([0.02 - 0.02 * fraud, 0.01 + 0.9 * fraud]),
        )
        log.commit([served], [label(number)] if fraud else [])
    log.close()
    return RunPaths(tmp_path)


def days(rows: RiskDataset) -> list[int]:
    return np.unique(rows.day).tolist()


def test_the_newest_matured_days_judge(paths: RunPaths, holdout: RiskDataset) -> None:
    rows = judging_rows(paths, KNOWS_NEW, SCHEMA, "1970-01-02", holdout, DATA)
    assert days(rows) == [8, 9, 10]  # day 13 is not over, and labels take two days
    assert rows.label.sum() == 3


@pytest.mark.parametrize(
    ("champion_end", "challenger_end"), [("1970-01-10", "1970-01-02"), ("1970-01-02", "1970-01-10")]
)
def test_days_that_trained_either_side_do_not_judge(
    paths: RunPaths, holdout: RiskDataset, champion_end: str, challenger_end: str
) -> None:
    champion = version("1", 1, champion_end)
    assert days(judging_rows(paths, champion, SCHEMA, challenger_end, holdout, DATA)) == [10]


def test_without_newer_rows_the_held_out_days_judge(paths: RunPaths, holdout: RiskDataset, tmp_path: Path) -> None:
    def chosen(
        run: RunPaths, champion: Any, train_end: str = "1970-01-02", schema: InputSchema = SCHEMA
    ) -> RiskDataset:
        return judging_rows(run, champion, schema, train_end, holdout, DATA)

    assert chosen(paths, None) is holdout  # the first version
    assert chosen(RunPaths(tmp_path / "new"), KNOWS_NEW) is holdout  # nothing was served
    assert chosen(paths, KNOWS_NEW, "1970-01-11") is holdout  # everything trained one of them
    other = InputSchema(**{**vars(SCHEMA), "feature_digest": "other"})
    assert chosen(paths, KNOWS_NEW, schema=other) is holdout


def test_a_retrain_that_misses_the_new_pattern_does_not_pass_by_the_old_days(
    paths: RunPaths, holdout: RiskDataset
) -> None:
    bounds = Config().gate.model_copy(update={"max_calibration_error": 1.0, "max_p99_ms": 1_000.0})
    assert judge(KNOWS_NEW, KNOWS_OLD, holdout, holdout, bounds).promote
    rows = judging_rows(paths, KNOWS_NEW, SCHEMA, "1970-01-02", holdout, DATA)
    decision = judge(KNOWS_NEW, KNOWS_OLD, rows, holdout, bounds)
    assert [check.name for check in decision.failed] == ["average_precision"]
    assert decision.evidence["champion"]["old_average_precision"] == 1.0


def test_training_again_in_a_run_that_was_updated_asks_the_served_days(
    paths: RunPaths, holdout: RiskDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    offered: list[GateDecision] = []
    registry = SimpleNamespace(
        tracking=SimpleNamespace(paths=paths), get=lambda alias: KNOWS_NEW, version_of=lambda alias: "1",
        register=lambda *args, **options: KNOWS_OLD, offer=lambda number, decision: offered.append(decision) or "no",
    )  # fmt: skip
    model = SimpleNamespace(config=None, predict_proba=Model(0).predict_proba)
    monkeypatch.setattr(train.models, "load", lambda folder: model)
    monkeypatch.setattr(train.InputSchema, "of", lambda config: SCHEMA)
    monkeypatch.setattr(train.Probes, "of", lambda *args: None)
    stage = {"data_digest": "d", "git_commit": "c", "train_from": "1970-01-01", "train_to": "1970-01-02"}
    fitted, run = SimpleNamespace(model_dir=Path("m")), SimpleNamespace(run_id="r")
    train._register(*cast(Any, (registry, run, fitted, holdout, stage, Config(data=DATA))))
    assert "average_precision" in [check.name for check in offered[0].failed]
