"""The training step: learning, prior correction, and that any number of workers takes the same steps."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from deepseek_ray import metrics
from deepseek_ray.config import TrainConfig
from deepseek_ray.errors import DataError
from deepseek_ray.models import RiskModel
from deepseek_ray.parallel.data import Batch, DataAxis, batches, epoch_order, gather_rows, num_batches
from deepseek_ray.train.optimiser import learning_rate
from deepseek_ray.train.step import Recipe, Training, calibrate, train_in_process
from tests.unit.risk_rows import SHAPE, make_config, make_rows

ROWS = make_rows(3_000)
RECIPE = Recipe.of(TrainConfig(epochs=3, batch_size=200, negative_rate=0.5, lr=5e-3))


def make_model(*, shape: object = SHAPE) -> RiskModel:
    torch.manual_seed(0)
    model = RiskModel(make_config(ROWS, shape=shape))  # type: ignore[arg-type]
    model.prepare(ROWS.features, ROWS.label)
    return model


def test_it_learns_and_balances() -> None:
    model = make_model()
    history = train_in_process(model, ROWS, RECIPE)
    fresh = make_rows(3_000, seed=1)
    score = model.predict_proba(fresh.features, fresh.sequence)
    assert history[-1].loss < history[0].loss
    assert metrics.average_precision(fresh.label, score) > 2 * fresh.label.mean()
    assert history[-1].min_load > 0.05


def test_thinning_genuine_rows_leaves_probabilities_where_they_were() -> None:
    model = make_model()
    train_in_process(model, ROWS, dataclasses.replace(RECIPE, negative_rate=0.2))
    fresh = make_rows(3_000, seed=1)
    assert model.predict_proba(fresh.features, fresh.sequence).mean() == pytest.approx(fresh.label.mean(), rel=0.2)


def test_calibration_moves_the_mean_to_the_truth() -> None:
    model, fresh = make_model(), make_rows(3_000, seed=1)
    model.linear.bias.data += 2.0  # far too many alarms
    calibrate(model, fresh)
    assert model.predict_proba(fresh.features, fresh.sequence).mean() == pytest.approx(fresh.label.mean(), rel=0.05)


def test_training_twice_gives_the_same_bits() -> None:
    first, second = make_model(), make_model()
    for model in (first, second):
        train_in_process(model, ROWS, dataclasses.replace(RECIPE, epochs=1))
    assert all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )


def test_two_shares_of_a_batch_have_the_gradient_of_the_whole() -> None:
    recipe = dataclasses.replace(RECIPE, max_grad_norm=1e9)  # clipping happens after joining in real runs
    order = epoch_order(ROWS.label, seed=0, epoch=0, negative_rate=0.5)

    def gradient(rank: int, size: int) -> torch.Tensor:
        training = Training(make_model(), ROWS, recipe)
        training.axis = DataAxis(rank, size)  # without a process group: the mean below stands for the joining
        training.step(next(batches(order, 200, training.axis)))
        return torch.cat([p.grad.flatten() for p in training.model.parameters() if p.grad is not None])

    halves = torch.stack([gradient(rank, 2) for rank in (0, 1)])
    torch.testing.assert_close(halves.mean(0), gradient(0, 1), rtol=1e-4, atol=1e-6)


def test_workers_share_the_same_batches() -> None:
    order = np.arange(103)
    whole = [batch.rows for batch in batches(order, 10, DataAxis())]
    split = [list(batches(order, 10, DataAxis(rank, 3))) for rank in range(3)]
    for index, rows in enumerate(whole):
        assert sorted(np.concatenate([part[index].rows for part in split])) == sorted(rows)
        assert {part[index].total for part in split} == {len(rows)}
    assert len(whole) == num_batches(103, 10)


def test_an_epoch_holds_every_fraud_and_a_share_of_the_rest() -> None:
    first, again, other = (epoch_order(ROWS.label, 0, epoch, 0.25) for epoch in (0, 0, 1))
    frauds = np.flatnonzero(ROWS.label == 1)
    assert set(frauds) <= set(first)
    assert len(first) == len(frauds) + round((len(ROWS) - len(frauds)) * 0.25)
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert len(set(first)) == len(first)


def test_gathered_rows_stand_where_they_belong() -> None:
    assert gather_rows(np.array([1.0, 2.0]), 2, DataAxis()).tolist() == [1.0, 2.0]


def test_an_empty_share_of_a_batch_still_gives_gradients() -> None:
    training = Training(make_model(), ROWS, RECIPE)
    loss, _ = training.step(Batch(np.empty(0, dtype=np.int64), total=1))
    assert loss == 0.0
    assert all(p.grad is not None for p in training.model.parameters())


def test_the_learning_rate_rises_then_falls() -> None:
    rates = [learning_rate(step, 100, 1.0, 0.1) for step in range(100)]
    assert rates[9] == max(rates) == 1.0
    assert rates[:10] == sorted(rates[:10])
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert 0.02 <= rates[-1] < 0.03


def test_a_recipe_takes_the_settings_and_its_changes() -> None:
    recipe = Recipe.of(TrainConfig(epochs=9, lr=0.1), seed=3, lr=0.2)
    assert (recipe.epochs, recipe.lr, recipe.seed) == (9, 0.2, 3)


def test_rows_of_one_class_are_refused() -> None:
    genuine = ROWS.select(ROWS.label == 0)
    with pytest.raises(DataError, match="0 frauds"):
        Training(make_model(), genuine, RECIPE)


def test_a_record_holds_finite_numbers_only() -> None:
    history = train_in_process(make_model(), ROWS, dataclasses.replace(RECIPE, epochs=1))
    numbers = history[0].numbers()
    assert "average_precision" not in numbers
    assert all(math.isfinite(value) for value in numbers.values())


def test_a_recipe_has_no_defaults_beside_those_of_the_settings() -> None:
    fields = {field.name: field.default for field in dataclasses.fields(Recipe)}
    assert fields.pop("seed") == 0
    assert set(fields.values()) == {dataclasses.MISSING}
    assert fields.keys() <= TrainConfig.model_fields.keys()
