"""A registered version used by somebody who knows only the tracking URI."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import deepseek_ray.models as models
from deepseek_ray.config import ModelConfig
from deepseek_ray.data.evidence import GATES, Check, GateDecision
from deepseek_ray.models import RiskModel, RiskModelConfig
from deepseek_ray.paths import RunPaths
from deepseek_ray.registry import InputSchema, Lineage, Probes, Registry, Tracking

ROOT = Path(__file__).resolve().parents[2]

SCORE = """
import mlflow, pandas, sys
model = mlflow.pyfunc.load_model("models:/risk@champion")
frame = pandas.DataFrame([[0.25, 3.0]], columns=["amount", "count_1d"])
frame["sequence"] = [[[1200.0, 60.0, 1.0, 1.0, 0.0, 0.0]]]
print(repr(float(model.predict(frame)[0])))
"""


def run(code: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture
def champion(tmp_path: Path) -> Registry:
    torch.manual_seed(0)
    shape = ModelConfig(d_model=8, num_layers=1, num_heads=2, num_experts=4, d_expert=8, num_bins=4)
    config = RiskModelConfig(
        feature_names=("amount", "count_1d"), sequence_len=2, shape=shape, feature_service="risk_v1"
    )
    model = RiskModel(config)
    rng = np.random.default_rng(0)
    model.prepare(rng.uniform(0, 5, (100, 2)).astype(np.float32), (np.arange(100) % 5 == 0).astype(np.int8))
    torch.nn.init.normal_(model.head.weight)
    folder = model.save_pretrained(tmp_path / "model")
    probe = rng.uniform(0, 5, (4, 2)), rng.uniform(0, 5, (4, 2, 6))
    expected = models.load(folder).predict_proba(*probe)
    registry = Registry.open(RunPaths(tmp_path / "run").create())
    lineage = Lineage(data_digest="d", git_commit="c", train_start="2026-01-01", train_end="2026-02-01")
    with registry.tracking.start_run("train") as opened:
        registry.register(
            folder,
            opened.run_id,
            InputSchema.of(config),
            lineage,
            probes=Probes(features=probe[0], sequence=probe[1], expected=expected),
        )
    checks = tuple(Check(name, True, 1.0, 1.0) for name in GATES)
    registry.promote("1", GateDecision(name="risk", version="1", champion_version=None, checks=checks))
    return registry


def test_a_fresh_process_scores_with_the_champion(champion: Registry) -> None:
    process = run(SCORE, MLFLOW_TRACKING_URI=champion.tracking.uri)
    out, err = process.communicate(timeout=100)
    assert process.returncode == 0, err
    model = models.load(champion.get("champion").path)
    sequence = np.array([[[1200.0, 60.0, 1.0, 1.0, 0.0, 0.0], [0.0, -1.0, 0.0, 0.0, 0.0, 0.0]]])
    assert float(out) == pytest.approx(float(model.predict_proba(np.array([[0.25, 3.0]]), sequence)[0]), abs=1e-9)


def test_several_processes_may_be_the_first_to_open_the_store(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from deepseek_ray.paths import RunPaths;"
        "from deepseek_ray.registry import Tracking; print(Tracking.open(RunPaths(Path(sys.argv[1]))).experiment_id)"
    )
    command = code.replace("sys.argv[1]", repr(str(tmp_path)))
    started = [run(command) for _ in range(2)]
    results = [process.communicate(timeout=110) for process in started]
    assert [process.returncode for process in started] == [0, 0], results
    assert len({out for out, _ in results}) == 1
    Tracking.open(RunPaths(tmp_path), create=False)
