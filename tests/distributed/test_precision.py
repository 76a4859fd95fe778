"""A mesh and one process compute in the same low precision."""

from __future__ import annotations

import pytest
import torch

from deepseek_ray.config_moe import MoEConfig, ParallelConfig
from deepseek_ray.data.samples import RandomSamples
from deepseek_ray.parallel.launch import run_processes
from deepseek_ray.presets_moe import load_moe_preset
from deepseek_ray.train.parity import verification_config
from deepseek_ray.train.pretraining import make_stepper
from tests.distributed.meshes import overrides


def losses(config: MoEConfig) -> list[float]:
    samples = RandomSamples(config.backbone, config.corpus.seq_len, config.seed)
    stepper = make_stepper(config, samples, torch.device("cpu"))
    return [stepper.step(number).loss for number in range(3)]


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
@pytest.mark.parametrize("mesh", ["dp_shard=2,ep=2", "pp=2,tp=2"])
def test_losses_of_a_mesh_are_near_those_of_one_process(mesh: str, precision: str) -> None:
    shape = {"backbone__adapter": "events", "backbone__num_channels": 3}
    config = verification_config(
        load_moe_preset("debug_moe", overrides=overrides(mesh, step__precision=precision, **shape))
    )
    wanted = losses(config.model_copy(update={"parallel": ParallelConfig()}))
    found = run_processes(config.parallel.world, losses, config)
    assert all(one == found[0] for one in found)
    assert found[0] == pytest.approx(wanted, rel=2e-3)
