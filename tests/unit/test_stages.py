"""Results of a stage reach the report whole, as JSON that any program reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from deepseek_ray.paths import RunPaths, write_stage


@pytest.fixture
def paths(tmp_path: Path) -> RunPaths:
    return RunPaths(tmp_path / "run")


def read(path: Path) -> Any:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)


def test_a_stage_comes_back_as_it_was_written(paths: RunPaths) -> None:
    stage = {"rows": 3, "share": 0.25, "names": ["a", "b"], "days": [{"day": "2026-01-01", "ap": None}], "ok": True}
    target = write_stage(paths, "train", stage)
    assert target == paths.results / "train.json"
    assert read(target) == stage


def test_what_is_no_number_becomes_null_at_any_depth(paths: RunPaths) -> None:
    stage = {"nan": float("nan"), "deep": [{"x": (float("inf"), 1.5)}, float("-inf")], 7: "a number as key"}
    expected = {"nan": None, "deep": [{"x": [None, 1.5]}, None], "7": "a number as key"}
    assert read(write_stage(paths, "train", stage)) == expected


def test_a_second_writing_replaces_the_first(paths: RunPaths) -> None:
    write_stage(paths, "update", {"promoted": False, "checks": [1]})
    assert read(write_stage(paths, "update", {"promoted": True})) == {"promoted": True}


def test_a_writing_that_fails_leaves_the_former_results(paths: RunPaths) -> None:
    target = write_stage(paths, "update", {"promoted": False})
    with pytest.raises(TypeError, match="not JSON serializable"):
        write_stage(paths, "update", {"promoted": object()})
    assert read(target) == {"promoted": False}
    assert [path.name for path in paths.results.iterdir()] == ["update.json"]
