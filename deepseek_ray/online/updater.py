"""Warm start: go on training the champion on new labels, mixed with replayed old ones.

The champion's feature bins stay, so that both models read the same numbers the same way. Old rows come
in their natural mix of classes and are thinned like the new ones: the prior correction of train/step then
holds for both, and only their joint share is set (``replay_fraction``; Chaudhry et al. 2019,
"On tiny episodic memories in continual learning").
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import deepseek_ray.models as models
from deepseek_ray.config import TrainConfig, UpdateConfig
from deepseek_ray.data.datasets import RiskDataset
from deepseek_ray.errors import DataError
from deepseek_ray.online.replay import Columns, Reservoir
from deepseek_ray.train.step import EpochRecord, Recipe, Training, calibrate

_COLUMNS = ("features", "sequence", "label", "order_us", "day", "card", "amount_cents", "scenario")
_KEY = ("card", "order_us")
_UNTIL = "until_us"


@dataclass(frozen=True)
class UpdateResult:
    """What a warm start made.

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


def remember(memory: Reservoir, rows: RiskDataset) -> None:
    """Offer the labelled rows of a dataset to the replay memory.

    Raises:
        DataError: the memory holds rows of another vector.
    """
    names = list(rows.feature_names)
    if memory.note.setdefault("feature_names", names) != names:
        raise DataError("The replay memory holds rows of another feature vector.", fix="start a new replay memory")
    known = rows.labelled()
    memory.add({name: getattr(known, name) for name in _COLUMNS})
    memory.note[_UNTIL] = max([memory.note.get(_UNTIL, 0), *known.order_us.tolist()])


def correct(memory: Reservoir, rows: RiskDataset) -> int:
    """Make frauds in the memory of served rows that were remembered as genuine: their label came after the delay.

    Args:
        memory: rows are recognised by card and ``order_us``.
        rows: what was served, with the labels known by now; rows that were never remembered are left out.

    Returns:
        How many rows were corrected.
    """
    late = (rows.label == 1) & (rows.order_us <= memory.note.get(_UNTIL, 0))
    fraud = rows.select(late)
    return memory.correct({name: getattr(fraud, name) for name in _COLUMNS}, key=_KEY)


def not_remembered(memory: Reservoir, rows: RiskDataset) -> RiskDataset:
    """Rows that are younger than all that was ever offered to the memory: the others trained an earlier update."""
    return rows.select(rows.order_us > memory.note.get(_UNTIL, 0))


def recall(memory: Reservoir) -> RiskDataset:
    """Everything in the memory as a dataset, genuine rows first.

    Raises:
        DataError: the memory is empty.
    """
    if not len(memory):
        raise DataError("The replay memory is empty.", fix="remember the training rows first")
    return _dataset(memory, memory.rows())


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
) -> UpdateResult:
    """Train a challenger from the champion on new and replayed rows.

    Args:
        champion_dir: folder with the champion's config.json and model.safetensors.
        new: rows whose labels came since the champion was trained; unlabelled ones are left out.
        memory: older labelled rows; it is not changed (see :func:`remember`).
        target: folder for the challenger.
        config: epochs, learning rate, share of old rows.
        train: all other settings of the training.
        seed: of the mix, the order and dropout.
        held_out: labelled rows, not among the new ones, to fit the calibration on; None keeps the champion's.
        on_epoch: called after each epoch.

    Raises:
        DataError: too few labels, one class only, or rows of another vector than the champion's.
        ModelFormatError: the champion cannot be loaded.
    """
    model = models.load(champion_dir, torch.float32)
    rows = _checked(new, memory, model.config.feature_names, config.min_labels)
    size = config.batch_size or train.batch_size
    recipe = Recipe.of(train, seed=seed, epochs=config.epochs, lr=config.lr, batch_size=size)
    mix = _Mix(rows, memory, config.replay_fraction, recipe.negative_rate, seed)
    training = Training(model, mix.epoch(0), recipe)
    history = []
    for epoch in range(recipe.epochs):
        training.dataset = mix.epoch(epoch)  # fresh old rows each time; as many of each class as before
        history.append(training.run_epoch(epoch))
        if on_epoch is not None:
            on_epoch(history[-1])
    model.eval()
    if held_out is not None:
        calibrate(model, held_out.labelled())
    model.save_pretrained(target)
    return UpdateResult(target, tuple(history), len(rows), mix.num_old)


class _Mix:
    """New rows with a fresh draw of old ones each epoch."""

    def __init__(self, new: RiskDataset, memory: Reservoir, fraction: float, negative_rate: float, seed: int) -> None:
        self.new, self.memory, self.seed = new, memory, seed
        frauds = int(new.label.sum())
        after_thinning = frauds + (len(new) - frauds) * negative_rate
        old = after_thinning * fraction / (1 - fraction) if len(memory) else 0.0
        seen_fraud, seen_genuine = memory.seen[1], memory.seen[0] * negative_rate
        share = seen_fraud / (seen_fraud + seen_genuine) if len(memory) else 0.0
        self.num_fraud = round(old * share)
        self.num_genuine = round(old * (1 - share) / negative_rate)

    @property
    def num_old(self) -> int:
        return self.num_fraud + self.num_genuine

    def epoch(self, epoch: int) -> RiskDataset:
        if not self.num_old:
            return self.new
        rng = np.random.default_rng([self.seed, epoch])
        drawn = [self.memory.draw(1, self.num_fraud, rng), self.memory.draw(0, self.num_genuine, rng)]
        parts = [part for part in drawn if part and len(part["label"])]
        columns = {name: np.concatenate([part[name] for part in parts]) for name in _COLUMNS}
        return self.new.concat(_dataset(self.memory, columns))


def _dataset(memory: Reservoir, columns: Columns) -> RiskDataset:
    arrays: dict[str, Any] = {name: columns[name] for name in _COLUMNS}
    return RiskDataset(**arrays, feature_names=tuple(memory.note["feature_names"]))


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
