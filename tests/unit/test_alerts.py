"""The rules for Prometheus and the dashboard for Grafana ask for what the service really shows."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml
from prometheus_client import CollectorRegistry
from prometheus_client.metrics import MetricWrapperBase

from deepseek_ray.online.drift_report import judge_drift
from deepseek_ray.online.loop import State
from deepseek_ray.online.loop import _metrics as updater_metrics
from deepseek_ray.serving.arm_metrics import ArmMetrics
from deepseek_ray.serving.batch_control import BatchControl
from deepseek_ray.serving.batch_queue import BatchQueue
from deepseek_ray.serving.monitor import ModelMonitor, Monitor
from tests.unit.drift_rows import baseline, live, span
from tests.unit.test_drift_report import CONFIG, NEWEST

ROOT = Path(__file__).resolve().parents[2]
RULES = ROOT / "deploy" / "prometheus" / "alerts.yaml"
BOARD = ROOT / "deploy" / "grafana" / "deepseek_ray.json"
SUFFIXES = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count"), "gauge": ("",)}
SUBJECTS = {
    "drift": "RiskFeatureDrift", "calibration": "RiskCalibration", "error rate": "RiskErrorRate",
    "latency objective": "RiskLatencyObjective", "shed": "RiskShed", "overload": "RiskOverload",
    "queue age": "RiskQueueAge",
    "refused versions": "RiskVersionRefused", "log disk full": "RiskLogDiskFull",
    "updater failing": "RiskUpdaterFailing",
}  # fmt: skip


def rules() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]


def board_expressions() -> list[str]:
    board = json.loads(BOARD.read_text())
    panels = [target["expr"] for panel in board["panels"] for target in panel.get("targets", [])]
    return panels + [note["expr"] for note in board["annotations"]["list"]]


def expressions() -> list[str]:
    return [rule["expr"] for rule in rules()] + board_expressions()


def shown() -> dict[str, set[str]]:
    """Name of each series that the service shows -> its labels."""
    monitor, of_models = Monitor(), ModelMonitor()
    ArmMetrics(monitor.registry)
    return series(of_models.registry) | series(monitor.registry) | updater_shows()


def series(registry: CollectorRegistry) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for family in registry.collect():
        collector = registry._names_to_collectors[family.name]
        assert isinstance(collector, MetricWrapperBase)
        for suffix in SUFFIXES[family.type]:
            found[family.name + suffix] = {*collector._labelnames, *(["le"] if suffix == "_bucket" else [])}
    return found


def updater_shows() -> dict[str, set[str]]:
    """The same of the file that the updater writes for a textfile collector."""
    samples = [one for family in updater_metrics(State(since_s=0.0, psi=0.1)).collect() for one in family.samples]
    return {one.name: set(one.labels) for one in samples}


def selectors(node: Any) -> Iterator[promql_parser.VectorSelector]:
    """Every metric that an expression reads."""
    if isinstance(node, promql_parser.VectorSelector):
        yield node
    for name in ("lhs", "rhs", "expr", "param", "vector_selector"):
        if (inner := getattr(node, name, None)) is not None:
            yield from selectors(inner)
    for argument in getattr(node, "args", []):
        yield from selectors(argument)


def parsed(expression: str) -> Any:
    """The expression as Prometheus reads it, with an interval in the place of Grafana's variable."""
    return promql_parser.parse(expression.replace("$__rate_interval", "5m"))


@pytest.mark.parametrize("expression", expressions())
def test_each_metric_and_each_label_that_is_asked_for_exists(expression: str) -> None:
    known = shown()
    asked = list(selectors(parsed(expression)))
    assert {one.name for one in asked} == set(re.findall(r"deepseek_ray_\w+", expression))
    for one in asked:
        assert one.name in known
        assert {matcher.name for matcher in one.matchers.matchers} <= known[one.name]


def test_labels_in_words_and_legends_exist() -> None:
    known = shown()
    for panel in json.loads(BOARD.read_text())["panels"]:
        for target in panel.get("targets", []):
            names = [one.name for one in selectors(parsed(target["expr"]))]
            labels = set().union(*(known[name] for name in names))
            assert set(re.findall(r"{{(\w+)}}", target["legendFormat"])) <= labels, panel["title"]


def test_checks_that_a_rule_names_are_made() -> None:
    made = {check.name for check in judge_drift(baseline(), span(live()), span(live()), NEWEST, CONFIG).checks}
    named = [name for rule in rules() for name in re.findall(r'check=~?"([^"]+)"', rule["expr"])]
    assert {name for names in named for name in names.split("|")} == made


def test_every_subject_has_its_alert_and_every_alert_a_summary_and_a_severity() -> None:
    names = [rule["alert"] for rule in rules()]
    assert set(SUBJECTS.values()) <= set(names)
    assert len(names) == len(set(names))
    for rule in rules():
        assert rule["labels"]["severity"] in ("page", "ticket")
        assert rule["annotations"]["summary"]


def test_the_latency_alert_compares_with_the_objective_that_is_set() -> None:
    (rule,) = [rule for rule in rules() if rule["alert"] == "RiskLatencyObjective"]
    expression = parsed(rule["expr"])
    latency, bound = (list(selectors(side)) for side in (expression.lhs, expression.rhs))
    assert [one.name for one in latency] == ["deepseek_ray_http_latency_seconds_bucket"]
    assert [one.name for one in bound] == ["deepseek_ray_latency_objective_seconds"]
    assert "> 0)" in rule["expr"]  # no objective, no alert
    for objective_s in (0.0, 0.025):
        monitor = Monitor()
        monitor.watch_queue(BatchQueue(BatchControl(64, objective_s), 100))
        assert monitor.registry.get_sample_value("deepseek_ray_latency_objective_seconds") == objective_s


def test_panels_do_not_overlap() -> None:
    board = json.loads(BOARD.read_text())
    taken: set[tuple[int, int]] = set()
    for panel in board["panels"]:
        at = panel["gridPos"]
        cells = {(at["x"] + x, at["y"] + y) for x in range(at["w"]) for y in range(at["h"])}
        assert not cells & taken, panel["title"]
        assert at["x"] + at["w"] <= 24
        taken |= cells
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])


def test_a_metric_that_does_not_exist_is_found() -> None:
    asked = list(selectors(parsed('sum(rate(deepseek_ray_nothing_total{a="b"}[5m])) / 2 > 0.1')))
    assert [one.name for one in asked] == ["deepseek_ray_nothing_total"]
    assert "deepseek_ray_nothing_total" not in shown()


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_promtool_takes_the_rules() -> None:
    subprocess.run(["promtool", "check", "rules", str(RULES)], check=True)
