"""The risk model: encoding, batch independence, explanation, calibration, files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from deepseek_ray import models
from deepseek_ray.config import TrainConfig
from deepseek_ray.errors import ModelFormatError
from deepseek_ray.models import RiskModel
from deepseek_ray.models.events import FeatureAdapter
from deepseek_ray.models.heads.calibration import PlattScaling
from deepseek_ray.train.step import Recipe, train_in_process
from tests.unit.risk_rows import SHAPE, make_config, make_rows

ROWS = make_rows()


@pytest.fixture(scope="module")
def trained() -> RiskModel:
    torch.manual_seed(0)
    model = RiskModel(make_config(ROWS))
    model.prepare(ROWS.features, ROWS.label)
    train_in_process(model, ROWS, Recipe.of(TrainConfig(epochs=2, batch_size=200, lr=5e-3)))
    return model


@pytest.fixture
def folder(trained: RiskModel, tmp_path: Path) -> Path:
    return trained.save_pretrained(tmp_path / "model")


def test_a_score_does_not_depend_on_its_batch(folder: Path) -> None:
    model = models.load(folder)
    together = model.predict_proba(ROWS.features, ROWS.sequence)
    alone = [model.predict_proba(ROWS.features[i : i + 1], ROWS.sequence[i : i + 1])[0] for i in range(50)]
    assert together.dtype == np.float64
    np.testing.assert_allclose(alone, together[:50], rtol=0, atol=1e-12)
    mixed = model.predict_proba(ROWS.features[::-1], ROWS.sequence[::-1])[::-1]
    np.testing.assert_allclose(mixed, together, rtol=0, atol=1e-12)


def test_no_rows_give_no_scores(folder: Path) -> None:
    assert models.load(folder).predict_proba(ROWS.features[:0], ROWS.sequence[:0]).shape == (0,)


def test_saving_and_loading_keeps_every_score(trained: RiskModel, folder: Path) -> None:
    again = models.load(models.load(folder).save_pretrained(folder.parent / "again"))
    first = models.load(folder).predict_proba(ROWS.features, ROWS.sequence)
    assert np.array_equal(first, again.predict_proba(ROWS.features, ROWS.sequence))
    np.testing.assert_allclose(first, trained.predict_proba(ROWS.features, ROWS.sequence), atol=1e-5)


def test_the_encoding_is_piecewise_linear_between_the_edges() -> None:
    adapter = FeatureAdapter(2, 4)
    values = np.stack([np.arange(100), np.full(100, 7)], axis=1).astype(np.float32)
    adapter.fit(values)
    grid = torch.linspace(0, 99, 34)
    code = adapter(torch.stack([grid, torch.full_like(grid, 7)], 1)).unflatten(1, (2, 4))
    total = code[:, 0].sum(-1)
    assert (total.diff() > 0).all()  # monotone
    assert total[0] == 0
    assert total[-1] == pytest.approx(4)  # each bin full at the end
    assert torch.equal(adapter(torch.tensor([[-1e9, 7.0]])), adapter(torch.tensor([[0.0, 7.0]])))  # clamped
    assert (code[:, 1] == 0).all()  # a constant says nothing


def test_a_count_that_is_mostly_zero_keeps_its_rare_values_apart() -> None:
    rng = np.random.default_rng(0)
    values = np.where(rng.random(5_000) < 0.98, 0, rng.integers(1, 50, 5_000)).astype(np.float32)[:, None]
    adapter = FeatureAdapter(1, 8)
    adapter.fit(values, (values[:, 0] > 20).astype(np.int8))
    few, many = adapter(torch.tensor([[5.0], [40.0]]))
    assert (few - many).abs().max() > 0.9


def test_attribution_adds_up_for_the_additive_part(folder: Path) -> None:
    model = models.load(folder)
    with torch.no_grad():
        model.head.weight.zero_()  # only the additive part is left
    share = model.attribute(ROWS.features[:20], ROWS.sequence[:20])
    middle = np.tile(model.features.median_F.numpy(), (20, 1))
    gap = model.predict_logits(ROWS.features[:20], ROWS.sequence[:20]) - model.predict_logits(
        middle, ROWS.sequence[:20]
    )
    np.testing.assert_allclose(share.sum(1), gap * float(model.calibration.scale), atol=1e-9)


def test_attribution_names_the_feature_that_matters(folder: Path) -> None:
    share = np.abs(models.load(folder).attribute(ROWS.features, ROWS.sequence)).mean(0)
    assert share.argmax() == 0


def test_calibration_recovers_a_known_line() -> None:
    rng = np.random.default_rng(0)
    logit = rng.normal(-2, 2, 50_000)
    label = (rng.random(50_000) < 1 / (1 + np.exp(-(0.5 * logit - 1)))).astype(np.int8)
    scaling = PlattScaling()
    scaling.fit(logit, label)
    assert float(scaling.scale) == pytest.approx(0.5, abs=0.03)
    assert float(scaling.shift) == pytest.approx(-1, abs=0.06)


def test_calibration_on_one_class_changes_nothing() -> None:
    scaling = PlattScaling()
    scaling.fit(np.zeros(10), np.zeros(10, dtype=np.int8))
    assert (float(scaling.scale), float(scaling.shift)) == (1.0, 0.0)


def test_the_dense_ablation_has_the_active_size_and_no_experts() -> None:
    moe, dense = RiskModel(make_config(ROWS)), RiskModel(make_config(ROWS, dense=True))
    router = SHAPE.num_layers * SHAPE.num_experts * SHAPE.d_model
    total, active = (sum(weight.numel() for weight in model.parameters()) for model in (moe, dense))
    one_expert = sum(weight[0].numel() for weight in moe.experts[0].experts.parameters())
    idle = SHAPE.num_layers * (SHAPE.num_experts - SHAPE.top_k)
    assert active == total - router - idle * one_expert
    assert dense.experts == []
    assert dense.expert_load(ROWS.features, ROWS.sequence).size == 0


def test_the_load_of_every_layer_sums_to_one(trained: RiskModel) -> None:
    load = trained.expert_load(ROWS.features, ROWS.sequence)
    assert load.shape == (SHAPE.num_layers, SHAPE.num_experts)
    np.testing.assert_allclose(load.sum(1), 1)
    assert load.min() > 0.01


def test_a_model_without_sequence_scores_too() -> None:
    rows = make_rows(sequence_len=0)
    model = RiskModel(make_config(rows))
    model.prepare(rows.features, rows.label)
    assert model.predict_proba(rows.features[:3], rows.sequence[:3]).shape == (3,)


def test_rows_of_another_vector_are_refused(trained: RiskModel) -> None:
    with pytest.raises(ModelFormatError, match="do not fit a model made for"):
        trained.predict_proba(ROWS.features[:, :3], ROWS.sequence)


@pytest.mark.parametrize("damage", ["weights", "config", "format", "json", "absent"])
def test_a_damaged_model_is_refused(folder: Path, damage: str) -> None:
    config = folder / "config.json"
    description = json.loads(config.read_text())
    if damage == "weights":
        content = bytearray((folder / "model.safetensors").read_bytes())
        content[-1] ^= 1
        (folder / "model.safetensors").write_bytes(content)
    elif damage == "config":
        description["config"]["feature_names"].reverse()
        config.write_text(json.dumps(description))
    elif damage == "format":
        config.write_text(json.dumps(description | {"format": "other/9"}))
    elif damage == "json":
        config.write_text("{")
    else:
        config.unlink()
    with pytest.raises(ModelFormatError):
        models.load(folder)
