"""Compaction loses no row and doubles none, however often it is cut short."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from deepseek_ray import cli
from deepseek_ray.data import prediction_archive as archive
from deepseek_ray.data.prediction_log import PredictionLog
from deepseek_ray.errors import DataError, EnvironmentProblemError
from deepseek_ray.paths import RunPaths, exclusive
from tests.unit.test_prediction_log import label, row


@pytest.fixture
def paths(tmp_path: Path) -> RunPaths:
    return RunPaths(tmp_path)


@pytest.fixture
def log(paths: RunPaths) -> PredictionLog:
    return PredictionLog(paths.prediction_log)


def ids(paths: RunPaths) -> list[str]:
    return archive.read_predictions(paths)["prediction_id"].to_list()


def test_a_run_without_a_log_reads_as_empty(paths: RunPaths) -> None:
    assert archive.compact(paths).parts("predictions") == []
    frame = archive.read_predictions(paths)
    assert (len(frame), frame["is_fraud"].dtype) == (0, pl.Int64())


def test_reading_is_the_same_before_during_and_after(paths: RunPaths, log: PredictionLog) -> None:
    log.commit([row(1), row(2)])
    log.commit(feedback=[label(2)])
    before = archive.read_predictions(paths)
    archive.compact(paths)
    assert archive.read_predictions(paths).equals(before)
    log.commit([row(3)])
    assert ids(paths) == ["p1", "p2", "p3"]
    archive.compact(paths)
    archive.compact(paths)
    assert ids(paths) == ["p1", "p2", "p3"]
    assert archive.read_predictions(paths)["is_fraud"].to_list() == [None, 1, None]
    log.close()


def test_vectors_come_back_as_served(paths: RunPaths, log: PredictionLog) -> None:
    log.commit([row(1), row(2)])
    archive.compact(paths, prune=True)
    frame = archive.read_predictions(paths)
    np.testing.assert_array_equal(archive.stack_values(frame), [[1.0, 1.1], [1.0, 2.1]])
    assert archive.stack_sequences(frame).shape == (2, 2, 6)
    assert "feature_values" not in archive.read_predictions(paths, vectors=False).columns
    log.close()


def test_a_crash_after_a_part_before_the_manifest(
    paths: RunPaths, log: PredictionLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    log.commit([row(1), row(2)])
    with monkeypatch.context() as patch:
        patch.setattr(archive, "_write_manifest", _crash)
        with pytest.raises(KeyboardInterrupt):
            archive.compact(paths)
    assert ids(paths) == ["p1", "p2"]
    log.commit([row(3)])
    archive.compact(paths)
    assert ids(paths) == ["p1", "p2", "p3"]
    assert len(list(paths.prediction_archive.glob("*.parquet"))) == 1
    log.close()


def _crash(*args: object) -> None:
    raise KeyboardInterrupt


def test_a_crash_between_parts_keeps_the_finished_ones(
    paths: RunPaths, log: PredictionLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archive, "PART_ROWS", 2)
    log.commit([row(n) for n in range(1, 6)])
    with monkeypatch.context() as patch:
        written = archive._write_part
        patch.setattr(
            archive,
            "_write_part",
            lambda db, folder, kind, after: _crash() if after else written(db, folder, kind, after),
        )
        with pytest.raises(KeyboardInterrupt):
            archive.compact(paths)
    assert ids(paths) == [f"p{n}" for n in range(1, 6)]
    manifest = archive.compact(paths)
    assert [part.rows for part in manifest.predictions] == [2, 2, 1]
    assert ids(paths) == [f"p{n}" for n in range(1, 6)]
    log.close()


def test_pruned_rows_are_still_known_by_their_transaction(paths: RunPaths, log: PredictionLog) -> None:
    log.commit([row(1)])
    archive.compact(paths, prune=True)
    assert set(log.by_transaction(["t1"])) == {"t1"}
    found = log.get("p1")
    assert found is not None
    assert found.values.size == 0
    log.close()


def test_one_compaction_at_a_time(paths: RunPaths, log: PredictionLog) -> None:
    paths.prediction_archive.mkdir()
    with (
        exclusive(paths.prediction_archive, "", ""),
        pytest.raises(EnvironmentProblemError, match="Another compaction"),
    ):
        archive.compact(paths)
    log.close()


def test_rows_of_two_services_do_not_stack(paths: RunPaths, log: PredictionLog) -> None:
    log.commit([row(1), row(2, values=np.zeros(3))])
    with pytest.raises(DataError, match="several shapes"):
        archive.stack_values(archive.read_predictions(paths))
    log.close()


def test_a_broken_manifest_is_an_error_not_an_empty_archive(paths: RunPaths, log: PredictionLog) -> None:
    log.commit([row(1)])
    archive.compact(paths)
    (paths.prediction_archive / archive.MANIFEST).write_text("{")
    with pytest.raises(DataError, match="manifest"):
        archive.read_predictions(paths)
    log.close()


def test_the_command_moves_the_log_into_parquet(
    paths: RunPaths, log: PredictionLog, capsys: pytest.CaptureFixture[str]
) -> None:
    log.commit([row(1), row(2)])
    log.commit(feedback=[label(2)])
    log.close()
    before = archive.read_predictions(paths)
    assert cli.main(["compact", "--run", str(paths.root), "--prune"]) == 0
    assert capsys.readouterr().out == f"2 predictions and 1 labels in {paths.prediction_archive}\n"
    assert archive.read_predictions(paths).equals(before)
    paths.prediction_log.unlink()
    assert archive.read_predictions(paths).equals(before)
