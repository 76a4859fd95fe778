"""Checkpoints and resume: complete or not counted."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from deepseek_ray import models
from deepseek_ray.config import TrainConfig
from deepseek_ray.errors import CheckpointError
from deepseek_ray.models import RiskModel
from deepseek_ray.train import checkpoint
from deepseek_ray.train.job import Job, read_result, run_job
from deepseek_ray.train.optimiser import make_optimiser
from deepseek_ray.train.step import Recipe
from tests.unit.risk_rows import make_config, make_rows

ROWS = make_rows(1_000)


class StopError(Exception):
    """Stands for a crash."""


def write(folder: Path, epoch: int, fingerprint: str = "x", keep: int = 2) -> Path:
    torch.manual_seed(epoch)
    model = RiskModel(make_config(ROWS))
    notes = {"fingerprint": fingerprint, "history": []}
    return checkpoint.save(folder, epoch, model, make_optimiser(model, 1e-3, 0.0), notes, keep)


def make_job(tmp_path: Path) -> Job:
    path = ROWS.save(tmp_path / "rows.safetensors")
    recipe = Recipe.of(TrainConfig(epochs=3, batch_size=100, negative_rate=0.5))
    return Job("moe", make_config(ROWS), recipe, path, ROWS.digest, tmp_path / "moe")


def crash_after(count: int) -> object:
    calls = []

    def on_epoch(*_: object) -> None:
        calls.append(1)
        if len(calls) == count:
            raise StopError

    return on_epoch


def test_the_newest_complete_one_wins_and_old_ones_go(tmp_path: Path) -> None:
    for epoch in (1, 2, 3):
        write(tmp_path, epoch)
    found = checkpoint.latest(tmp_path, "x")
    assert found is not None
    assert found.epoch == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["epoch-000002", "epoch-000003"]


@pytest.mark.parametrize("damage", ["no manifest", "torn manifest", "changed weights", "lost file", "short manifest"])
def test_a_torn_or_changed_one_is_skipped(tmp_path: Path, damage: str) -> None:
    write(tmp_path, 1)
    newest = write(tmp_path, 2)
    manifest = newest / checkpoint.MANIFEST
    if damage == "no manifest":
        manifest.unlink()
    elif damage == "torn manifest":
        manifest.write_text(manifest.read_text()[:50])
    elif damage == "short manifest":
        manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"files": {}}))
    elif damage == "lost file":
        (newest / "optimiser.pt").unlink()
    else:
        content = bytearray((newest / "model.safetensors").read_bytes())
        content[-1] ^= 1
        (newest / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError):
        checkpoint.verify(newest)
    found = checkpoint.latest(tmp_path, "x")
    assert found is not None
    assert found.epoch == 1


def test_one_of_another_job_is_not_resumed(tmp_path: Path) -> None:
    write(tmp_path, 1, fingerprint="other")
    assert checkpoint.latest(tmp_path, "x") is None
    assert checkpoint.latest(tmp_path / "absent", "x") is None


def test_weights_and_optimiser_come_back(tmp_path: Path) -> None:
    write(tmp_path, 1)
    torch.manual_seed(1)
    wanted, model = RiskModel(make_config(ROWS)), RiskModel(make_config(ROWS))
    found = checkpoint.latest(tmp_path, "x")
    assert found is not None
    found.restore(model, make_optimiser(model, 1e-3, 0.0))
    assert all(torch.equal(a, b) for a, b in zip(wanted.parameters(), model.parameters(), strict=True))
    other = RiskModel(make_config(make_rows(10, num_features=3)))
    with pytest.raises(CheckpointError, match="another model"):
        found.restore(other, make_optimiser(other, 1e-3, 0.0))


@pytest.mark.parametrize("crash", [1, 3, 4, 6])
def test_a_resumed_job_ends_with_the_same_bits(tmp_path: Path, crash: int) -> None:
    whole = run_job(make_job(tmp_path / "whole"))
    job = make_job(tmp_path / "broken")
    with pytest.raises(StopError):
        run_job(job, on_epoch=crash_after(crash))  # type: ignore[arg-type]
    resumed = run_job(job)
    assert resumed.resumed_epochs == crash
    assert (resumed.model_dir / "model.safetensors").read_bytes() == (
        whole.model_dir / "model.safetensors"
    ).read_bytes()
    losses = [[record["loss"] for record in result.history] for result in (whole, resumed)]
    assert losses[0] == losses[1]


def test_a_finished_job_is_not_run_again_unless_it_changed(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    assert read_result(job) is None
    first = run_job(job)
    assert run_job(job, on_epoch=crash_after(1)).history == first.history  # type: ignore[arg-type]
    longer = dataclasses.replace(job, recipe=dataclasses.replace(job.recipe, epochs=4))
    assert read_result(longer) is None


def test_the_last_days_choose_the_calibration(tmp_path: Path) -> None:
    result = run_job(make_job(tmp_path))
    model = models.load(result.model_dir)
    assert float(model.calibration.scale) != 1.0
    assert 0 < result.validation_average_precision <= 1
    assert np.isfinite(model.predict_proba(ROWS.features, ROWS.sequence)).all()
