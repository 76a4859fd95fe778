"""A run's report: the baseline comes from the rows of the version, once; the decisions come from the log."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import polars as pl
import pytest

from deepseek_ray.config import Config
from deepseek_ray.data.events import DAY_US
from deepseek_ray.errors import DataError
from deepseek_ray.online import drift_run
from deepseek_ray.online.drift_run import baseline_of, report_on
from deepseek_ray.paths import RunPaths
from tests.unit.drift_rows import DIGEST, NAMES, VERSION, FirstFeature, live, training_rows, write_log

CONFIG = Config.model_validate({"data": {"label_delay_days": 0.0}, "drift": {"min_rows": 200}})


@dataclass
class Finder:
    """A registry with one version; counts how often it is asked."""

    first: int
    last: int
    asked: list[str] = field(default_factory=list)

    def __call__(self, version: str) -> Any:
        self.asked.append(version)
        tags = {"train_start": str(np.datetime64(self.first, "D")), "train_end": str(np.datetime64(self.last, "D"))}
        schema = SimpleNamespace(columns=NAMES, feature_digest=DIGEST)
        package = SimpleNamespace(model=FirstFeature())
        return SimpleNamespace(version=version, tags=tags, schema=schema, load=lambda: package)


@pytest.fixture
def paths(tmp_path: Path) -> RunPaths:
    """Training days 0-9, held-out days 10-19, then a day of decisions and the first moment of the next."""
    made = write_log(tmp_path, live(600))
    training_rows().save(made.datasets / "train.safetensors")
    training_rows(first_day=10, seed=1).save(made.datasets / "holdout.safetensors")
    return made


def at_day(day: int) -> pl.DataFrame:
    """The first decision of a day."""
    return live(1, seed=9).with_columns(order_us=pl.lit(day * DAY_US))


def test_a_report_is_made_from_the_run_and_the_registry_is_asked_once(paths: RunPaths) -> None:
    find = Finder(0, 9)
    report = report_on(paths, CONFIG, VERSION, find)
    assert (report.version, report.decisions, report.held_out["rows"]) == (VERSION, 600, 2_000)
    assert [check.name for check in report.checks][:2] == ["feature_drift", "score_drift"]
    assert report_on(paths, CONFIG, VERSION, find) == report
    assert find.asked == [VERSION]


def test_decisions_of_whole_days_older_than_the_delay_are_judged(paths: RunPaths) -> None:
    find = Finder(0, 9)
    assert report_on(paths, CONFIG, VERSION, find).quality is None  # their day is not over
    write_log(paths.root, at_day(31))
    report = report_on(paths, CONFIG, VERSION, find)
    assert report.quality is not None
    assert report.quality.decisions == 600
    late = CONFIG.model_copy(update={"data": CONFIG.data.model_copy(update={"label_delay_days": 2.0})})
    assert report_on(paths, late, VERSION, find).quality is None


def test_an_update_is_compared_with_the_served_days_that_it_learned_from(tmp_path: Path) -> None:
    paths = write_log(tmp_path, live(600))
    write_log(tmp_path, live(600, seed=8).with_columns(order_us=31 * DAY_US + pl.col("seq")))
    write_log(tmp_path, at_day(32))
    training_rows().save(paths.datasets / "train.safetensors")
    found = baseline_of(VERSION, paths, CONFIG, Finder(30, 30))
    assert found.held_out is not None
    assert found.held_out.rows == 600


def test_a_version_whose_rows_are_elsewhere_is_told(paths: RunPaths) -> None:
    write_log(paths.root, at_day(32))
    with pytest.raises(DataError, match=r"trained on 1970-04-11 to 1970-04-20.*--run"):
        baseline_of("7", paths, CONFIG, Finder(100, 109))


def test_a_run_that_served_nothing_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="No decision is logged"):
        report_on(RunPaths(tmp_path), CONFIG, VERSION, Finder(0, 9))


def test_the_program_prints_the_report(
    paths: RunPaths, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(drift_run.os, "nice", lambda _: 0)
    monkeypatch.setattr(drift_run, "_found", lambda paths, config, version: Finder(0, 9)(version))
    monkeypatch.setattr("sys.stdin", io.StringIO(CONFIG.model_dump_json()))
    assert drift_run.main([str(paths.root), VERSION]) == 0
    assert json.loads(capsys.readouterr().out)["decisions"] == 600


def test_the_program_has_nothing_to_say_before_the_first_decision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(drift_run.os, "nice", lambda _: 0)
    monkeypatch.setattr("sys.stdin", io.StringIO(CONFIG.model_dump_json()))
    assert drift_run.main([str(tmp_path), VERSION]) == 0
    assert json.loads(capsys.readouterr().out) is None
