"""Clipping of sharded gradients equals plain torch on the whole model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deepseek_ray.config_moe import MoEConfig
from deepseek_ray.data.samples import RandomSamples
from deepseek_ray.parallel.launch import run_processes
from deepseek_ray.presets_moe import load_moe_preset
from deepseek_ray.train.clip import clip_by_global_norm, clip_by_unit
from deepseek_ray.train.parity import verification_config, whole
from deepseek_ray.train.pretraining import make_stepper
from tests.distributed.meshes import overrides

MESHES = ["dp_shard=2", "dp_shard=3", "dp_shard=2,tp=2,ep=2", "pp=2,dp_shard=2", "dp_replicate=2,tp=2"]


def config_of(mesh: str) -> MoEConfig:
    config = load_moe_preset("debug_moe", overrides=overrides(mesh, step__precision="float64", backbone__qk_norm=True))
    return verification_config(config)


def clipped(config: MoEConfig, max_norm: float, ratio: float) -> tuple[float, dict[str, tuple[Tensor, Tensor, Tensor]]]:
    """The norm; and by name: weight, gradient before and after, of this stage, whole, from one of its processes."""
    samples = RandomSamples(config.backbone, config.corpus.seq_len, config.seed, torch.float64)
    stepper = make_stepper(config, samples, torch.device("cpu"))
    stepper.backward(0)
    mesh, named = stepper.model.mesh, list(stepper.model.named_parameters())
    before = {name: whole(weight.grad).clone() for name, weight in named}
    if ratio:
        clip_by_unit(named, ratio)
    norm = float(clip_by_global_norm((weight for _, weight in named), max_norm, mesh.group("pp")))
    found = {name: (whole(weight), before[name], whole(weight.grad).clone()) for name, weight in named}
    return norm, found if mesh.rank("dp") == mesh.rank("tp") == 0 else {}


def run(mesh: str, max_norm: float, ratio: float = 0.0) -> tuple[list[float], dict[str, Any]]:
    config = config_of(mesh)
    results = run_processes(config.parallel.world, clipped, config, max_norm, ratio)
    return [norm for norm, _ in results], {name: value for _, part in results for name, value in part.items()}


def plain_units(name: str, tensor: Tensor) -> Tensor:
    """Norm of each output's weights, shaped to scale the tensor: one output, one expert at a time."""
    if name.endswith("up_ED2I"):
        rows = [[[one[:, k, i].norm() for i in range(one.shape[2])] for k in range(2)] for one in tensor]
        return torch.tensor(rows, dtype=tensor.dtype).unsqueeze(1)
    if name.endswith("down_EID"):
        return torch.tensor([[one[:, d].norm() for d in range(one.shape[1])] for one in tensor]).double().unsqueeze(1)
    if name.endswith("up_2HD"):
        return torch.tensor([[row.norm() for row in one] for one in tensor], dtype=tensor.dtype).unsqueeze(-1)
    return torch.tensor([row.norm() for row in tensor], dtype=tensor.dtype).unsqueeze(-1)


@pytest.mark.parametrize("mesh", MESHES)
def test_the_global_norm_is_that_of_the_whole_model(mesh: str) -> None:
    norms, found = run(mesh, 0.05)
    weights = []
    for _, gradient, _ in found.values():
        weights.append(nn.Parameter(torch.zeros_like(gradient)))
        weights[-1].grad = gradient.clone()
    wanted = float(nn.utils.clip_grad_norm_(weights, 0.05))
    assert wanted > 0.1, "the test must clip"
    assert norms == pytest.approx([wanted] * len(norms), rel=1e-12)
    for weight, (name, (_, _, after)) in zip(weights, found.items(), strict=True):
        # torch divides by the norm plus 1e-6
        torch.testing.assert_close(after, weight.grad, rtol=1e-4, atol=0, msg=lambda t, name=name: f"{name}: {t}")
        torch.testing.assert_close(after, found[name][1] * (0.05 / wanted), rtol=1e-12, atol=0)


@pytest.mark.parametrize("mesh", MESHES)
def test_units_are_those_of_the_whole_model(mesh: str) -> None:
    ratio = 0.02
    _, found = run(mesh, 0.0, ratio)
    touched = 0
    for name, (weight, before, after) in found.items():
        wanted = before
        if weight.ndim > 1:
            most, norm = plain_units(name, weight).clamp(min=1e-3) * ratio, plain_units(name, before)
            wanted = torch.where(norm > most, before * most / norm.clamp(min=1e-12), before)
            touched += int((norm > most).sum())
        torch.testing.assert_close(after, wanted, rtol=1e-11, atol=1e-18, msg=lambda t, name=name: f"{name}: {t}")
    units = sum(plain_units(name, weight).numel() for name, (weight, _, _) in found.items() if weight.ndim > 1)
    assert 0 < touched < units, "the test must clip some units and leave others"


@pytest.mark.parametrize("max_norm", [0.0, 1e6])
def test_gradients_below_the_bound_and_without_one_stay_bit_by_bit(max_norm: float) -> None:
    norms, found = run("dp_shard=2,tp=2", max_norm)
    assert norms[0] > 0
    assert all(torch.equal(before, after) for _, before, after in found.values())
