"""Elastic weight consolidation: a weight moves the less, the more the old rows' answers depend on it.

Kirkpatrick et al. 2017, "Overcoming catastrophic forgetting in neural networks", arXiv:1612.00796, equation 3. The
Fisher information is taken over the model's own answers, not over the labels (Kunstner et al. 2019, "Limitations of
the empirical Fisher approximation", arXiv:1905.12558): for one log-odds h with probability p it is p (1 - p) (dh/dw)^2.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deepseek_ray.errors import DataError
from deepseek_ray.models import RiskModel
from deepseek_ray.online.replay import Reservoir
from deepseek_ray.online.strategy import Material, Strategy


class Ewc(Strategy):
    """New rows only; the memory tells which weights matter.

    Raises:
        DataError: the memory lacks a class.
    """

    def __init__(self, material: Material) -> None:
        super().__init__(material)
        self._terms: list[tuple[Tensor, Tensor, Tensor]] = []
        self._strength = 0.0

    def prepare(self, model: RiskModel) -> None:
        """Measure the importance of every weight.

        At ``ewc_strength`` 1 the penalty is the Laplace approximation of what all old rows would say, against the mean
        loss of the new ones.
        """
        for moe in model.experts:
            # which expert a row passes is a choice without a slope: no importance would hold the router back
            moe.router.weight_ED.requires_grad_(False)
        memory, recipe = self.material.memory, self.material.recipe
        if not min(memory.num_kept(0), memory.num_kept(1)):
            raise DataError("The replay memory lacks a class, and EWC measures on it.", fix="set update.strategy=lwf")
        fisher = fisher_information(
            model, memory, self.material.config.ewc_rows, negative_rate=recipe.negative_rate, seed=recipe.seed
        )
        now = dict(model.named_parameters())
        self._terms = [(now[name], now[name].detach().clone(), value) for name, value in fisher.items()]
        old = memory.seen[1] + memory.seen[0] * recipe.negative_rate
        frauds = int(self.material.new.label.sum())
        new = frauds + (len(self.material.new) - frauds) * recipe.negative_rate
        self._strength = self.material.config.ewc_strength * old / new

    def penalty(self, logit_B: Tensor, rows: NDArray[np.int64]) -> Tensor:
        """Half the weighted sum of squared moves."""
        moved = [(fisher * (weight - before).square()).sum() for weight, before, fisher in self._terms]
        return 0.5 * self._strength * torch.stack(moved).sum()


def fisher_information(
    model: RiskModel, memory: Reservoir, num_rows: int, *, negative_rate: float, seed: int
) -> dict[str, Tensor]:
    """Diagonal of the Fisher information over the memory's rows, as thinned training sees them.

    Args:
        model: float32; left in evaluation mode.
        memory: rows of both classes.
        num_rows: rows that are looked at, half of each class: frauds are too few to be met by chance.
        negative_rate: share of genuine rows in the loss.
        seed: of the choice of rows.

    Returns:
        One tensor a trained parameter, of its shape.
    """
    rng = np.random.default_rng([seed, num_rows])
    seen = {0: memory.seen[0] * negative_rate, 1: float(memory.seen[1])}
    trained = {name: one for name, one in model.named_parameters() if one.requires_grad}
    total = {name: torch.zeros_like(one) for name, one in trained.items()}
    model.eval()
    for label in (0, 1):
        count = min(num_rows // 2, memory.num_kept(label))
        part = memory.draw(label, count, rng)
        share = seen[label] / (seen[0] + seen[1]) / count
        for row in range(count):
            x_BF, s_BNC = (torch.from_numpy(part[name][row : row + 1]) for name in ("features", "sequence"))
            logit = model(x_BF, s_BNC).squeeze()
            slopes = torch.autograd.grad(logit, list(trained.values()), allow_unused=True)
            p = torch.sigmoid(logit.detach() - math.log(negative_rate))
            for name, slope in zip(trained, slopes, strict=True):
                if slope is not None:  # an expert that the row did not pass
                    total[name] += share * p * (1 - p) * slope.square()
    return total
