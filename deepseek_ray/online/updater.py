"""Train a challenger from the champion on new labels, by the strategy that the settings name.

The champion's feature bins stay, so that both models read the same numbers the same way.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

import deepseek_ray.models as models
from deepseek_ray.config import TrainConfig, UpdateConfig
from deepseek_ray.data.datasets import UNKNOWN, RiskDataset
from deepseek_ray.errors import DataError
from deepseek_ray.online.distillation import Derpp, Lwf
from deepseek_ray.online.ewc import Ewc
from deepseek_ray.online.lora import Lora
from deepseek_ray.online.rehearsal import COLUMNS, LOGIT, Replay, WarmStart, as_dataset, stored_logit
from deepseek_ray.online.replay import Reservoir
from deepseek_ray.online.strategy import Material, Strategy
from deepseek_ray.train.step import EpochRecord, Recipe, Training, calibrate

STRATEGIES: dict[str, type[Strategy]] = {
    "replay": Replay, "ewc": Ewc, "lwf": Lwf, "derpp": Derpp, "lora": Lora, "warm_start": WarmStart,
}  # fmt: skip
"""``update.strategy`` -> what it does."""

_KEY = ("card", "order_us")


@dataclass(frozen=True)
class UpdateResult:
    """What an update made.

    Args:
        model_dir: the challenger, for registry.register.
        history: one record an epoch.
        num_new: new labelled rows used.
        num_replayed: old rows mixed in, an epoch.
    """

    model_dir: Path
    history: tuple[EpochRecord, ...]
    num_new: int
    num_replayed: int


def remember(memory: Reservoir, rows: RiskDataset, logit: NDArray[np.float64] | None = None) -> None:
    """Offer the labelled rows of a dataset to the replay memory.

    Args:
        memory: is changed.
        rows: unlabelled ones are left out.
        logit: log-odds (n,) to store with them, for ``derpp``; without them the next update asks its champion.

    Raises:
        DataError: the memory holds rows of another vector.
    """
    names = list(rows.feature_names)
    if memory.note.setdefault("feature_names", names) != names:
        raise DataError("The replay memory holds rows of another feature vector.", fix="start a new replay memory")
    known = rows.labelled()
    columns = {name: getattr(known, name) for name in COLUMNS}
    stored = stored_logit(len(rows), logit)[rows.label != UNKNOWN]
    memory.add({**columns, LOGIT: stored})


def take_back(memory: Reservoir, rows: RiskDataset) -> None:
    """Forget rows that were remembered as genuine: a label has come that says otherwise."""
    memory.withdraw({name: getattr(rows, name) for name in _KEY}, key=_KEY)


def recall(memory: Reservoir) -> RiskDataset:
    """Everything in the memory as a dataset, genuine rows first.

    Raises:
        DataError: the memory is empty.
    """
    if not len(memory):
        raise DataError("The replay memory is empty.", fix="remember the training rows first")
    return as_dataset(memory, memory.rows())


def warm_start(
    champion_dir: Path,
    new: RiskDataset,
    memory: Reservoir,
    target: Path,
    config: UpdateConfig,
    train: TrainConfig,
    *,
    seed: int = 0,
    held_out: RiskDataset | None = None,
    on_epoch: Callable[[EpochRecord], None] | None = None,
    strategy: type[Strategy] | None = None,
) -> UpdateResult:
    """Train a challenger from the champion.

    Args:
        champion_dir: folder with the champion's config.json and model.safetensors.
        new: rows whose labels came since the champion was trained; unlabelled ones are left out.
        memory: older labelled rows; none is added (see :func:`remember`).
        target: folder for the challenger.
        config: strategy, epochs, learning rate, share of old rows.
        train: all other settings of the training.
        seed: of the mix, the order and dropout.
        held_out: labelled rows, not among the new ones, to fit the calibration on; None keeps the champion's.
        on_epoch: called after each epoch.
        strategy: instead of the one that ``config`` names, for a baseline.

    Raises:
        DataError: too few labels, one class only, or rows of another vector than the champion's.
        ModelFormatError: the champion cannot be loaded.
        EnvironmentProblemError: the strategy needs a package that is not installed.
    """
    model = models.load(champion_dir, torch.float32)
    rows = _checked(new, memory, model.config.feature_names, config.min_labels)
    size = config.batch_size or train.batch_size
    recipe = Recipe.of(train, seed=seed, epochs=config.epochs, lr=config.lr, batch_size=size)
    plan = (strategy or STRATEGIES[config.strategy])(Material(rows, memory, config, recipe))
    plan.prepare(model)
    history = _train(model, plan, recipe, on_epoch)
    plan.finish(model)
    model.eval()
    if held_out is not None:
        calibrate(model, held_out.labelled())
    model.save_pretrained(target)
    return UpdateResult(target, tuple(history), len(rows), plan.num_old)


def _train(
    model: models.RiskModel, plan: Strategy, recipe: Recipe, on_epoch: Callable[[EpochRecord], None] | None
) -> list[EpochRecord]:
    training = Training(model, plan.epoch(0), recipe, penalty=plan.penalty)
    history = []
    for epoch in range(recipe.epochs):
        training.dataset = plan.epoch(epoch)
        history.append(training.run_epoch(epoch))
        if on_epoch is not None:
            on_epoch(history[-1])
    return history


def _checked(new: RiskDataset, memory: Reservoir, names: tuple[str, ...], min_labels: int) -> RiskDataset:
    known = new.labelled()
    if len(known) < min_labels:
        raise DataError(
            f"{len(known)} new labels are fewer than update.min_labels={min_labels}.", fix="wait for feedback"
        )
    old_names = tuple(memory.note.get("feature_names", names))
    if known.feature_names != names or old_names != names:
        raise DataError("New or replayed rows have another feature vector than the champion.", fix="train from scratch")
    return known
