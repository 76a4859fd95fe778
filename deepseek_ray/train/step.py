"""The training step and the loop around it in plain torch: no Ray, no files.

Genuine rows are thinned to ``negative_rate`` an epoch; the loss then sees log-odds shifted by -log(negative_rate), so
that the model's own log-odds stay those of the full data (prior correction, King and Zeng 2001).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from deepseek_ray import metrics
from deepseek_ray.config import TrainConfig
from deepseek_ray.data.datasets import RiskDataset
from deepseek_ray.errors import DataError
from deepseek_ray.models import RiskModel
from deepseek_ray.parallel.data import Batch, DataAxis, batches, epoch_order, gather_rows, num_batches
from deepseek_ray.train.optimiser import learning_rate, make_optimiser, set_learning_rate

_MIN_PACE = 0.3  # of the balancing bias, at the end of training: slow enough to settle, fast enough to follow

Penalty: TypeAlias = Callable[[Tensor, NDArray[np.int64]], Tensor]
"""(log-odds of a batch (B,), its rows' numbers in the dataset) -> a scalar that is added to the batch's mean loss."""


@dataclass(frozen=True)
class Recipe:
    """How long and how fast to train: the part of ``TrainConfig`` that decides what comes out."""

    epochs: int
    batch_size: int
    lr: float
    weight_decay: float
    warmup_fraction: float
    max_grad_norm: float
    negative_rate: float
    seed: int = 0

    @classmethod
    def of(cls, config: TrainConfig, *, seed: int = 0, **changes: Any) -> Recipe:
        """The recipe of a config section; ``changes`` win, for example ``epochs=2, lr=5e-4`` of an update."""
        names = cls.__dataclass_fields__.keys() - {"seed"}
        return cls(**({name: getattr(config, name) for name in names} | {"seed": seed} | changes))


@dataclass(frozen=True)
class EpochRecord:
    """What one epoch did. ``average_precision`` is NaN where nothing was held out."""

    epoch: int
    loss: float
    grad_norm: float
    lr: float
    min_load: float
    max_load: float
    rows: int
    wall_s: float
    average_precision: float = float("nan")

    def numbers(self) -> dict[str, float]:
        """The finite numbers, by name."""
        return {name: float(value) for name, value in asdict(self).items() if math.isfinite(value)}


class Training:
    """A model under training on one worker.

    Args:
        model: float32; its feature bins are fitted already (:meth:`RiskModel.prepare`).
        dataset: rows with known labels; the same on every worker.
        recipe: length and speed.
        axis: this worker's place.
        penalty: one more term of the loss, for example what holds an update back from forgetting.

    Raises:
        DataError: a class is missing.
    """

    def __init__(
        self,
        model: RiskModel,
        dataset: RiskDataset,
        recipe: Recipe,
        axis: DataAxis | None = None,
        *,
        penalty: Penalty | None = None,
    ) -> None:
        require_both_classes(dataset)
        self.model = model
        self.dataset = dataset
        self.recipe = recipe
        self.axis = axis or DataAxis()
        self.penalty = penalty
        self.forward = self.axis.wrap(model)
        self.optimiser = make_optimiser(model, recipe.lr, recipe.weight_decay)
        frauds = int((dataset.label == 1).sum())
        kept = frauds + round((len(dataset) - frauds) * recipe.negative_rate)
        self.steps_per_epoch = num_batches(kept, recipe.batch_size)

    def run_epoch(self, epoch: int) -> EpochRecord:
        """Train one epoch, counted from 0. Its rows, order and dropout depend on seed, epoch and worker only."""
        start = time.perf_counter()
        recipe = self.recipe
        torch.manual_seed(_epoch_seed(recipe.seed, epoch, self.axis.rank))
        order = epoch_order(self.dataset.label, recipe.seed, epoch, recipe.negative_rate)
        self.model.train()
        loss, norm = torch.zeros((), dtype=torch.float64), 0.0
        load = _Load()
        lr = 0.0
        for index, batch in enumerate(batches(order, recipe.batch_size, self.axis)):
            step = epoch * self.steps_per_epoch + index
            lr = learning_rate(step, recipe.epochs * self.steps_per_epoch, recipe.lr, recipe.warmup_fraction)
            set_learning_rate(self.optimiser, lr)
            batch_loss, batch_norm = self.step(batch)
            loss += batch_loss
            norm = max(norm, batch_norm)
            load.add(self.balance(max(_MIN_PACE, lr / recipe.lr)))
        mean_loss = float(self.axis.sum(loss)) / len(order)
        wall_s = time.perf_counter() - start
        return EpochRecord(epoch, mean_loss, norm, lr, *load.extremes(), len(order), wall_s)

    def step(self, batch: Batch) -> tuple[float, float]:
        """One update; returns this worker's summed loss and the norm of the joined gradient before clipping."""
        rows = batch.rows
        x_BF = torch.from_numpy(self.dataset.features[rows])
        s_BNC = torch.from_numpy(self.dataset.sequence[rows])
        label_B = torch.from_numpy(self.dataset.label[rows].astype(np.float32))
        logit_B = self.forward(x_BF, s_BNC)
        shifted_B = logit_B - math.log(self.recipe.negative_rate)
        loss = F.binary_cross_entropy_with_logits(shifted_B, label_B, reduction="sum")
        # Data-parallel averaging divides by the workers; the step's mean divides by all its rows.
        mean = loss * (self.axis.size / batch.total)
        if self.penalty is not None:
            mean = mean + self.penalty(logit_B, rows)
        self.optimiser.zero_grad(set_to_none=True)
        mean.backward()  # type: ignore[no-untyped-call]
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.max_grad_norm)
        self.optimiser.step()
        return float(loss.detach()), float(norm)

    @torch.no_grad()
    def balance(self, pace: float) -> NDArray[np.int64]:
        """Move the experts' biases by the joined counts of the step; returns the counts (L, E).

        ``pace`` shrinks the move with the learning rate: at full size the biases would circle the balance for ever.
        """
        experts = self.model.experts
        if not experts:
            return np.zeros((0, 0), dtype=np.int64)
        rate = pace * self.model.config.shape.router_bias_rate
        counts_LE = self.axis.sum(torch.stack([moe.router.count_E for moe in experts]))
        for moe, count_E in zip(experts, counts_LE, strict=True):
            if moe.router.weight_ED.requires_grad:  # an update that leaves the router as it is leaves its choices too
                moe.router.balance(count_E, rate)
        return counts_LE.numpy()

    def held_out_logits(self, dataset: RiskDataset) -> NDArray[np.float64]:
        """Log-odds of every row, each worker computing its share."""
        share = slice(self.axis.rank, None, self.axis.size)
        local = self.model.predict_logits(dataset.features[share], dataset.sequence[share])
        return gather_rows(local, len(dataset), self.axis)


