"""What an update may change about plain fine-tuning: the rows of an epoch, a term of the loss, the trained weights.

The choices of ``update.strategy`` are in rehearsal.py (replay, warm_start), ewc.py, distillation.py (lwf, derpp) and
lora.py; updater.py picks one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from deepseek_ray.config import UpdateConfig
from deepseek_ray.data.datasets import RiskDataset
from deepseek_ray.models import RiskModel
from deepseek_ray.online.replay import Reservoir
from deepseek_ray.train.step import Recipe


@dataclass(frozen=True)
class Material:
    """What an update works with.

    Args:
        new: rows whose labels came since the champion was trained.
        memory: older labelled rows; may be empty.
        config: the strategy's settings.
        recipe: length and speed of the training, ``negative_rate`` and the seed.
    """

    new: RiskDataset
    memory: Reservoir
    config: UpdateConfig
    recipe: Recipe


class Strategy:
    """Plain fine-tuning on the new rows. It forgets: no choice of ``update.strategy``, but the baseline of all.

    Args:
        material: what the update works with.
    """

    num_old = 0
    """Old rows in an epoch."""

    def __init__(self, material: Material) -> None:
        self.material = material

    def prepare(self, model: RiskModel) -> None:
        """Look at the champion, and decide which of its weights train, before the first step."""

    def epoch(self, number: int) -> RiskDataset:
        """Rows of one epoch, counted from 0; as many of each class in every epoch."""
        return self.material.new

    def penalty(self, logit_B: Tensor, rows: NDArray[np.int64]) -> Tensor:
        """A scalar added to the mean loss of a batch, whose rows are numbered as in the epoch; see train/step."""
        return logit_B.new_zeros(())

    def finish(self, model: RiskModel) -> None:
        """Leave a model of the champion's shape."""
