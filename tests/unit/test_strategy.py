"""Each strategy against plain fine-tuning on a task of two patterns: it learns the new one and forgets less."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import deepseek_ray.models as models
from deepseek_ray.config import UpdateConfig
from deepseek_ray.errors import DataError, EnvironmentProblemError
from deepseek_ray.online.distillation import Derpp, Lwf
from deepseek_ray.online.ewc import fisher_information
from deepseek_ray.online.replay import Reservoir
from deepseek_ray.online.strategy import Material, Strategy
from deepseek_ray.online.updater import STRATEGIES, remember, warm_start
from deepseek_ray.train.step import Recipe
from tests.unit.update_parts import (  # noqa: F401 - a fixture
    NEW,
    NEW_TEST,
    OLD,
    OLD_TEST,
    SHAPE,
    TRAIN,
    one_thread,
    precision,
    train_on,
)  # fmt: skip

CONFIG = UpdateConfig(epochs=8, lr=3e-3, replay_fraction=0.5, min_labels=20)
SETTINGS: dict[str, dict[str, Any]] = {"lwf": {"lwf_weight": 0.3}, "ewc": {"ewc_rows": 128}}


@pytest.fixture(scope="module")
def champion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that knows the old season only."""
    return train_on(OLD, NEW, SHAPE, epochs=8).save_pretrained(tmp_path_factory.mktemp("champion"))


@pytest.fixture
def memory() -> Reservoir:
    memory = Reservoir(400)
    remember(memory, OLD)
    return memory


def challenger(champion: Path, memory: Reservoir, target: Path, *, plain: bool = False, **changes: Any) -> Path:
    config = CONFIG.model_copy(update=changes)
    return warm_start(champion, NEW, memory, target, config, TRAIN, strategy=Strategy if plain else None).model_dir


@pytest.fixture(scope="module")
def naive(champion: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fine-tuned on the new season alone."""
    return challenger(champion, Reservoir(1), tmp_path_factory.mktemp("naive"), plain=True)


def test_plain_fine_tuning_learns_and_forgets(champion: Path, naive: Path) -> None:
    assert precision(champion, OLD_TEST) > 0.9
    assert precision(champion, NEW_TEST) < 0.3
    assert precision(naive, NEW_TEST) > 0.8
    assert precision(naive, OLD_TEST) < precision(champion, OLD_TEST) - 0.1


@pytest.mark.parametrize("name", STRATEGIES)
def test_each_strategy_learns_the_new_and_forgets_less(
    name: str, champion: Path, naive: Path, memory: Reservoir, tmp_path: Path
) -> None:
    if name == "lora":
        pytest.importorskip("peft")
    made = challenger(champion, memory, tmp_path, strategy=name, **SETTINGS.get(name, {}))
    before, plain, kept = (precision(one, OLD_TEST) for one in (champion, naive, made))
    assert kept > plain + 0.02, f"{before:.3f} -> {kept:.3f}, plain {plain:.3f}"
    assert precision(made, NEW_TEST) > 0.7
    assert models.load(made).config == models.load(champion).config


def test_ewc_holds_the_weights_that_old_answers_depend_on(champion: Path, memory: Reservoir, tmp_path: Path) -> None:
    before = models.load(champion, torch.float32)
    fisher = fisher_information(before, memory, 64, negative_rate=0.5, seed=0)
    assert set(fisher) == {name for name, _ in before.named_parameters()}
    assert all((one >= 0).all() for one in fisher.values())

    def moved(strength: float) -> float:
        made = challenger(champion, memory, tmp_path, strategy="ewc", ewc_strength=strength, ewc_rows=64, epochs=4)
        after = dict(models.load(made, torch.float32).named_parameters())
        return sum(
            float((fisher[name] * (after[name] - one).square()).sum().detach())
            for name, one in before.named_parameters()
        )

    assert moved(100.0) < 0.5 * moved(0.0)


def test_ewc_needs_old_rows(champion: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="lacks a class"):
        challenger(champion, Reservoir(1), tmp_path, strategy="ewc")


def test_an_adapter_leaves_every_other_weight_as_it_was(champion: Path, memory: Reservoir, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    made = challenger(champion, memory, tmp_path, strategy="lora", lora_rank=2, epochs=1)
    before, after = (models.load(path).state_dict() for path in (champion, made))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    linear = {f"{name}.weight" for name, one in models.load(champion).named_modules() if isinstance(one, nn.Linear)}
    assert changed
    assert changed <= linear
    difference = after["embed.weight"] - before["embed.weight"]
    assert torch.linalg.matrix_rank(difference, rtol=1e-4) <= 2


def test_without_peft_the_error_names_the_package(
    champion: Path, memory: Reservoir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(EnvironmentProblemError, match=r"deepseek-ray\[lora\]"):
        challenger(champion, memory, tmp_path, strategy="lora")


def test_stored_answers_win_over_the_champions(champion: Path, tmp_path: Path) -> None:
    memory = Reservoir(400)
    remember(memory, OLD, np.full(len(OLD), 3.0))
    material = Material(NEW, memory, CONFIG.model_copy(update={"derpp_alpha": 1.0}), Recipe.of(TRAIN))
    plan = Derpp(material)
    plan.prepare(models.load(champion, torch.float32))
    plan.epoch(0)
    old = np.arange(len(NEW), len(NEW) + 4)
    assert float(plan.penalty(torch.full((4,), 5.0), old)) == 4.0
    assert float(plan.penalty(torch.full((4,), 5.0), old - 10)) < 4.0  # new rows have no stored answer
    assert float(plan.penalty(torch.zeros(2), np.arange(2))) == 0.0


def test_agreeing_with_the_champion_costs_nothing(champion: Path) -> None:
    model = models.load(champion, torch.float32)
    plan = Lwf(Material(NEW, Reservoir(1), CONFIG, Recipe.of(TRAIN)))
    plan.prepare(model)
    rows = np.arange(50)
    own = torch.from_numpy(model.predict_logits(NEW.features[rows], NEW.sequence[rows])).float()
    assert float(plan.penalty(own, rows)) == pytest.approx(0.0, abs=1e-6)
    assert float(plan.penalty(own + 1, rows)) > 0.01
