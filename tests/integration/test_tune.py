"""A search that has no time to search says so."""

from __future__ import annotations

from pathlib import Path

import pytest

from deepseek_ray.errors import DataError
from deepseek_ray.paths import RunPaths
from pipelines.risk import tune
from tests.unit.risk_rows import make_rows


@pytest.mark.timeout(300)
@pytest.mark.parametrize("trials", ["1", pytest.param("2", marks=pytest.mark.slow)])
def test_too_little_time_is_named_with_its_fix(tmp_path: Path, trials: str) -> None:
    paths = RunPaths(tmp_path / "run").create()
    make_rows().save(paths.datasets / "train.safetensors")
    arguments = ["--run", str(paths.root), "--preset", "debug", "--trials", trials, "--minutes", "0"]
    with pytest.raises(DataError, match=rf"None of {trials} trials .* in --minutes 0\..*Fix: give more --minutes"):
        tune.main(arguments)
    assert not (paths.results / "tune.json").exists()
