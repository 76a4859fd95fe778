"""Training on Ray: the same model on any number of workers, resumed from our manifests after a kill."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
import ray

from deepseek_ray import models
from deepseek_ray.cluster import local_cluster
from deepseek_ray.config import Config, build_config
from deepseek_ray.paths import RunPaths
from deepseek_ray.train import checkpoint
from deepseek_ray.train.trainer import FitResult, fit, make_jobs
from tests.unit.risk_rows import make_rows

pytestmark = [
    pytest.mark.timeout(400),
    pytest.mark.filterwarnings(r"ignore::DeprecationWarning:ray\..*"),  # Ray's own use of its old settings
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # Ray leaves log files and sockets to the collector
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
ROWS = make_rows(4_000)
EPOCHS = 6


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    with local_cluster(2):
        yield
    assert not ray.is_initialized()


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ROWS.save(tmp_path_factory.mktemp("data") / "rows.safetensors")


@pytest.fixture(scope="module")
def whole(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunPaths, FitResult]:
    """Two workers, nothing went wrong."""
    paths = RunPaths(tmp_path_factory.mktemp("whole"))
    return paths, fit(dataset, make(2), paths, progress=False)


def make(num_workers: int, **train: object) -> Config:
    shape = {"d_model": 16, "num_heads": 2, "num_experts": 4, "d_expert": 8, "num_bins": 4, "dropout": 0.0}
    settings = {"epochs": EPOCHS, "batch_size": 100, "negative_rate": 1.0, "ablation": False, **train}
    return build_config({"model": shape, "train": {"num_workers": num_workers, **settings}})


def score(folder: Path) -> np.ndarray:
    return models.load(folder).predict_proba(ROWS.features, ROWS.sequence)


def test_two_workers_walk_through_the_batches_of_one(
    whole: tuple[RunPaths, FitResult], dataset: Path, tmp_path: Path
) -> None:
    alone = fit(dataset, make(0, epochs=EPOCHS), RunPaths(tmp_path), progress=False).jobs["moe"]
    together = whole[1].jobs["moe"]
    # Later a token that rounding moves to another expert lets the two drift apart: the first epoch is the fair test.
    assert together.history[0]["loss"] == pytest.approx(alone.history[0]["loss"], rel=1e-4)
    assert together.history[0]["rows"] == alone.history[0]["rows"]
    gap = np.abs(score(together.model_dir) - score(alone.model_dir))
    assert np.median(gap) < 1e-2


def test_a_killed_worker_costs_no_epoch_that_was_saved(
    whole: tuple[RunPaths, FitResult], dataset: Path, tmp_path: Path
) -> None:
    paths = RunPaths(tmp_path)
    killed: list[int] = []
    killer = threading.Thread(target=kill_a_worker, args=(paths.checkpoints / "train/moe/select", killed))
    killer.start()
    result = fit(dataset, make(2), paths, progress=False)
    killer.join()
    assert killed, "no worker was found to kill"
    assert result.jobs["moe"].resumed_epochs >= 1
    assert [record["loss"] for record in result.jobs["moe"].history] == [
        record["loss"] for record in whole[1].jobs["moe"].history
    ]
    assert np.array_equal(score(result.model_dir), score(whole[1].model_dir))


@pytest.mark.slow
def test_a_tampered_checkpoint_is_skipped_and_an_older_one_used(
    whole: tuple[RunPaths, FitResult], dataset: Path, tmp_path: Path
) -> None:
    paths = RunPaths(tmp_path / "copy")
    shutil.copytree(whole[0].root, paths.root)
    (job,) = make_jobs(dataset, make(2), paths.checkpoints / "train")
    (job.folder / "result.json").unlink()  # as if the end had never been reached
    newest = job.folder / "refit" / f"epoch-{EPOCHS:06d}" / "model.safetensors"
    content = bytearray(newest.read_bytes())
    content[-1] ^= 1
    newest.write_bytes(content)
    again = fit(dataset, make(2), paths, progress=False)
    assert again.jobs["moe"].resumed_epochs == EPOCHS + (EPOCHS - 1)  # all of the first phase; one epoch was lost
    assert np.array_equal(score(again.model_dir), score(whole[1].model_dir))


def test_every_epoch_is_noted_once_and_nothing_is_done_twice(whole: tuple[RunPaths, FitResult], dataset: Path) -> None:
    paths, result = whole
    lines = (paths.checkpoints / "train/moe/progress.jsonl").read_text().splitlines()
    assert [json.loads(line)["phase"] for line in lines] == ["select"] * EPOCHS + ["refit"] * EPOCHS
    assert result.jobs["moe"].history[0]["rows"] == pytest.approx(len(ROWS) * 0.85, rel=0.01)
    assert fit(dataset, make(2), paths, progress=False).wall_s < 5


def kill_a_worker(folder: Path, killed: list[int]) -> None:
    """Kill -9 one training worker of this test's cluster once the first checkpoint is complete."""
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and not killed:
        time.sleep(0.02)
        if any(folder.glob(f"epoch-*/{checkpoint.MANIFEST}")):
            for process in psutil.Process().children(recursive=True):
                if "RayTrainWorker" in " ".join(process.cmdline()):
                    os.kill(process.pid, signal.SIGKILL)
                    killed.append(process.pid)
                    break
