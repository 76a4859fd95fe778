"""The bridge between a training job and Ray Train: what runs in each worker process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ray.train
import torch

from deepseek_ray.parallel.data import DataAxis
from deepseek_ray.train.job import Job, note_progress, run_job
from deepseek_ray.train.step import EpochRecord


def train_loop(settings: dict[str, Any]) -> None:
    """Run jobs one after the other; every epoch is reported to the controller, by every worker.

    Args:
        settings: ``jobs`` (a list of Job) and ``threads`` (torch threads of this worker).
    """
    torch.set_num_threads(int(settings["threads"]))
    jobs: Sequence[Job] = settings["jobs"]
    axis = DataAxis.current()
    for job in jobs:
        run_job(job, axis, _report)


def _report(job: Job, phase: str, record: EpochRecord) -> None:
    if DataAxis.current().rank == 0:
        note_progress(job, phase, record)
    ray.train.report({"job": job.name, "phase": phase, **record.numbers()})
