"""What the serving benchmark makes of its measurements."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.bench.results import append
from tests.bench.serving.figures import Rounds, in_time, kept, row
from tests.bench.serving.load import Trace, bodies


def trace(latency_ms: list[float], status: list[int]) -> Trace:
    """One request each tenth of a second."""
    due = np.arange(len(latency_ms)) / 10
    return Trace(due, np.array(latency_ms), np.array(status), 0.0)


def test_a_window_is_kept_when_its_answers_are_in_time() -> None:
    good, slow = [5.0] * 10, [5.0] * 9 + [80.0]
    assert kept(trace(good + slow, [200] * 20), 50.0, 2) == 0.5
    assert kept(trace(good + slow, [200] * 19 + [503]), 50.0, 2) == 1.0, "what is shed is no answer"
    assert kept(trace(good + slow, [200] * 10 + [503] * 10), 50.0, 2) == 0.5, "a second without an answer"
    assert kept(trace(good, [200] * 10), 50.0, 2) == 0.5, "a second without requests is not kept"


def test_answers_in_time_are_counted() -> None:
    assert in_time(trace([5.0, 80.0, 5.0, 50.0], [200, 200, 503, 201]), 50.0) == 2


def test_ratios_are_taken_within_a_round() -> None:
    rounds = Rounds()
    rounds.rps["fast", 64], rounds.rps["floor", 64] = [50.0, 500.0, 90.0], [100.0, 1_000.0, 100.0]
    assert rounds.ratio("fast", "floor", 64) == 0.5
    assert row("figure", "fast", [1.0, 3.0, 2.0])["value"] == 2.0


def test_each_transaction_is_a_new_one() -> None:
    made = bodies("transaction")
    first, second = json.loads(next(made)), json.loads(next(made))
    assert first["transaction_id"] != second["transaction_id"]
    assert trace([1.0], [500]).failed == 1


def test_rows_of_other_columns_are_not_added_to_a_file(tmp_path: Path) -> None:
    file = tmp_path / "figures.csv"
    append([{"a": 1, "b": 2}], ("a", "b"), file)
    append([{"a": 3, "b": 4}], ("a", "b"), file)
    with pytest.raises(ValueError, match="has the columns"):
        append([{"a": 5, "c": 6}], ("a", "c"), file)
    assert file.read_text(encoding="utf-8").split() == ["a,b", "1,2", "3,4"]


def test_cards_are_drawn_of_as_many_as_are_asked_for() -> None:
    made = bodies("transaction:10")
    seen = [json.loads(next(made)) for _ in range(500)]
    counts = [len({body[name] for body in seen}) for name in ("card_id", "terminal_id", "device_id")]
    assert counts == [10, 2, 10]
