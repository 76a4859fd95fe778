"""The service's own reports on drift: made beside it, shown as gauges, told in the log when a bound is passed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from deepseek_ray.config import Config
from deepseek_ray.data.events import DAY_US
from deepseek_ray.online.drift_report import judge_drift
from deepseek_ray.paths import RunPaths
from deepseek_ray.serving import drift_watch
from deepseek_ray.serving.drift_watch import PROGRAM, DriftWatch
from deepseek_ray.serving.monitor import Monitor
from tests.unit.drift_rows import VERSION, baseline, live, span, write_log
from tests.unit.waiting import await_until

CONFIG = Config.model_validate({"drift": {"min_rows": 200}, "serving": {"drift_every_s": 0.02}})


@pytest.fixture
def monitor() -> Monitor:
    return Monitor()


def value(monitor: Monitor, name: str, **labels: str) -> float | None:
    return monitor.registry.get_sample_value(f"deepseek_ray_{name}", labels)


def report(factor: float = 1.0) -> dict[str, object]:
    return judge_drift(baseline(), span(live(factor=factor)), span(live()), 31 * DAY_US, CONFIG.drift).plain()


def make_watch(paths: Path, monitor: Monitor, *program: str) -> DriftWatch:
    settings = CONFIG.model_dump()
    return DriftWatch(RunPaths(paths), settings, lambda: VERSION, monitor.drift, program=program or PROGRAM)


def test_a_report_is_shown(monitor: Monitor) -> None:
    monitor.drift.show(report(factor=4.0), 12.0)
    assert (value(monitor, "feature_drift", feature="amount", measure="psi") or 0) > 0.25
    assert value(monitor, "drift_alarm", check="feature_drift") == 1.0
    assert value(monitor, "drift_alarm", check="score_drift") == 0.0
    assert value(monitor, "matured_decisions", rows="own") == 1_500
    assert value(monitor, "calibration_error", rows="held_out") is not None
    assert value(monitor, "drift_computed_timestamp_seconds") == 12.0


def test_what_the_next_report_cannot_judge_is_gone(monitor: Monitor) -> None:
    monitor.drift.show(report(), 1.0)
    few = judge_drift(baseline(), span(live(10)), span(live(10)), 31 * DAY_US, CONFIG.drift)
    monitor.drift.show(few.plain(), 2.0)
    assert value(monitor, "feature_drift", feature="amount", measure="psi") is None
    assert value(monitor, "drift_alarm", check="feature_drift") is None
    assert value(monitor, "average_precision", rows="own") is None


def test_an_alarm_is_told_when_it_begins(tmp_path: Path, monitor: Monitor, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(drift_watch.logger, "warning", lambda text, *values: told.append(text % values))
    watch = make_watch(tmp_path, monitor)
    for factor in (1.0, 4.0, 4.0):
        watch.done(json.dumps(report(factor)))
    assert len(told) == 1
    assert told[0].startswith("feature_drift: ")


def test_the_real_program_reports_beside_the_service(tmp_path: Path, monitor: Monitor) -> None:
    paths = write_log(tmp_path, live(600))
    baseline().save(paths.baselines / f"risk-{VERSION}.safetensors")
    watch = make_watch(tmp_path, monitor)
    watch.start()
    await_until(lambda: value(monitor, "drift_decisions") == 600)
    watch.close()
    assert value(monitor, "drift_failures_total") == 0.0
    assert value(monitor, "score_drift", measure="js") is not None


def test_before_the_first_decision_nothing_is_shown_and_nothing_has_failed(tmp_path: Path, monitor: Monitor) -> None:
    make_watch(tmp_path, monitor).done("null\n")
    assert value(monitor, "drift_computed_timestamp_seconds") == 0.0
    assert value(monitor, "drift_failures_total") == 0.0


def test_a_failure_is_counted_and_the_last_report_stays(tmp_path: Path, monitor: Monitor) -> None:
    monitor.drift.show(report(), 1.0)
    watch = make_watch(tmp_path, monitor, "-c", "import sys; sys.exit('error: the disk is gone')")
    watch.start()
    await_until(lambda: (value(monitor, "drift_failures_total") or 0) >= 2)
    watch.close()
    assert value(monitor, "drift_computed_timestamp_seconds") == 1.0


def test_words_that_are_no_report_are_a_failure(tmp_path: Path, monitor: Monitor) -> None:
    watch = make_watch(tmp_path, monitor, "-c", "print('hello')")
    watch.start()
    await_until(lambda: (value(monitor, "drift_failures_total") or 0) >= 1)
    watch.close()


def test_settings_go_over_stdin(tmp_path: Path, monitor: Monitor) -> None:
    program = "import sys; open(sys.argv[1] + '/told', 'w').write(sys.stdin.read()); print('null')"
    watch = make_watch(tmp_path, monitor, "-c", program)
    watch.start()
    await_until(lambda: (tmp_path / "told").exists() and (tmp_path / "told").read_text().endswith("}"))
    watch.close()
    assert Config.model_validate_json((tmp_path / "told").read_text()) == CONFIG


def test_none_is_made_where_none_is_wanted(tmp_path: Path, monitor: Monitor) -> None:
    watch = DriftWatch(RunPaths(tmp_path), {"serving": {"drift_every_s": 0}}, lambda: VERSION, monitor.drift)
    watch.start()
    assert watch._thread.ident is None
    watch.close()