def train_in_process(
    model: RiskModel, dataset: RiskDataset, recipe: Recipe, on_epoch: Callable[[EpochRecord], None] | None = None
) -> list[EpochRecord]:
    """Train a prepared float32 model on arrays, in this process; the model is changed in place.

    Args:
        model: from :func:`new_model`, or loaded with ``load(path, torch.float32)`` to train it further.
        dataset: rows with known labels.
        recipe: length and speed.
        on_epoch: called after each epoch.
    """
    training = Training(model, dataset, recipe)
    history = []
    for epoch in range(recipe.epochs):
        history.append(training.run_epoch(epoch))
        if on_epoch is not None:
            on_epoch(history[-1])
    model.eval()
    return history


def calibrate(model: RiskModel, held_out: RiskDataset) -> None:
    """Fit the model's calibration on rows that it was not trained on."""
    model.calibration.fit(model.predict_logits(held_out.features, held_out.sequence), held_out.label)


def held_out_precision(logits: NDArray[np.float64], dataset: RiskDataset) -> float:
    """Average precision on held-out rows."""
    return metrics.average_precision(dataset.label, logits)


class _Load:
    """Expert counts of an epoch."""

    def __init__(self) -> None:
        self.total: NDArray[np.int64] | None = None

    def add(self, count_LE: NDArray[np.int64]) -> None:
        self.total = count_LE.copy() if self.total is None else self.total + count_LE

    def extremes(self) -> tuple[float, float]:
        """Smallest and largest share of an expert in its layer; NaN for a dense model."""
        if self.total is None or not self.total.size:
            return float("nan"), float("nan")
        share = self.total / self.total.sum(-1, keepdims=True)
        return float(share.min()), float(share.max())


def _epoch_seed(seed: int, epoch: int, rank: int) -> int:
    return int(np.random.SeedSequence([seed, epoch, rank]).generate_state(1, np.uint64)[0] >> 1)


def require_both_classes(dataset: RiskDataset) -> None:
    """Check that every row is labelled and both classes occur.

    Raises:
        DataError: otherwise, with the counts.
    """
    frauds, genuine = int((dataset.label == 1).sum()), int((dataset.label == 0).sum())
    if not frauds or not genuine or frauds + genuine < len(dataset):
        raise DataError(
            f"Training rows hold {frauds} frauds, {genuine} genuine and {len(dataset) - frauds - genuine} unlabelled.",
            fix="give labelled rows of both classes: more days, or a shorter label delay",
        )
