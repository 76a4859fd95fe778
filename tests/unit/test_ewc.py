"""EWC against logistic regression, where Fisher information and the curvature of the loss are known in closed form."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

import deepseek_ray.models as models
from deepseek_ray.config import UpdateConfig
from deepseek_ray.data.datasets import RiskDataset
from deepseek_ray.online.ewc import Ewc, fisher_information
from deepseek_ray.online.replay import Reservoir
from deepseek_ray.online.strategy import Material
from deepseek_ray.online.updater import remember
from deepseek_ray.train.step import Recipe
from tests.unit.test_strategy import challenger, champion, memory  # noqa: F401 - fixtures
from tests.unit.update_parts import NAMES, TRAIN

RATE = 0.25
"""Share of genuine rows in the loss."""


class Logistic(nn.Module):
    """h = w x + b."""

    experts = ()

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(3, 1)
        with torch.no_grad():
            self.line.weight.copy_(torch.tensor([[1.5, -2.0, 0.5]]))
            self.line.bias.fill_(-1.0)

    def forward(self, x_BF: Tensor, s_BNC: Tensor) -> Tensor:
        return self.line(x_BF).squeeze(-1)


def rows_of(seed: int, count: int) -> RiskDataset:
    """Labels drawn from the model's own probabilities."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(count, 3)).astype(np.float32)
    with torch.no_grad():
        p = torch.sigmoid(Logistic()(torch.from_numpy(x), torch.empty(0))).numpy()
    label = rng.random(count) < p
    numbers = np.arange(count)
    return RiskDataset.build(x, np.zeros((count, 1, 6)), label, numbers, numbers, feature_names=NAMES)


OLD, NEW = rows_of(1, 400), rows_of(2, 100)


def kept(rows: RiskDataset) -> Reservoir:
    made = Reservoir(1_000)
    remember(made, rows)
    return made


def weights(rows: RiskDataset) -> NDArray[np.float64]:
    """How much of each row is in the thinned loss."""
    return np.where(rows.label == 1, 1.0, RATE)


def curvature(rows: RiskDataset) -> NDArray[np.float64]:
    """Second derivatives (3 weights, 1 bias) of the thinned loss of all rows: the sum of p (1 - p) x x'."""
    x, w = torch.from_numpy(rows.features).double(), torch.from_numpy(weights(rows))
    y = torch.from_numpy(rows.label).double()

    def loss(theta: Tensor) -> Tensor:
        shifted = x @ theta[:3] + theta[3] - math.log(RATE)
        return (w * binary_cross_entropy_with_logits(shifted, y, reduction="none")).sum()

    theta = torch.tensor([1.5, -2.0, 0.5, -1.0], dtype=torch.float64)
    return torch.autograd.functional.hessian(loss, theta).numpy()  # type: ignore[no-untyped-call]


def fisher_of(model: nn.Module, rows: RiskDataset, num_rows: int = 2_000) -> NDArray[np.float64]:
    found = fisher_information(cast(Any, model), kept(rows), num_rows, negative_rate=RATE, seed=0)
    return torch.cat([found["line.weight"].flatten(), found["line.bias"]]).numpy()


def test_the_fisher_information_is_that_of_logistic_regression() -> None:
    expected = np.diag(curvature(OLD)) / weights(OLD).sum()
    np.testing.assert_allclose(fisher_of(Logistic(), OLD), expected, rtol=1e-4)


def test_it_is_the_mean_of_squared_slopes_and_not_the_square_of_their_mean() -> None:
    """At its optimum a model's mean slope is next to nothing, and so would be the square of a batch's gradient."""
    model = Logistic()
    x, y = torch.from_numpy(OLD.features), torch.from_numpy(OLD.label).float()
    loss = binary_cross_entropy_with_logits(model(x, torch.empty(0)), y)
    (slope,) = torch.autograd.grad(loss, [model.line.weight])
    assert (fisher_of(model, OLD)[:3] > 10 * slope.square().numpy()).all()


def test_half_of_the_rows_give_the_same_information_about() -> None:
    expected = np.diag(curvature(OLD)) / weights(OLD).sum()
    np.testing.assert_allclose(fisher_of(Logistic(), OLD, 200), expected, rtol=0.3)


@pytest.mark.parametrize("strength", [1.0, 3.0])
def test_at_strength_one_the_pull_is_the_curvature_of_the_old_rows_beside_the_mean_of_the_new(strength: float) -> None:
    config = UpdateConfig(strategy="ewc", ewc_rows=2_000, ewc_strength=strength)
    recipe = Recipe.of(TRAIN.model_copy(update={"negative_rate": RATE}))
    plan, model = Ewc(Material(NEW, kept(OLD), config, recipe)), Logistic()
    plan.prepare(cast(Any, model))
    none = np.empty(0, dtype=np.int64)
    assert float(plan.penalty(torch.zeros(1), none).detach()) == 0.0
    bend = np.diag(curvature(OLD)) / weights(NEW).sum()
    for index in range(3):
        moved = Logistic()
        with torch.no_grad():
            model.line.weight.copy_(moved.line.weight)
            model.line.weight[0, index] += 0.1
        pull = float(plan.penalty(torch.zeros(1), none).detach())
        assert pull == pytest.approx(0.5 * strength * bend[index] * 0.1**2, rel=1e-3)


def test_the_router_and_its_balance_stay_as_they_were(
    champion: Path,  # noqa: F811 - a fixture
    memory: Reservoir,  # noqa: F811
    tmp_path: Path,
) -> None:
    made = challenger(champion, memory, tmp_path, strategy="ewc", ewc_rows=32, epochs=1)
    before, after = (models.load(path).state_dict() for path in (champion, made))
    router = {name for name in before if ".router." in name}
    assert {name.rpartition(".")[2] for name in router} == {"weight_ED", "bias_E"}
    assert all(torch.equal(before[name], after[name]) for name in router)
    assert any(not torch.equal(before[name], after[name]) for name in before.keys() - router)
