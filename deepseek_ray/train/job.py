"""One training job from dataset to saved model, with resume: what every worker runs. No Ray.

Two phases. ``select`` trains on all but the last days, follows average precision on these and fits the calibration
there; ``refit`` then trains a new model as long on all days, the freshest included, and takes the calibration over.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from deepseek_ray.data.datasets import RiskDataset
from deepseek_ray.models import RiskModel, RiskModelConfig
from deepseek_ray.parallel.data import DataAxis
from deepseek_ray.paths import replace_text
from deepseek_ray.train import checkpoint
from deepseek_ray.train.step import EpochRecord, Recipe, Training, held_out_precision

SELECT, REFIT = "select", "refit"
RESULT = "result.json"
PROGRESS = "progress.jsonl"


@dataclass(frozen=True)
class Job:
    """What to train, on what, and where to keep it.

    Args:
        name: unique within a fit, for example ``moe``.
        model: shape and input contract.
        recipe: length and speed.
        dataset: file written by RiskDataset.save; readable from every worker.
        data_digest: RiskDataset.digest of that file.
        folder: checkpoints, the finished model and its result; shared by all workers.
        validation_fraction: share of the days held out in the first phase.
        checkpoint_every: epochs between checkpoints.
    """

    name: str
    model: RiskModelConfig
    recipe: Recipe
    dataset: Path
    data_digest: str
    folder: Path
    validation_fraction: float = 0.15
    checkpoint_every: int = 1

    @property
    def fingerprint(self) -> str:
        """Identity of model, recipe and data: only a checkpoint with the same one is resumed."""
        parts = [self.model.model_dump(mode="json"), asdict(self.recipe), self.data_digest, self.validation_fraction]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    @property
    def model_dir(self) -> Path:
        """Where the finished model lies."""
        return self.folder / "model"


@dataclass(frozen=True)
class JobResult:
    """What a job made.

    Args:
        name: the job's.
        model_dir: finished model folder.
        validation_average_precision: of the first phase, on the days held out from it.
        history: one record an epoch and phase, with ``phase`` added.
        wall_s: of this run; a resumed job counts from the resume.
        resumed_epochs: epochs, over both phases, that came from checkpoints.
    """

    name: str
    model_dir: Path
    validation_average_precision: float
    history: list[dict[str, Any]] = field(default_factory=list)
    wall_s: float = 0.0
    resumed_epochs: int = 0


OnEpoch = Callable[[Job, str, EpochRecord], None]


def run_job(job: Job, axis: DataAxis | None = None, on_epoch: OnEpoch | None = None) -> JobResult:
    """Run a job, or go on where its newest complete checkpoint stands. Called by every worker alike.

    Raises:
        DataError: the dataset cannot be read, holds one class or one day only.
        CheckpointError: a checkpoint cannot be written.
    """
    axis = axis or DataAxis()
    finished = read_result(job)
    if finished is not None:
        return finished
    start = time.perf_counter()
    rows = RiskDataset.load(job.dataset).labelled()
    early, late = rows.split_tail(job.validation_fraction)
    select = _Phase(job, SELECT, early, late, axis, on_epoch)
    selected = select.run()
    refit = _Phase(job, REFIT, rows, None, axis, on_epoch)
    model = refit.run()
    # The refitted model has seen the late days: only the first phase can say how scores and truth relate.
    model.calibration.load_state_dict(selected.calibration.state_dict())
    history = [record | {"phase": phase.name} for phase in (select, refit) for record in phase.history]
    resumed = select.resumed + refit.resumed
    result = JobResult(job.name, job.model_dir, select.precision, history, time.perf_counter() - start, resumed)
    if axis.rank == 0:
        model.save_pretrained(job.model_dir)
        _write_result(job, result)
    axis.barrier()
    return result


def note_progress(job: Job, phase: str, record: EpochRecord) -> None:
    """Append an epoch to the job's progress file, for whoever watches. The first worker calls this."""
    line = json.dumps({"phase": phase, **record.numbers()})
    with (job.folder / PROGRESS).open("a", encoding="utf-8") as stream:
        stream.write(line + "\n")


def read_result(job: Job) -> JobResult | None:
    """The result of a job that finished earlier with the same model, recipe and data."""
    try:
        stored = json.loads((job.folder / RESULT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if stored.pop("fingerprint", None) != job.fingerprint:
        return None
    precision = stored.pop("validation_average_precision")
    stored["model_dir"] = job.model_dir
    return JobResult(validation_average_precision=float("nan") if precision is None else precision, **stored)


class _Phase:
    """One of the two trainings of a job, with its checkpoints."""

    def __init__(
        self,
        job: Job,
        name: str,
        rows: RiskDataset,
        held_out: RiskDataset | None,
        axis: DataAxis,
        on_epoch: OnEpoch | None,
    ) -> None:
        self.job, self.name, self.held_out, self.axis, self.on_epoch = job, name, held_out, axis, on_epoch
        self.folder = job.folder / name
        self.history: list[dict[str, Any]] = []
        self.resumed = 0
        self.precision = float("nan")
        torch.manual_seed(job.recipe.seed)
        model = RiskModel(job.model)
        self.found = checkpoint.latest(self.folder, job.fingerprint)
        if self.found is None:  # else the bins come with the checkpoint
            model.prepare(rows.features, rows.label)
        self.training = Training(model, rows, job.recipe, axis)

    def run(self) -> RiskModel:
        """Train to the end and return the model."""
        model = self.training.model
        start = self._resume()
        for epoch in range(start, self.job.recipe.epochs):
            record = self._judge(self.training.run_epoch(epoch))
            self.history.append(record.numbers())
            self._save(epoch + 1)
            if self.on_epoch is not None:
                self.on_epoch(self.job, self.name, record)
        model.eval()
        return model

    def _resume(self) -> int:
        if self.found is None:
            return 0
        self.found.restore(self.training.model, self.training.optimiser)
        self.history = list(self.found.notes["history"])
        self.precision = self.history[-1].get("average_precision", float("nan"))
        self.resumed = self.found.epoch
        return self.found.epoch

    def _judge(self, record: EpochRecord) -> EpochRecord:
        """Score the held-out days and fit the calibration on them."""
        if self.held_out is None:
            return record
        logits = self.training.held_out_logits(self.held_out)
        self.training.model.calibration.fit(logits, self.held_out.label)
        self.precision = held_out_precision(logits, self.held_out)
        return replace(record, average_precision=self.precision)

    def _save(self, done: int) -> None:
        due = done % self.job.checkpoint_every == 0 or done == self.job.recipe.epochs
        if self.axis.rank == 0 and due:
            notes = {"fingerprint": self.job.fingerprint, "history": self.history}
            checkpoint.save(self.folder, done, self.training.model, self.training.optimiser, notes)


def _write_result(job: Job, result: JobResult) -> None:
    content = asdict(result) | {"fingerprint": job.fingerprint, "model_dir": str(result.model_dir)}
    if np.isnan(result.validation_average_precision):
        content["validation_average_precision"] = None
    replace_text(job.folder / RESULT, json.dumps(content, indent=2, sort_keys=True))
