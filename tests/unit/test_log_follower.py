"""Rows of the log, each once, from a moment on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from deepseek_ray.data import log_follower
from deepseek_ray.data.log_follower import LogFollower
from deepseek_ray.data.prediction_log import LoggedFeedback, PredictionLog
from deepseek_ray.errors import EnvironmentProblemError
from tests.unit.test_prediction_log import row


def label(number: int, at_us: int) -> LoggedFeedback:
    return LoggedFeedback(f"p{number}", True, at_us, at_us, 0, at_us)


def test_new_rows_come_once_and_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_follower, "CHUNK", 2)
    log = PredictionLog(tmp_path / "log.db")
    log.commit([replace(row(n), logged_us=n * 100) for n in range(1, 8)], [label(1, 800), label(6, 810)])
    follower = LogFollower(log.path, since_us=300)
    assert [[one.prediction_id for one in rows] for rows in follower.decisions()] == [
        ["p3", "p4"],
        ["p5", "p6"],
        ["p7"],
    ]
    assert [one.decided.prediction_id for rows in follower.labels() for one in rows] == ["p6"]
    assert (list(follower.decisions()), list(follower.labels())) == ([], [])
    log.commit([replace(row(8), logged_us=900)], [label(7, 910)])
    assert [one.prediction_id for rows in follower.decisions() for one in rows] == ["p8"]
    [[seen]] = follower.labels()
    assert (seen.decided.prediction_id, seen.is_fraud) == ("p7", True)
    log.close()


@pytest.mark.parametrize(("since_us", "first"), [(0, "p1"), (100, "p1"), (101, "p2"), (200, "p2"), (201, None)])
def test_the_moment_is_found_by_row_number(tmp_path: Path, since_us: int, first: str | None) -> None:
    log = PredictionLog(tmp_path / "log.db")
    log.commit([replace(row(n), logged_us=n * 100) for n in (1, 2)])
    found = [one.prediction_id for rows in LogFollower(log.path, since_us).decisions() for one in rows]
    assert next(iter(found), None) == first
    log.close()


def test_a_log_that_is_not_there_is_said_plainly(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentProblemError, match="cannot be followed"):
        list(LogFollower(tmp_path / "none.db", 0).decisions())
