"""The experiments' plots hold what their figures say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from deepseek_ray.report.experiments import PLOTS, SIDES

WEEKS = ("2018-08-08", "2018-08-15")


def delay_result() -> dict[str, object]:
    figures = {"recall_7d": 0.8, "recall_1d": 0.93, "ceiling_7d": 0.82, "ceiling_1d": 0.95}
    return {"weeks": [{"test_start": week, **figures} for week in WEEKS]}


def pattern_result() -> dict[str, object]:
    figures = {f"{side}_{key}": 0.5 for side in SIDES for key in ("new_pattern", "old_patterns")}
    return {"weeks": [{"test_start": week, **figures} for week in WEEKS]}


@pytest.mark.parametrize(
    ("name", "result", "words"),
    [
        ("delay", delay_result(), ["daily, labels after 1 day", "weekly, after 7 days", "ceiling, 7 days"]),
        ("new-pattern", pattern_result(), [words for words, *_ in SIDES.values()]),
    ],
)
def test_a_plot_names_its_series_and_weeks_and_is_the_same_each_time(
    name: str, result: dict[str, object], words: list[str], tmp_path: Path
) -> None:
    first, second = (PLOTS[name](result, tmp_path / file).read_text(encoding="utf-8") for file in ("a.svg", "b.svg"))
    texts = re.findall(r">([^<>]+)</text>", first)
    for text in [*words, *WEEKS]:
        assert text in texts
    assert first == second
