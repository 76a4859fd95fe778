"""deepseek-ray drift on a real run: registry, model, log."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest

from deepseek_ray.cli import main
from deepseek_ray.data import windows
from deepseek_ray.data.batch_engine import compute
from deepseek_ray.data.datasets import RiskDataset
from deepseek_ray.data.events import DAY_US
from deepseek_ray.data.prediction_log import PredictionLog
from deepseek_ray.paths import RunPaths
from tests.served_run import DELAY_DAYS, LINEAGE, SEQUENCE_LEN, make_run
from tests.unit.serving_parts import event
from tests.unit.test_prediction_log import row


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunPaths:
    """Trained on the first half of a history; the second half was served, by the champion itself."""
    made = make_run(tmp_path_factory.mktemp("run"), customers=50, days=20, future_days=1)
    spec = windows.load().vector("default")
    table = compute(made.history, spec, label_delay_days=DELAY_DAYS, sequence_len=SEQUENCE_LEN)
    count = len(table.values)
    start = int(datetime.fromisoformat(LINEAGE.train_start).replace(tzinfo=UTC).timestamp()) * 1_000_000
    rows = RiskDataset.build(
        table.values,
        table.sequence,
        made.history["is_fraud"].fill_null(0).to_numpy(),
        start + np.arange(count) * (20 * DAY_US // count),
        np.arange(count) % 50,
        feature_names=spec.names,
    )
    order = np.random.default_rng(0).permutation(count)  # training and serving see the same kinds of days
    half = count // 2
    rows.select(np.sort(order[:half])).save(made.paths.datasets / "train.safetensors")
    rows.select(np.arange(0)).save(made.paths.datasets / "holdout.safetensors")
    champion = made.registry.get("champion")
    _serve(made.paths, rows.select(np.sort(order[half:])), champion.version, spec.digest, champion.load().model)
    return made.paths


def _serve(paths: RunPaths, rows: RiskDataset, version: str, digest: str, model: object) -> None:
    given = model.predict_proba(rows.features, rows.sequence)  # type: ignore[attr-defined]
    log = PredictionLog(paths.prediction_log, synchronous="NORMAL")
    begin = 300 * DAY_US
    log.commit(
        [
            row(
                number,
                transaction=event(number),
                order_us=begin + number * (DAY_US // len(rows)),
                values=rows.features[number].astype(np.float64),
                probability=float(given[number]),
                model_version=version,
                feature_digest=digest,
            )
            for number in range(len(rows))
        ]
    )
    log.close()


def test_the_command_prints_draws_and_tells_by_its_status(
    run: RunPaths, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["drift", "--run", str(run.root), "--set", "drift.min_rows=200"]
    assert main([*arguments, "--days", "1", "--plot", str(tmp_path / "drift.png")]) == 0
    assert "ok    feature_drift" in capsys.readouterr().out
    assert (tmp_path / "drift.png").read_bytes().startswith(b"\x89PNG")
    assert main([*arguments, "--json", "--set", "drift.max_feature_psi=0.0001"]) == 3
    report = json.loads(capsys.readouterr().out)
    assert report["alarms"] == ["feature_drift"]
    psi = [one["psi"] for one in report["features"]]
    assert psi == sorted(psi, reverse=True)


def test_a_run_without_the_training_rows_is_told(run: RunPaths, capsys: pytest.CaptureFixture[str]) -> None:
    for file in (*run.baselines.glob("*"), run.datasets / "train.safetensors"):
        file.unlink()
    assert main(["drift", "--run", str(run.root)]) == 2
    assert "Version 1 was trained on 2026-01-01 to 2026-02-01; the run holds no row" in capsys.readouterr().err
