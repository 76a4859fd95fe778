"""A registered version used by somebody who knows only the tracking URI."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import deepseek_ray.models as models
from deepseek_ray.cli import main
from deepseek_ray.config import GateConfig, ModelConfig
from deepseek_ray.data.evidence import Evidence, VectorContract
from deepseek_ray.data.prediction_log import PredictionLog
from deepseek_ray.errors import GateRefusedError
from deepseek_ray.models import RiskModel, RiskModelConfig
from deepseek_ray.online.gate import decide
from deepseek_ray.paths import RunPaths
from deepseek_ray.registry import InputSchema, Lineage, Probes, Registry, Tracking
from tests.unit.test_lineage import logged

ROOT = Path(__file__).resolve().parents[2]

PAGE = (ROOT / "docs" / "registry.md").read_text(encoding="utf-8")

LINEAGE = Lineage(data_digest="d", git_commit="c", train_start="2026-01-01", train_end="2026-02-01")

EVIDENCE = Evidence(
    name="risk",
    version="1",
    average_precision=0.6,
    cp100=0.3,
    calibration_error=0.01,
    p99_ms=5.0,
    prevalence=0.01,
    heldout_digest="days",
    contract=VectorContract(schema="s", feature_service="risk_v1", feature_digest="f"),
    old_average_precision=0.5,
)

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


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A migrated MLflow database; making one takes seconds."""
    paths = RunPaths(tmp_path_factory.mktemp("template"))
    Tracking.open(paths, experiment="template")
    return paths.root / "mlflow.db"


@pytest.fixture
def champion(tmp_path: Path, template: Path) -> Registry:
    torch.manual_seed(0)
    shape = ModelConfig(d_model=8, num_layers=1, num_heads=2, num_experts=4, d_expert=8, num_bins=4)
    config = RiskModelConfig(
        feature_names=("amount", "count_1d"),
        sequence_len=2,
        shape=shape,
        feature_service="risk_v1",
        feature_digest="f",
    )
    model = RiskModel(config)
    rng = np.random.default_rng(0)
    model.prepare(rng.uniform(0, 5, (100, 2)).astype(np.float32), (np.arange(100) % 5 == 0).astype(np.int8))
    torch.nn.init.normal_(model.head.weight)
    folder = model.save_pretrained(tmp_path / "model")
    probe = rng.uniform(0, 5, (4, 2)), rng.uniform(0, 5, (4, 2, 6))
    expected = models.load(folder).predict_proba(*probe)
    paths = RunPaths(tmp_path / "run").create()
    shutil.copy(template, paths.root)
    registry = Registry.open(paths)
    with registry.tracking.start_run("train") as opened:
        registry.register(
            folder,
            opened.run_id,
            InputSchema.of(config),
            LINEAGE,
            probes=Probes(features=probe[0], sequence=probe[1], expected=expected),
        )
    first = replace(EVIDENCE, contract=InputSchema.of(config).contract)
    registry.promote("1", decide(None, first, GateConfig()))
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
    assert [err for _, err in results if "Warning" in err] == []
    Tracking.open(RunPaths(tmp_path), create=False)


def test_the_snippet_of_the_page_runs(champion: Registry) -> None:
    snippet = PAGE.partition("```python\n")[2].partition("```")[0]
    process = run(snippet, MLFLOW_TRACKING_URI=champion.tracking.uri)
    out, err = process.communicate(timeout=100)
    assert process.returncode == 0, err
    assert 0.0 <= float(out.strip(" []\n")) <= 1.0


def test_the_cli_shows_promotes_rolls_back_and_deletes(
    champion: Registry, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = champion.get("champion")
    with champion.tracking.start_run("update") as opened:
        two = champion.register(tmp_path / "model", opened.run_id, one.schema, LINEAGE)
    evidence = replace(EVIDENCE, contract=one.schema.contract)
    slow = replace(evidence, version=two.version, p99_ms=40.0)
    with pytest.raises(GateRefusedError, match="p99_scoring_ms"):
        champion.promote(two.version, decide(evidence, slow, GateConfig()))
    run_folder = ["--run", str(champion.tracking.paths.root)]
    assert main(["registry", "promote", "2", "--set", "gate.max_p99_ms=30", *run_folder]) == 2
    assert "p99_scoring_ms = 40 (bound 30)" in capsys.readouterr().err
    assert main(["registry", "promote", "2", "--set", "gate.max_p99_ms=50", *run_folder]) == 0
    assert champion.aliases() == {"champion": "2", "previous": "1"}
    assert main(["registry", "rollback", "--note", "false alarms doubled at noon", *run_folder]) == 0
    assert main(["registry", "history", *run_folder]) == 0
    shown = capsys.readouterr().out
    assert "champion: version 1" in shown
    assert "false alarms doubled at noon" in shown
    assert main(["registry", "delete", "2", *run_folder]) == 0
    assert main(["registry", "delete", "champion", *run_folder]) == 2
    answered = capsys.readouterr()
    assert answered.out == "deleted: version 2 of 'risk'\n"
    assert "Version 1 of 'risk' stands behind champion." in answered.err
    assert (champion.versions(), champion.history()[-1].action) == (["1"], "delete")


def read_only(folder: Path, *verbs: str) -> subprocess.CompletedProcess[str]:
    """Run ``deepseek-ray`` verbs where the folder is mounted read-only, which stops root too."""
    lines = [f"mount --bind {folder} {folder}", f"mount -o remount,bind,ro {folder}", f"! touch {folder}/x 2>/dev/null"]
    lines += [f"{sys.executable} -m deepseek_ray.cli {verb} --run {folder}" for verb in verbs]
    command = ["unshare", "--map-root-user", "--mount", "bash", "-c", " && ".join(lines)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=100)


@pytest.mark.skipif(
    subprocess.run(["unshare", "--map-root-user", "--mount", "true"], capture_output=True).returncode != 0,
    reason="no mount namespaces here",
)
def test_what_happened_can_be_read_from_a_folder_that_nobody_may_write(champion: Registry) -> None:
    paths = champion.tracking.paths
    log = PredictionLog(paths.prediction_log)
    log.commit([logged(model_version="1")])
    log.close()
    done = read_only(paths.root, "explain p1", "registry history", "compact")
    assert "package_digest" in done.stdout, done.stderr
    assert "champion: version 1" in done.stdout, done.stderr
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert f"error: {paths.prediction_archive}: Read-only file system" in done.stderr
