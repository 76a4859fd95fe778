"""From a config to trained models: builds the jobs and runs them on Ray Train, or in this process."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.train.torch import TorchConfig, TorchTrainer
from tqdm import tqdm

from deepseek_ray.cluster import local_cluster
from deepseek_ray.config import Config
from deepseek_ray.data.datasets import RiskDataset
from deepseek_ray.logs import QUIET_ENVIRONMENT
from deepseek_ray.models import RiskModelConfig
from deepseek_ray.paths import RunPaths
from deepseek_ray.train.job import PROGRESS, Job, JobResult, OnEpoch, note_progress, read_result, run_job
from deepseek_ray.train.step import Recipe, require_both_classes
from deepseek_ray.train.worker import train_loop

MOE, DENSE = "moe", "dense"
_GROUP_TIMEOUT_S = 120
_HEALTH_CHECK_INTERVAL_S = 0.5
_START_TIMEOUT_S, _ELASTIC_START_TIMEOUT_S = 180, 20
_POLL_S = 0.5


@dataclass(frozen=True)
class FitResult:
    """Models of one fit, by job name: ``moe`` and, with the ablation, ``dense``."""

    jobs: dict[str, JobResult] = field(default_factory=dict)
    wall_s: float = 0.0

    @property
    def model_dir(self) -> Path:
        """Folder of the Mixture-of-Experts model."""
        return self.jobs[MOE].model_dir


def fit(
    dataset_path: Path,
    config: Config,
    paths: RunPaths,
    *,
    feature_service: str = "",
    feature_digest: str = "",
    name: str = "train",
    callbacks: Sequence[ray.train.UserCallback] = (),
    progress: bool = True,
) -> FitResult:
    """Train the model, and the dense ablation where the config asks for it. Run again, it goes on where it stopped.

    Args:
        dataset_path: file written by RiskDataset.save; unlabelled rows are left out.
        config: model, train, features and data sections, and the seed.
        paths: run folder; on a cluster it must be on storage that every node sees.
        feature_service: service that delivers the vector, kept in the model.
        feature_digest: of the vector's declaration, kept in the model.
        name: folder below the run's checkpoints; one a fit.
        callbacks: Ray Train callbacks, for example Tune's report of every epoch.
        progress: draw a bar on stderr.

    Raises:
        DataError: rows of one class or one day only.
        ray.train.TrainingFailedError: workers failed more than ``train.max_failures`` times.
    """
    start = time.perf_counter()
    jobs = make_jobs(dataset_path, config, paths.checkpoints / name, feature_service, feature_digest)
    todo = [job for job in jobs if read_result(job) is None]
    with _bar(todo, enabled=progress) as on_epoch:
        if config.train.num_workers == 0:
            results = {job.name: run_job(job, None, on_epoch) for job in jobs}
        else:
            if todo:
                _run_on_ray(todo, config, name, paths, callbacks)
            results = {job.name: _finished(job) for job in jobs}
    return FitResult(results, time.perf_counter() - start)


def make_jobs(dataset_path: Path, config: Config, folder: Path, service: str = "", digest: str = "") -> list[Job]:
    """The jobs of a fit: the Mixture-of-Experts model, then the dense one.

    Raises:
        DataError: the dataset cannot be read or has too few labelled days.
    """
    rows = RiskDataset.load(dataset_path)
    for part in rows.labelled().split_tail(config.train.validation_fraction):
        require_both_classes(part)  # here, not in every worker after a start of the cluster
    shape = RiskModelConfig(
        feature_names=rows.feature_names,
        sequence_len=rows.sequence.shape[1],
        shape=config.model,
        feature_service=service,
        feature_digest=digest,
        label_delay_days=config.data.label_delay_days,
    )
    names = [MOE, DENSE] if config.train.ablation else [MOE]
    return [
        Job(
            name=one,
            model=shape.model_copy(update={"dense": one == DENSE}),
            recipe=Recipe.of(config.train, seed=config.seed),
            dataset=dataset_path.resolve(),
            data_digest=rows.digest,
            folder=(folder / one).resolve(),
            validation_fraction=config.train.validation_fraction,
            checkpoint_every=config.train.checkpoint_every,
        )
        for one in names
    ]


def _run_on_ray(
    jobs: list[Job], config: Config, name: str, paths: RunPaths, callbacks: Sequence[ray.train.UserCallback]
) -> None:
    train = config.train
    trainer = TorchTrainer(
        train_loop,
        train_loop_config={"jobs": jobs, "threads": train.threads_per_worker},
        scaling_config=ray.train.ScalingConfig(
            num_workers=train.num_workers,
            resources_per_worker={"CPU": train.threads_per_worker},
        ),
        torch_config=TorchConfig(backend="gloo", timeout_s=_GROUP_TIMEOUT_S),
        run_config=ray.train.RunConfig(
            name=f"{name}-{time.time_ns()}",  # our manifests decide what is resumed, not Ray's state
            storage_path=str(paths.checkpoints.resolve() / "ray"),
            failure_config=ray.train.FailureConfig(max_failures=train.max_failures),
            callbacks=list(callbacks),
            worker_runtime_env={"env_vars": worker_environment(train.threads_per_worker)},
        ),
    )
    with local_cluster(train.num_workers * train.threads_per_worker), train_settings():
        trainer.fit()


@contextmanager
def train_settings(*, elastic: bool = False) -> Iterator[None]:
    """Ray Train's settings that are environment variables only, for as long as a trainer runs.

    A fixed group may wait long for processors that another job holds. An elastic one must not: Ray counts a dead node
    for a while, asks for a group that can no longer start, and only after this time asks for a smaller one.
    """
    wanted = {
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": str(_HEALTH_CHECK_INTERVAL_S),
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": str(_ELASTIC_START_TIMEOUT_S if elastic else _START_TIMEOUT_S),
    }
    ours = {name: value for name, value in wanted.items() if name not in os.environ}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name in ours:
            os.environ.pop(name, None)


def worker_environment(threads: int) -> dict[str, str]:
    """Environment of a worker: quiet libraries, its share of the cores, compiled modules kept."""
    return {
        **QUIET_ENVIRONMENT,
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "PYTHONDONTWRITEBYTECODE": "",  # else each worker compiles torch and ray again
    }


def _finished(job: Job) -> JobResult:
    result = read_result(job)
    assert result is not None, f"job {job.name!r} ended without a result"
    return result


@contextmanager
def _bar(jobs: list[Job], *, enabled: bool) -> Iterator[OnEpoch]:
    """A bar over the epochs of all jobs: advanced by calls, and by what workers write into their job folders."""
    total = sum(2 * job.recipe.epochs for job in jobs)
    with tqdm(total=total, desc="train", unit="epoch", disable=not enabled or not jobs) as bar:
        done = threading.Event()
        seen = {job.name: _lines(job) for job in jobs}
        watcher = threading.Thread(target=_watch, args=(bar, jobs, seen, done), daemon=True)
        watcher.start()
        try:
            yield lambda job, phase, record: note_progress(job, phase, record)
        finally:
            done.set()
            watcher.join()


def _watch(bar: Any, jobs: list[Job], seen: dict[str, int], done: threading.Event) -> None:
    last = False
    while not last:
        last = done.wait(_POLL_S)  # one more look after the end
        for job in jobs:
            count = _lines(job)
            if count > seen[job.name]:
                bar.update(count - seen[job.name])
                bar.set_postfix_str(_newest(job))
                seen[job.name] = count


def _lines(job: Job) -> int:
    file = job.folder / PROGRESS
    return file.read_bytes().count(b"\n") if file.is_file() else 0


def _newest(job: Job) -> str:
    line = json.loads((job.folder / PROGRESS).read_text(encoding="utf-8").splitlines()[-1])
    figures = {"loss": line["loss"], "AP": line.get("average_precision")}
    shown = " ".join(f"{name} {value:.4f}" for name, value in figures.items() if value is not None)
    return f"{job.name} {line['phase']} {shown}"
