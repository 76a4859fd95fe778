"""A checkpoint is the same on every mesh, to the last bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from deepseek_ray.config_moe import MoEConfig
from deepseek_ray.presets_moe import load_moe_preset
from deepseek_ray.train import reshard
from deepseek_ray.train.reshard import verify_checkpoint
from tests.distributed.meshes import overrides

CUBE = "pp=2,dp_shard=2,tp=2"
OTHERS = ["", "dp_shard=4", "tp=4", "pp=4", "dp_shard=3", "dp_shard=2,ep=2"]
FAST = [(CUBE, "dp_shard=3"), ("dp_shard=2,ep=2", "tp=2"), ("", "pp=2")]


def config_of(mesh: str, schedule: str = "1F1B", dtype: str = "float32") -> MoEConfig:
    settings = {"step__batch_size": 24, "step__micro_batch_size": 1, "step__precision": dtype}
    return load_moe_preset("debug_moe", overrides=overrides(mesh, schedule, **settings))


def check(source: MoEConfig, target: MoEConfig) -> None:
    result = verify_checkpoint(source, target)
    assert result["pass"], result
    assert result["world_sizes"] == [source.parallel.world, target.parallel.world]
    assert result["tensors"] > 100
    assert result["bytes"] > 3 * 4 * 100_000  # weights and two moments


@pytest.mark.parametrize(("source", "target"), FAST)
def test_a_few_meshes(source: str, target: str) -> None:
    check(config_of(source), config_of(target))


@pytest.mark.slow
@pytest.mark.parametrize("other", OTHERS)
def test_all_axes_to_every_other_mesh(other: str) -> None:
    check(config_of(CUBE), config_of(other))


@pytest.mark.slow
@pytest.mark.parametrize("other", OTHERS)
def test_and_back(other: str) -> None:
    check(config_of(other), config_of(CUBE))


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["ZBVZeroBubble", "Interleaved1F1B"])
def test_two_stages_a_process_and_float64(schedule: str) -> None:
    check(config_of("pp=2,dp_shard=2,ep=2", schedule, "float64"), config_of("dp_replicate=2,tp=2", dtype="float64"))


def test_one_bit_that_changed_on_the_way_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = reshard.load_and_save

    def careless(config: MoEConfig, source: Path, target: Path) -> None:
        load = reshard.load_newest

        def load_and_flip(*arguments: Any) -> int:
            done = load(*arguments)
            weight = dict(arguments[2].model.named_parameters())["layers.1.attention_norm.weight_D"]
            torch.Tensor.view(reshard.whole(weight), torch.int32)[3] ^= 1
            return done

        reshard.load_newest = load_and_flip
        honest(config, source, target)

    monkeypatch.setattr(reshard, "load_and_save", careless)
    result = verify_checkpoint(config_of("dp_replicate=2"), config_of("tp=2"))
    assert not result["pass"]
    assert result["different"] == ["model.layers.1.attention_norm.weight_D"]
