"""From a prediction id to everything behind the decision."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from deepseek_ray import cli, commands
from deepseek_ray.data.events import Reason
from deepseek_ray.data.prediction_log import LoggedFeedback, LoggedPrediction, PredictionLog
from deepseek_ray.errors import DataError
from deepseek_ray.lineage import trace
from deepseek_ray.paths import RunPaths
from deepseek_ray.registry import Registry, VersionLineage
from tests.unit.serving_parts import event


class OneVersion:
    """A registry that knows version 3."""

    def lineage(self, version: str) -> VersionLineage:
        return VersionLineage(
            name="risk",
            version=version,
            run_id="run-7",
            package_digest="p" * 64,
            feature_service="risk_default_v1",
            feature_digest="f" * 64,
            data_digest="d" * 64,
            git_commit="c" * 40,
            train_start="2026-01-01",
            train_end="2026-02-28",
        )

    def aliases(self) -> dict[str, str]:
        return {"champion": "4", "previous": "3"}


REGISTRY = cast(Registry, OneVersion())


def logged(**changes: Any) -> LoggedPrediction:
    fields = {
        "prediction_id": "p1",
        "transaction": event(),
        "order_us": 5,
        "values": np.zeros(2),
        "sequence": np.zeros((0, 0)),
        "probability": 0.75,
        "threshold": 0.5,
        "decision": "review",
        "cold": ("device",),
        "reasons": (Reason(feature="amount", value=10.0, contribution=1.5),),
        "model_name": "risk",
        "model_version": "3",
        "run_id": "run-7",
        "feature_service": "risk_default_v1",
        "feature_digest": "f" * 64,
        "latency_ms": 2.5,
        "logged_us": 9,
    }
    return LoggedPrediction(**cast(Any, fields | changes))


@pytest.fixture
def paths(tmp_path: Path) -> RunPaths:
    paths = RunPaths(tmp_path / "run").create()
    log = PredictionLog(paths.prediction_log)
    log.commit([logged()])
    label: dict[str, Any] = {"prediction_id": "p1", "is_fraud": True, "observed_us": 10, "known_us": 11}
    log.commit([], [LoggedFeedback(**label, after_seq=1, logged_us=12)])
    log.close()
    return paths


def test_a_decision_leads_to_version_run_data_features_and_code(paths: RunPaths) -> None:
    found = trace("p1", paths, REGISTRY)
    assert (found["decision"]["probability"], found["decision"]["cold"]) == (0.75, ["device"])
    assert found["transaction"]["card_id"] == "c1"
    assert found["reasons"] == [{"feature": "amount", "value": 10.0, "contribution": 1.5}]
    assert found["label"] == {"is_fraud": True}
    assert (found["model"]["version"], found["model"]["now"], found["model"]["run_id"]) == ("3", ["previous"], "run-7")
    assert found["data"]["digest"] == "d" * 64
    assert found["features"]["same_as_trained"] is True
    assert found["code"] == {"git_commit": "c" * 40}


def test_a_vector_of_another_declaration_is_said_so(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    log = PredictionLog(paths.prediction_log)
    log.commit([logged(feature_digest="0" * 64)])
    log.close()
    assert trace("p1", paths, REGISTRY)["features"]["same_as_trained"] is False


@pytest.mark.parametrize(("folder", "says"), [("run", "'nobody' is not in"), ("other", "has served no prediction")])
def test_an_unknown_prediction_or_run_is_refused(paths: RunPaths, folder: str, says: str) -> None:
    with pytest.raises(DataError, match=says):
        trace("nobody", RunPaths(paths.root.parent / folder), REGISTRY)
    assert not (paths.root.parent / "other").exists()


def test_the_verb_prints_text_or_json(
    paths: RunPaths, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(commands.Registry, "open", lambda *args, **options: REGISTRY)
    assert cli.main(["explain", "p1", "--run", str(paths.root)]) == 0
    text = capsys.readouterr().out
    assert "git_commit         cccc" in text
    assert "cold               device" in text
    assert cli.main(["explain", "p1", "--json", "--run", str(paths.root)]) == 0
    assert json.loads(capsys.readouterr().out)["model"]["version"] == "3"
