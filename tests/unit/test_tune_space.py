"""The search space is data that fits the config, so that each trial is a line of --set."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from deepseek_ray.config import Config, build_config
from deepseek_ray.models import RiskModel, RiskModelConfig
from tune_spaces.risk import SPACE

KINDS = {"uniform", "loguniform", "choice"}


def ends(spec: dict[str, Any]) -> list[Any]:
    """Every value of a choice, both ends of an interval."""
    ((_, values),) = spec.items()
    return values


@pytest.mark.parametrize("setting", SPACE)
def test_each_setting_has_one_distribution_whose_values_the_config_takes(setting: str) -> None:
    assert len(SPACE[setting]) == 1
    assert SPACE[setting].keys() <= KINDS
    for value in ends(SPACE[setting]):
        section, name = setting.split(".")
        config = build_config({}, overrides={setting: value})
        assert getattr(getattr(config, section), name) == value


@pytest.mark.parametrize("setting", [name for name, spec in SPACE.items() if "choice" not in spec])
def test_an_interval_is_not_empty(setting: str) -> None:
    low, high = ends(SPACE[setting])
    assert low < high
    assert low > 0 or "loguniform" not in SPACE[setting]


def test_a_choice_offers_each_value_once() -> None:
    for spec in SPACE.values():
        if "choice" in spec:
            assert len(set(spec["choice"])) == len(spec["choice"]) > 1


def test_the_default_lies_inside_the_space() -> None:
    config = Config()
    for setting, spec in SPACE.items():
        section, name = setting.split(".")
        value = getattr(getattr(config, section), name)
        assert value in spec["choice"] if "choice" in spec else min(ends(spec)) <= value <= max(ends(spec))


@pytest.mark.parametrize("seed", range(20))
def test_any_corner_of_the_space_is_a_model(seed: int) -> None:
    rng = random.Random(seed)
    config = build_config({}, overrides={name: rng.choice(ends(spec)) for name, spec in SPACE.items()})
    model = RiskModel(RiskModelConfig(feature_names=("a", "b"), sequence_len=4, shape=config.model))
    assert model(torch.zeros(3, 2), torch.zeros(3, 4, 6)).shape == (3,)
