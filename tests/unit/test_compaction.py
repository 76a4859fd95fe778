"""The log is compacted while the service writes, and a compaction that fails or hangs harms nobody."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from deepseek_ray import child
from deepseek_ray.data import prediction_archive as archive
from deepseek_ray.data.prediction_log import PredictionLog
from deepseek_ray.paths import RunPaths, exclusive
from deepseek_ray.serving import compaction
from deepseek_ray.serving.compaction import Compactor
from tests.unit.test_prediction_log import label, row
from tests.unit.waiting import await_until


@pytest.fixture
def paths(tmp_path: Path) -> RunPaths:
    return RunPaths(tmp_path)


def ignore(last: int) -> None:
    pass


def test_rows_move_while_others_are_written(paths: RunPaths) -> None:
    log = PredictionLog(paths.prediction_log)
    log.commit([row(1), row(2)], [label(2)])
    told: list[int] = []
    compactor = Compactor(paths, 0.05, told.append)
    compactor.start()
    await_until(lambda: 2 in told)
    log.commit([row(3)])
    await_until(lambda: archive.read_manifest(paths.prediction_archive).last("predictions") == 3)
    log.commit([row(4)])
    compactor.close()
    log.drop_vectors(2, limit=10)
    frame = archive.read_predictions(paths)
    assert frame["prediction_id"].to_list() == ["p1", "p2", "p3", "p4"]
    assert archive.stack_values(frame).shape == (4, 2)
    log.close()


def test_none_is_started_where_none_is_wanted(paths: RunPaths) -> None:
    compactor = Compactor(paths, 0.0, ignore)
    compactor.start()
    compactor.close()
    assert list(paths.root.iterdir()) == []


def test_a_failure_is_told_and_the_next_one_tried(paths: RunPaths, caplog: pytest.LogCaptureFixture) -> None:
    program = ["-c", "import sys; open(sys.argv[1] + '/tries', 'a').write('x'); sys.exit('no space')"]
    compaction.logger.addHandler(caplog.handler)
    compactor = Compactor(paths, 0.01, ignore, program=program)
    compactor.start()
    tries = paths.root / "tries"
    await_until(lambda: tries.exists() and len(tries.read_text()) >= 2)
    compactor.close()
    compaction.logger.removeHandler(caplog.handler)
    assert "compaction failed, trying again in 0.01 s: no space" in caplog.text


def test_closing_does_not_wait_for_a_long_one(paths: RunPaths) -> None:
    program = ["-c", "import sys, time; open(sys.argv[1] + '/started', 'w').close(); time.sleep(60)"]
    compactor = Compactor(paths, 0.01, ignore, program=program)
    compactor.start()
    await_until((paths.root / "started").exists)
    start = time.monotonic()
    compactor.close()
    assert time.monotonic() - start < 5
    assert not compactor._thread.is_alive()


def test_one_that_does_not_end_when_asked_is_killed(paths: RunPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child, "_KILL_AFTER_S", 0.1)
    deaf = "import signal, sys, time; signal.signal(15, signal.SIG_IGN); open(sys.argv[1] + '/started', 'w').close()"
    compactor = Compactor(paths, 0.01, ignore, program=["-c", f"{deaf}; time.sleep(60)"])
    compactor.start()
    await_until((paths.root / "started").exists)
    compactor.close(5.0)
    assert not compactor._thread.is_alive()


def test_no_error_ends_the_schedule(paths: RunPaths) -> None:
    told: list[int] = []

    def stumble(last: int) -> None:
        told.append(last)
        raise KeyError(last)

    PredictionLog(paths.prediction_log).close()
    compactor = Compactor(paths, 0.01, stumble, program=["-S", "-c", ""])
    compactor.start()
    await_until(lambda: len(told) >= 2)
    compactor.close()


def test_beside_another_compaction_it_is_one_line(
    paths: RunPaths, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compaction.os, "nice", lambda by: by)
    PredictionLog(paths.prediction_log).close()
    paths.prediction_archive.mkdir()
    with exclusive(paths.prediction_archive, "Another compaction runs.", "wait"):
        assert compaction.main([str(paths.root)]) == 2
    assert capsys.readouterr().err.startswith("error: Another compaction of")
    assert compaction.main([str(paths.root)]) == 0
