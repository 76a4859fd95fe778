"""Updates that hold on to what the champion answered: on the new rows, or on the old ones.

Answers stand beside the labels and never for them: the loss on labels stays whole, and what has no label is no row.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from deepseek_ray.models import RiskModel
from deepseek_ray.online.rehearsal import LOGIT, Replay
from deepseek_ray.online.strategy import Material, Strategy


class Lwf(Strategy):
    """Learning without forgetting: new rows only, with the champion's softened answers as a second target.

    Li and Hoiem 2016, arXiv:1606.09282; temperature as in Hinton et al. 2015, arXiv:1503.02531.
    """

    def __init__(self, material: Material) -> None:
        super().__init__(material)
        self._answer_n = torch.empty(0)

    def prepare(self, model: RiskModel) -> None:
        """Ask the champion about every new row."""
        new = self.material.new
        self._answer_n = torch.from_numpy(model.predict_logits(new.features, new.sequence)).float()

    def penalty(self, logit_B: Tensor, rows: NDArray[np.int64]) -> Tensor:
        """Divergence from the champion's softened answers: 0 where both agree."""
        config = self.material.config
        theirs_B = self._answer_n[rows] / config.lwf_temperature
        target_B = torch.sigmoid(theirs_B)
        ours_B = logit_B / config.lwf_temperature
        cross = F.binary_cross_entropy_with_logits(ours_B, target_B)
        return config.lwf_weight * config.lwf_temperature**2 * (cross - _entropy(theirs_B, target_B))


class Derpp(Replay):
    """DER++: replay, and the squared distance to the log-odds that were stored with each old row.

    Buzzega et al. 2020, "Dark experience for general continual learning", arXiv:2004.07211, equation 6; one draw serves
    both of its terms. Rows stored without log-odds get the champion's.
    """

    def prepare(self, model: RiskModel) -> None:
        """Fill in log-odds that were not stored."""
        self.material.memory.fill(LOGIT, lambda kept: model.predict_logits(kept["features"], kept["sequence"]))

    def penalty(self, logit_B: Tensor, rows: NDArray[np.int64]) -> Tensor:
        """Mean squared distance over the batch's old rows."""
        old_B = rows >= len(self.material.new)
        if not old_B.any():
            return logit_B.new_zeros(())
        stored = torch.from_numpy(self.old_logit[rows[old_B] - len(self.material.new)])
        away = F.mse_loss(logit_B[torch.from_numpy(old_B)], stored)
        return self.material.config.derpp_alpha * away * float(old_B.mean())


def _entropy(logit_B: Tensor, p_B: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(logit_B, p_B)
