"""The table and the figure of a report on drift."""

from __future__ import annotations

from pathlib import Path

import pytest

from deepseek_ray.errors import EnvironmentProblemError
from deepseek_ray.report.drift_view import plot, table
from tests.unit.drift_rows import live
from tests.unit.test_drift_report import judged


def test_the_most_moved_feature_stands_first_below_the_checks() -> None:
    lines = list(table(judged(live(factor=4.0)).plain(), limit=1))
    assert lines[0] == "version 3, 1500 decisions to 1970-02-01 00:00 UTC"
    assert lines[1].split()[:2] == ["FAIL", "feature_drift"]
    at = next(number for number, line in enumerate(lines) if "PSI" in line)
    assert [line.split()[0] for line in lines[at + 1 : at + 3]] == ["score", "amount"]
    assert lines[at + 3].startswith("1 features that moved less")
    assert any(line.split()[:1] == ["average_precision"] for line in lines)


def test_too_few_decisions_are_told() -> None:
    lines = list(table(judged(live(10), live(10)).plain(), limit=5))
    assert "  too few decisions to judge anything" in lines


@pytest.mark.parametrize("rows", [10, 1_500])
def test_the_figure_is_drawn(tmp_path: Path, rows: int) -> None:
    file = plot(judged(live(rows), live(rows)).plain(), tmp_path / "drift.png")
    assert file.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", ["drift.nonsense", "missing/drift.png"])
def test_a_figure_that_cannot_be_written_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(EnvironmentProblemError, match="drift"):
        plot(judged(live()).plain(), tmp_path / name)
