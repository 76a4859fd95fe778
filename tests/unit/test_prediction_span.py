"""A stretch of the log is read in bounds, wherever its rows are: in the log, in the archive, or in both."""

from __future__ import annotations

from pathlib import Path

import pytest

from deepseek_ray.data.events import DAY_US
from deepseek_ray.data.prediction_archive import compact
from deepseek_ray.data.prediction_log import PredictionLog
from deepseek_ray.data.prediction_span import newest_us, read_labelled, read_vectors
from deepseek_ray.errors import EnvironmentProblemError
from deepseek_ray.paths import RunPaths
from tests.unit.drift_rows import live, write_log
from tests.unit.test_served import at_day

START, END = 30 * DAY_US, 31 * DAY_US


@pytest.fixture(params=["log", "archive", "both"])
def paths(request: pytest.FixtureRequest, tmp_path: Path) -> RunPaths:
    """300 decisions of day 30, then one of day 31."""
    made = write_log(tmp_path, live(300))
    if request.param == "archive":
        compact(made, prune=True)
    log = PredictionLog(made.prediction_log)
    log.commit([at_day(1_000, 31.5)])
    log.close()
    return made


def test_a_stretch_of_time_has_its_decisions_with_vectors_and_labels(paths: RunPaths) -> None:
    expected = live(300)
    found, labelled = (read(paths, START, END, 1_000) for read in (read_vectors, read_labelled))
    assert (found.step, labelled.step) == (1, 1)
    assert found.rows["feature_values"].to_list() == expected["feature_values"].to_list()
    assert labelled.rows["is_fraud"].to_list() == expected["is_fraud"].to_list()
    assert labelled.rows["prediction_id"].to_list() == expected["prediction_id"].to_list()
    assert newest_us(paths) == round(31.5 * DAY_US)


def test_of_too_many_decisions_every_kth_is_taken(paths: RunPaths) -> None:
    found = read_labelled(paths, START, END, 100)
    assert (found.step, found.rows.height) == (3, 100)
    assert found.rows["seq"].diff().drop_nulls().unique().to_list() == [3]


def test_a_decision_without_a_label_is_there_with_none(paths: RunPaths) -> None:
    assert read_labelled(paths, END, 40 * DAY_US, 10).rows["is_fraud"].to_list() == [None]


def test_a_run_without_a_log_has_no_newest_decision(tmp_path: Path) -> None:
    assert newest_us(RunPaths(tmp_path)) is None
    PredictionLog(tmp_path / "predictions.db").close()
    assert newest_us(RunPaths(tmp_path)) is None


def test_a_file_that_is_no_log_is_named(tmp_path: Path) -> None:
    (tmp_path / "predictions.db").write_bytes(b"not a database, but long enough to be looked at" * 50)
    with pytest.raises(EnvironmentProblemError, match=r"predictions\.db"):
        newest_us(RunPaths(tmp_path))
