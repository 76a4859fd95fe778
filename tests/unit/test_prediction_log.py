"""What was answered is in the log, once, whatever happens to the process."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from deepseek_ray.data.events import Reason, to_us
from deepseek_ray.data.prediction_log import LoggedFeedback, LoggedPrediction, PredictionLog
from deepseek_ray.errors import DataError, EnvironmentProblemError
from tests.unit.serving_parts import NOW, event


def row(number: int, **changes: object) -> LoggedPrediction:
    base = LoggedPrediction(
        prediction_id=f"p{number}",
        transaction=event(number),
        order_us=to_us(NOW) + number,
        values=np.array([1.0, 0.1 + number]),
        sequence=np.arange(12.0).reshape(2, 6),
        probability=0.25,
        threshold=0.5,
        decision="approve",
        cold=("card",),
        reasons=(Reason(feature="amount", value=1.0, contribution=0.5),),
        model_name="risk",
        model_version="3",
        run_id="r",
        feature_service="risk_v1",
        feature_digest="d",
        latency_ms=1.5,
        logged_us=7,
    )
    return replace(base, **changes)  # type: ignore[arg-type]


def label(number: int, is_fraud: bool = True) -> LoggedFeedback:
    return LoggedFeedback(f"p{number}", is_fraud, 10, 20, 1, 30)


def test_a_row_comes_back_as_it_went_in(tmp_path: Path) -> None:
    log = PredictionLog(tmp_path / "p.db")
    assert log.commit([row(1), row(2)]) == (2, 0)
    found = log.get("p2")
    assert found is not None
    expected = row(2, seq=2)
    np.testing.assert_array_equal(found.values, expected.values)
    np.testing.assert_array_equal(found.sequence, expected.sequence)
    empty = np.empty(0)
    assert replace(found, values=empty, sequence=empty) == replace(expected, values=empty, sequence=empty)
    assert log.get("p9") is None
    assert set(log.by_transaction(["t1", "t2", "t9"])) == {"t1", "t2"}
    assert log.horizon() == (to_us(NOW) + 2, 2)
    log.close()


def test_each_of_many_rows_has_its_own_vectors(tmp_path: Path) -> None:
    log = PredictionLog(tmp_path / "p.db")
    log.commit([row(1)])
    assert log.commit([row(number) for number in range(2, 140)]) == (139, 0)
    for number in (2, 65, 66, 100, 139):
        found = log.get(f"p{number}")
        assert found is not None
        assert (found.seq, found.transaction.transaction_id) == (number, f"t{number}")
        np.testing.assert_array_equal(found.values, row(number).values)
    log.close()


def test_a_batch_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    log = PredictionLog(tmp_path / "p.db")
    log.commit([row(1)])
    with pytest.raises(DataError, match="refused"):
        log.commit([row(2), row(1)])
    assert log.get("p2") is None
    log.close()


def test_a_sequence_of_no_events_keeps_its_shape(tmp_path: Path) -> None:
    log = PredictionLog(tmp_path / "p.db")
    log.commit([row(1, sequence=np.zeros((0, 6)))])
    found = log.get("p1")
    assert found is not None
    assert found.sequence.shape == (0, 0)
    log.close()


def test_labels_are_found_with_their_targets(tmp_path: Path) -> None:
    log = PredictionLog(tmp_path / "p.db")
    log.commit([row(1), row(2)])
    assert log.commit(feedback=[label(2)]) == (0, 1)
    targets = log.label_targets(["p1", "p2", "p3"])
    assert {name: target.is_fraud for name, target in targets.items()} == {"p1": None, "p2": True}
    assert [(seq, target.prediction_id, item.known_us) for seq, target, item in log.labels_after(0)] == [(1, "p2", 20)]
    with pytest.raises(DataError):
        log.commit(feedback=[label(2, False)])
    log.close()


def test_what_the_store_holds_is_noted_with_the_next_batch(tmp_path: Path) -> None:
    log = PredictionLog(tmp_path / "p.db")
    assert log.applied == (0, 0)
    log.commit([row(1), row(2)])
    log.commit([row(3)], applied_predictions=2, applied_feedback=0)
    assert log.applied == (2, 0)
    assert [(seq, item.transaction_id) for seq, item, _ in log.events_after(2)] == [(3, "t3")]
    log.close()


def test_the_last_threshold_of_a_version_counts(tmp_path: Path) -> None:
    log = PredictionLog(tmp_path / "p.db")
    assert log.threshold("1") is None
    log.set_threshold("1", 0.3, 1)
    log.set_threshold("1", 0.4, 2)
    assert log.threshold("1") == 0.4
    log.close()


def test_a_killed_process_takes_no_committed_row_with_it(tmp_path: Path) -> None:
    program = (
        "import os; from pathlib import Path;"
        "from tests.unit.test_prediction_log import row; from deepseek_ray.data.prediction_log import PredictionLog;"
        f"log = PredictionLog(Path({str(tmp_path / 'p.db')!r})); log.commit([row(1), row(2)]); os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", program], timeout=60, check=False).returncode == -9
    log = PredictionLog(tmp_path / "p.db")
    assert set(log.by_transaction(["t1", "t2"])) == {"t1", "t2"}
    log.close()


def test_full_synchronous_is_the_default(tmp_path: Path) -> None:
    log = PredictionLog(tmp_path / "p.db")
    assert log._db.execute("PRAGMA synchronous").fetchone() == (2,)
    assert log._db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    log.close()


def test_a_file_that_is_no_log_is_refused_with_a_fix(tmp_path: Path) -> None:
    path = tmp_path / "p.db"
    path.write_bytes(b"not a database at all, but long enough to be looked at" * 10)
    with pytest.raises(EnvironmentProblemError, match="cannot be used"):
        PredictionLog(path)


def test_a_log_of_another_release_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "p.db"
    db = sqlite3.connect(path)
    db.execute("PRAGMA user_version = 99")
    db.close()
    with pytest.raises(EnvironmentProblemError, match="schema version 99"):
        PredictionLog(path)


def plans(log: PredictionLog, asked: Callable[[], object]) -> list[str]:
    """How SQLite goes about what is asked of a log."""
    queries: list[str] = []
    log._db.set_trace_callback(queries.append)
    asked()
    log._db.set_trace_callback(None)
    steps = [row for query in queries for row in log._db.execute(f"EXPLAIN QUERY PLAN {query}")]
    return [text for *_, text in steps if text.startswith(("SCAN", "SEARCH")) and text != "SCAN CONSTANT ROW"]


def test_what_is_asked_again_and_again_reads_no_whole_table(tmp_path: Path) -> None:
    log = PredictionLog(tmp_path / "p.db")
    log.commit([row(number) for number in range(1, 50)], [label(1), label(2, False)])
    first = to_us(NOW)
    by_order = "USING INDEX predictions_by_order (order_us>? AND order_us<?)"
    assert plans(log, lambda: log.times_of("d", first, first + 9)) == [f"SEARCH predictions {by_order}"]
    assert plans(log, lambda: log.labels_of("d", first, first + 9))[0] == f"SEARCH p {by_order}"
    newest = "SEARCH predictions USING COVERING INDEX predictions_by_order"
    assert plans(log, log.horizon) == [newest, "SEARCH predictions"]
    assert log.labels_of("d", first, first + 9) == {"p1": True, "p2": False}
    assert log.times_of("d", first + 1, first + 4) == {"p2": first + 2, "p3": first + 3}
    log.close()


def test_a_log_of_an_older_release_gets_the_index(tmp_path: Path) -> None:
    path = tmp_path / "p.db"
    log = PredictionLog(path)
    log.commit([row(1), row(2)])
    log.close()
    with closing(sqlite3.connect(path)) as db:
        db.execute("DROP INDEX predictions_by_order")
    reader = PredictionLog(path, read_only=True)  # who only reads makes none, and finds the same
    assert reader.horizon() == (to_us(NOW) + 2, 2)
    reader.close()
    again = PredictionLog(path)
    assert "predictions_by_order" in plans(again, again.horizon)[0]
    assert again.horizon() == (to_us(NOW) + 2, 2)
    again.close()
