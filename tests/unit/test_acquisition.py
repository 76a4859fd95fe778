"""Which decisions are sent for labelling: uncertain ones, unlike each other, and a share at random."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from deepseek_ray.errors import DataError
from deepseek_ray.models import RiskModel
from deepseek_ray.online.acquisition import choose, diverse, gradients
from deepseek_ray.train.step import Recipe, train_in_process
from tests.unit.risk_rows import make_config, make_rows
from tests.unit.update_parts import TRAIN

ROWS = make_rows(600, seed=1)


@pytest.fixture(scope="module")
def model() -> RiskModel:
    torch.manual_seed(0)
    model = RiskModel(make_config(ROWS))
    model.prepare(ROWS.features, ROWS.label)
    train_in_process(model, ROWS, Recipe.of(TRAIN, epochs=5, lr=2e-2))
    return model


def test_the_gradient_is_the_one_that_autograd_finds(model: RiskModel) -> None:
    found = gradients(model, ROWS.features[:5], ROWS.sequence[:5])
    for row in range(5):
        x_BF, s_BNC = (torch.from_numpy(one[row : row + 1]) for one in (ROWS.features, ROWS.sequence))
        logit = model(x_BF, s_BNC)
        p = torch.sigmoid(model.calibration(logit)).detach()
        label = (p >= 0.5).float()
        slope = torch.autograd.grad(logit, model.head.weight)[0].squeeze(0)
        np.testing.assert_allclose(found[row], ((p - label) * slope).numpy(), atol=1e-5)


def test_the_budget_is_kept_and_no_row_comes_twice(model: RiskModel) -> None:
    choice = choose(model, ROWS.features, ROWS.sequence, 50, explore=0.2, seed=3)
    assert len(set(choice.rows.tolist())) == 50
    assert choice.explored.sum() == 10
    again = choose(model, ROWS.features, ROWS.sequence, 50, explore=0.2, seed=3)
    np.testing.assert_array_equal(choice.rows, again.rows)
    assert len(choose(model, ROWS.features, ROWS.sequence, 10_000).rows) == len(ROWS)


def test_chosen_rows_teach_more_than_random_ones_and_hold_more_frauds(model: RiskModel) -> None:
    pool = make_rows(2_000, seed=9)
    length = np.linalg.norm(gradients(model, pool.features, pool.sequence), axis=1)
    rows = choose(model, pool.features, pool.sequence, 100, explore=0.0).rows
    assert length[rows].mean() > 1.2 * length.mean()
    assert pool.label[rows].mean() > 1.2 * pool.label.mean()


def test_of_equal_rows_one_is_enough() -> None:
    """Ten copies of the longest vector, and forty others: the copies do not fill the budget."""
    rng = np.random.default_rng(0)
    vectors = np.concatenate([np.tile([[5.0, 0.0]], (10, 1)), rng.normal(size=(40, 2))])
    assert (diverse(vectors, 10, seed=0) < 10).sum() == 1
    assert len(set(diverse(np.zeros((20, 2)), 5, seed=0).tolist())) == 5


def test_what_cannot_be_chosen_from_is_refused(model: RiskModel) -> None:
    with pytest.raises(DataError, match="no decision"):
        choose(model, ROWS.features[:0], ROWS.sequence[:0], 5)
    with pytest.raises(ValueError, match="budget=0"):
        choose(model, ROWS.features, ROWS.sequence, 0)
    with pytest.raises(ValueError, match="explore=2"):
        choose(model, ROWS.features, ROWS.sequence, 5, explore=2.0)
