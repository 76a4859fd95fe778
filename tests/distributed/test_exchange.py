"""Sparse gradient exchange: nothing is lost, little is sent, training goes on as well."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist

from deepseek_ray.config_moe import MoEConfig
from deepseek_ray.data.corpus import Corpus
from deepseek_ray.data.samples import Samples
from deepseek_ray.parallel.exchange import TopK
from deepseek_ray.parallel.launch import run_processes
from deepseek_ray.presets_moe import load_moe_preset
from deepseek_ray.train.pretraining import make_stepper
from tests.distributed.meshes import overrides

STEPS, FRACTION = 6, 0.1
SHAPES = {"matrix": (7, 11), "vector": (13,), "one": (1,)}


def drawn(rank: int, step: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(100 * rank + step)
    return {name: torch.randn(shape, generator=draw, dtype=torch.float64) for name, shape in SHAPES.items()}


def exchanged(flush_last: bool) -> dict[str, Any]:
    """Sums over all steps: of what came back, of what is still kept here."""
    exchange = TopK(dist.group.WORLD, FRACTION)
    weights = {name: nn.Parameter(torch.zeros(shape, dtype=torch.float64)) for name, shape in SHAPES.items()}
    arrived = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in SHAPES.items()}
    nonzero = []
    for step in range(STEPS):
        for name, gradient in drawn(dist.get_rank(), step).items():
            weights[name].grad = gradient
        exchange.sum_gradients(list(weights.items()), flush=flush_last and step == STEPS - 1)
        nonzero.append(int((weights["matrix"].grad != 0).sum()))
        for name, weight in weights.items():
            arrived[name] += weight.grad
    kept = {name: exchange._kept.get(name, torch.zeros(())).expand(weights[name].numel()) for name in SHAPES}
    return {"arrived": arrived, "kept": kept, "nonzero": nonzero}


@pytest.mark.parametrize("flush", [False, True])
def test_what_was_sent_and_what_is_kept_is_all_there_was(flush: bool) -> None:
    results = run_processes(3, exchanged, flush)
    for name, shape in SHAPES.items():
        dense = sum(drawn(rank, step)[name] for rank in range(3) for step in range(STEPS))
        kept = sum(one["kept"][name].view(shape) for one in results)
        torch.testing.assert_close(results[0]["arrived"][name] + kept, dense, rtol=1e-12, atol=1e-12)
        assert not flush or not kept.any()
        assert all(torch.equal(one["arrived"][name], results[0]["arrived"][name]) for one in results)
    assert 8 <= max(results[0]["nonzero"][:-1]) <= 3 * 8  # ceil(0.1 * 77) of each of three
    if not flush:
        assert sum(one["kept"]["matrix"].abs().sum() for one in results) > 1


def overflow_before_a_checkpoint(config: MoEConfig) -> tuple[float, int]:
    stepper = make_stepper(config, corpus(), torch.device("cpu"))
    assert isinstance(stepper.exchange, TopK)
    assert stepper.scale is not None
    stepper.step(0)
    assert stepper.exchange._kept
    stepper.scale.value = stepper.model.loss_scale = 2.0**40
    return stepper.step(1).grad_norm, len(stepper.exchange._kept)


def test_what_is_kept_gets_into_the_checkpoint_of_a_step_that_overflows() -> None:
    settings = {"step__exchange": "top_k", "step__precision": "float16", "step__checkpoint_every": 2}
    config = load_moe_preset("debug_moe", overrides=overrides("dp_replicate=2", **settings))
    for norm, left in run_processes(2, overflow_before_a_checkpoint, config):
        assert 0 < norm < math.inf
        assert left == 0


@cache
def corpus() -> Corpus:
    config = load_moe_preset("debug_moe")
    return Corpus(config.corpus, config.seed)


def trained(config: MoEConfig, samples: Samples, steps: int) -> tuple[list[float], int, int, int]:
    """Losses; bytes handed to collectives in the exchange, bytes it counted, bytes of the dense gradients."""
    stepper = make_stepper(config, samples, torch.device("cpu"))
    if stepper.exchange is None:
        return [stepper.step(number).loss for number in range(steps)], 0, 0, 0
    handed = 0
    gather, reduce = dist.all_gather, dist.all_reduce

    def counting_gather(parts: list[Tensor], part: Tensor, group: Any = None) -> None:
        nonlocal handed
        handed += part.nbytes
        gather(parts, part, group=group)

    def counting_reduce(tensor: Tensor, group: Any = None) -> None:
        nonlocal handed
        handed += tensor.nbytes
        reduce(tensor, group=group)

    honest = stepper.exchange.sum_gradients

    def watched(weights: Any, *, flush: bool) -> None:
        dist.all_gather, dist.all_reduce = counting_gather, counting_reduce
        honest(weights, flush=flush)
        dist.all_gather, dist.all_reduce = gather, reduce

    stepper.exchange.sum_gradients = watched  # type: ignore[method-assign]
    losses = [stepper.step(number).loss for number in range(steps)]
    return losses, handed, stepper.exchange.sent_bytes, stepper.exchange.dense_bytes


def train(mesh: str, steps: int, **settings: object) -> list[tuple[list[float], int, int, int]]:
    config = load_moe_preset("debug_moe", overrides=overrides(mesh, **settings))
    return run_processes(config.parallel.world, trained, config, corpus(), steps)


def test_a_twentieth_of_the_gradient_trains_nearly_as_well() -> None:
    settings = {"step__lr": 3e-3, "step__steps": 40, "step__batch_size": 8, "step__checkpoint_every": 20}
    losses, handed, counted, dense = train(
        "dp_replicate=2", 40, step__exchange="top_k", step__top_k_fraction=0.05, **settings
    )[0]
    wanted = train("dp_replicate=2", 40, **settings)[0][0]
    assert handed == counted
    assert handed <= 0.33 * dense
    fall, wanted_fall = (one[0] - sum(one[-5:]) / 5 for one in (losses, wanted))
    assert wanted_fall > 1.5
    assert fall >= 0.85 * wanted_fall


@pytest.mark.parametrize("mesh", ["dp_replicate=2", "dp_replicate=2,dp_shard=2,ep=2", "pp=2,dp_replicate=2"])
def test_the_whole_gradient_sent_sparsely_is_all_reduce(mesh: str) -> None:
    settings = {"step__precision": "float64", "step__checkpoint_every": 4, "step__micro_batch_size": 1}
    sparse = train(mesh, 5, step__exchange="top_k", step__top_k_fraction=1.0, **settings)
    wanted = train(mesh, 5, **settings)
    assert sparse[0][0] == pytest.approx(wanted[0][0], rel=1e-12)
    assert all(one[0] == sparse[0][0] for one in sparse)


def test_half_the_gradient_is_not_all_reduce() -> None:
    settings = {"step__precision": "float64", "step__checkpoint_every": 4}
    sparse = train("dp_replicate=2", 3, step__exchange="top_k", step__top_k_fraction=0.5, **settings)
    assert sparse[0][0][1:] != pytest.approx(train("dp_replicate=2", 3, **settings)[0][0][1:], rel=1e-9)


def test_an_overflow_leaves_what_is_kept_alone() -> None:
    config = load_moe_preset(
        "debug_moe", overrides=overrides("dp_replicate=2", step__exchange="top_k", step__precision="float16")
    )
    assert run_processes(2, overflowed, config, corpus()) == [True, True]


def overflowed(config: MoEConfig, samples: Samples) -> bool:
    """Whether the exchange's state is finite and unchanged after a step that overflowed."""
    stepper = make_stepper(config, samples, torch.device("cpu"))
    stepper.step(0)
    assert isinstance(stepper.exchange, TopK)
    before = {name: kept.clone() for name, kept in stepper.exchange._kept.items()}
    stepper.scale.value = stepper.model.loss_scale = 2.0**40  # type: ignore[union-attr]
    stepper.step(1)
    after = stepper.exchange._kept
    return bool(before) and all(torch.equal(after[name], kept) for name, kept in before.items())
