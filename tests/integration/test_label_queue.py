"""The label queue of a run: decisions without a label, each once, in a file that people can work from."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from deepseek_ray.data.prediction_archive import read_predictions
from deepseek_ray.errors import ConfigError
from deepseek_ray.online.ledger import Ledger
from pipelines.risk import label, update
from tests import update_run


def test_the_queue_names_decisions_without_a_label_once(tmp_path: Path) -> None:
    paths, _ = update_run.make_run(tmp_path / "run")
    update_run.serve_days(paths, 0, 10)
    run, out = f"--run={paths.root}", tmp_path / "queue.csv"
    assert label.main([run, "--budget=20", f"--out={out}", "--explore=0.25"]) == 0
    with out.open(newline="") as handle:
        rows = list(csv.DictReader(handle))
    names = [row["prediction_id"] for row in rows]
    logged = read_predictions(paths)
    unlabelled = set(logged.filter(logged["is_fraud"].is_null())["prediction_id"])
    assert len(set(names)) == 20
    assert set(names) <= unlabelled
    assert sorted(row["why"] for row in rows) == ["explore"] * 5 + ["telling"] * 15
    assert update.main([run, f"--set-aside={out}", "--reason=asked for by hand"]) == 0
    assert Ledger(paths.updates).ids_set_aside() == set(names)
    rest = tmp_path / "rest.json"
    assert label.main([run, "--budget=1000", f"--out={rest}"]) == 0
    assert not {row["prediction_id"] for row in json.loads(rest.read_text())} & set(names)


@pytest.mark.parametrize("flags", [["--budget=0"], ["--budget=5", "--explore=2"], ["--budget=5", "--days=0"]])
def test_a_queue_that_makes_no_sense_is_refused(flags: list[str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        label.main([*flags, f"--out={tmp_path / 'queue.csv'}"])
    with pytest.raises(ConfigError, match="csv"):
        label.main(["--budget=5", f"--out={tmp_path / 'queue.txt'}"])
