"""Walks forward over days: what is known on a day, learners that train on it, and what their training cost.

A label of a day is known ``delay_days`` after the day's end, as in data/protocol.py: on the morning of a day, the
newest known day is the one ``delay_days + 1`` days before it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from deepseek_ray import models
from deepseek_ray.config import Config
from deepseek_ray.data.datasets import RiskDataset
from deepseek_ray.errors import DataError
from deepseek_ray.models import RiskModel, RiskModelConfig
from deepseek_ray.online.replay import Reservoir
from deepseek_ray.online.updater import remember, warm_start
from deepseek_ray.train.step import EpochRecord, Recipe, train_in_process


@dataclass(frozen=True)
class Effort:
    """Cost of learning: rows through the network (of an epoch after thinning, times epochs), seconds of the processor.

    Processor time of this process, all its threads: on a shared machine the wall clock would count the neighbours.
    """

    samples: int = 0
    seconds: float = 0.0

    def __add__(self, other: Effort) -> Effort:
        return Effort(self.samples + other.samples, self.seconds + other.seconds)


class Learner(Protocol):
    """What learns as labels come, and scores what comes next."""

    effort: Effort

    def learn(self, rows: RiskDataset) -> None:
        """Take in labelled rows."""

    def score(self, rows: RiskDataset) -> NDArray[np.float64]:
        """Probability of fraud (n,), not calibrated."""


def newest_known(today: int, delay_days: int) -> int:
    """The newest day whose labels are all known on the morning of a day; days are numbers since 1970-01-01."""
    return today - delay_days - 1


def days(rows: RiskDataset, first: int, last: int) -> RiskDataset:
    """Rows of the days ``first`` to ``last``, both included.

    Raises:
        DataError: there are none.
    """
    chosen = rows.select((rows.day >= first) & (rows.day <= last))
    if not len(chosen):
        lowest, highest = (rows.day.min(), rows.day.max()) if len(rows) else (0, -1)
        raise DataError(
            f"There are no rows of the days {date_of(first)} to {date_of(last)}; the data hold {date_of(lowest)} to "
            f"{date_of(highest)}.",
            fix="choose days inside the data, or a shorter history",
        )
    return chosen


class Frozen:
    """A model that never learns.

    Args:
        model: scores as it is.
    """

    def __init__(self, model: RiskModel) -> None:
        self.model = model
        self.effort = Effort()

    def learn(self, rows: RiskDataset) -> None:
        """Nothing."""

    def score(self, rows: RiskDataset) -> NDArray[np.float64]:
        """Probability of fraud (n,), not calibrated."""
        return self.model.predict_proba(rows.features, rows.sequence)


class Retrained:
    """A model that is trained from scratch on the rows it is given, each time anew.

    Args:
        config: model and train sections, and the seed.
        model: what scores until the first training.
    """

    def __init__(self, config: Config, model: RiskModel | None = None) -> None:
        self.config = config
        self.effort = Effort()
        self.model = model

    def learn(self, rows: RiskDataset) -> None:
        """Train on all labelled rows of a dataset.

        Raises:
            DataError: a class is missing.
        """
        start = time.process_time()
        known, config = rows.labelled(), self.config
        torch.manual_seed(config.seed)
        length = known.sequence.shape[1]
        shape = RiskModelConfig(feature_names=known.feature_names, sequence_len=length, shape=config.model)
        self.model = RiskModel(shape)
        self.model.prepare(known.features, known.label)
        history = train_in_process(self.model, known, Recipe.of(config.train, seed=config.seed))
        self.effort += _effort(history, start)

    @property
    def fitted(self) -> RiskModel:
        """The newest model; :meth:`learn` comes first."""
        assert self.model is not None, "nothing was learnt yet"
        return self.model

    def score(self, rows: RiskDataset) -> NDArray[np.float64]:
        """Probability of fraud (n,), not calibrated."""
        return self.fitted.predict_proba(rows.features, rows.sequence)


class Incremental:
    """A model that goes on from where it stands, by the strategy of ``config.update``.

    Args:
        start: the model it goes on from; it is not changed.
        memory: older labelled rows, an empty one for plain fine-tuning; rows are added as they are learnt.
        config: update and train sections, and the seed.
        folder: for the versions, one folder each.
        remembers: add what is learnt to the memory.
    """

    def __init__(
        self, start: RiskModel, memory: Reservoir, config: Config, folder: Path, *, remembers: bool = True
    ) -> None:
        self.model, self.memory, self.config, self.folder = start, memory, config, folder
        self.remembers = remembers
        self.effort = Effort()
        self.newest = start.save_pretrained(folder / "0")
        self._number = 0

    def learn(self, rows: RiskDataset) -> None:
        """Update on new labelled rows, then remember them.

        Raises:
            DataError: fewer labels than ``update.min_labels``, or one class only.
        """
        start = time.process_time()
        self._number += 1
        target = self.folder / str(self._number)
        config = self.config
        made = warm_start(
            self.newest, rows, self.memory, target, config.update, config.train, seed=config.seed + self._number
        )
        self.newest, self.model = target, models.load(target, torch.float32)
        if self.remembers:
            remember(self.memory, rows)
        self.effort += _effort(made.history, start)

    def score(self, rows: RiskDataset) -> NDArray[np.float64]:
        """Probability of fraud (n,), not calibrated."""
        return self.model.predict_proba(rows.features, rows.sequence)


def _effort(history: Sequence[EpochRecord], start: float) -> Effort:
    return Effort(sum(record.rows for record in history), time.process_time() - start)


def date_of(day: int) -> np.datetime64:
    """The date of a day number."""
    return np.datetime64(int(day), "D")
