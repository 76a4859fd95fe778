"""Number formats by hardware, the scale of float16, and training in both low precisions on a CPU."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from deepseek_ray.config_moe import MoEConfig
from deepseek_ray.data.corpus import Corpus
from deepseek_ray.data.samples import RandomSamples
from deepseek_ray.errors import ConfigError
from deepseek_ray.presets_moe import load_moe_preset
from deepseek_ray.train.precision import LossScale, precision_of, unscale
from deepseek_ray.train.pretrain_step import Stepper
from deepseek_ray.train.pretraining import make_stepper

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def config_of(*settings: str) -> MoEConfig:
    return load_moe_preset("debug_moe", overrides=["step.warmup_fraction=0", "step.lr=3e-3", *settings])


def stepper_of(*settings: str) -> Stepper:
    config = config_of(*settings)
    return make_stepper(config, RandomSamples(config.backbone, config.corpus.seq_len, config.seed), CPU)


def gradients(stepper: Stepper) -> dict[str, torch.Tensor]:
    return {name: weight.grad for name, weight in stepper.model.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize(
    ("device", "has_bfloat16", "wanted"),
    [(CPU, True, torch.float32), (CUDA, True, torch.bfloat16), (CUDA, False, torch.float16)],
)
def test_auto_follows_the_device(
    device: torch.device, has_bfloat16: bool, wanted: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: has_bfloat16)
    assert precision_of("auto", device) == (torch.float32, wanted)


def test_weights_stay_float32_unless_all_is_float64() -> None:
    assert precision_of("float64", CPU) == (torch.float64, torch.float64)
    assert precision_of("float32", CPU) == (torch.float32, torch.float32)
    assert precision_of("float16", CPU) == (torch.float32, torch.float16)


def test_a_gpu_without_bfloat16_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
    with pytest.raises(ConfigError, match=r"step\.precision = 'bfloat16'.*float16"):
        precision_of("bfloat16", CUDA)


def test_the_scale_halves_at_once_and_doubles_after_calm() -> None:
    scale = LossScale(value=8.0, calm_steps=3)
    seen = []
    for finite in (True, True, False, True, True, True, True):
        scale.update(finite=finite)
        seen.append(scale.value)
    assert seen == [8, 8, 4, 4, 4, 8, 8]


def test_the_scale_never_falls_below_one() -> None:
    scale = LossScale(value=1.0)
    scale.update(finite=False)
    assert scale.value == 1.0


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_unscale_divides_and_finds_what_is_not_finite(bad: float) -> None:
    weights = [nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1))]
    weights[0].grad, weights[1].grad = torch.tensor([4.0, -8.0, 0.0]), torch.tensor([2.0, 2.0])
    assert unscale(weights, 4.0)
    assert weights[0].grad.tolist() == [1.0, -2.0, 0.0]
    weights[1].grad[1] = bad
    assert not unscale(weights, 1.0)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_low_precision_trains_on_a_cpu(precision: str) -> None:
    config = config_of(f"step.precision={precision}")
    stepper = make_stepper(config, Corpus(config.corpus, config.seed), CPU)
    losses = [stepper.step(number).loss for number in range(config.step.steps)]
    assert losses[-1] < 0.9 * losses[0]
    assert {weight.dtype for _, weight in stepper.model.named_parameters()} == {torch.float32}


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_one_process_computes_in_the_precision_it_is_told(precision: str, recompute: str) -> None:
    stepper = stepper_of(f"step.precision={precision}", f"step.recompute={recompute}", "backbone.adapter=events")
    (model,) = stepper.model.parts.values()
    seen: set[torch.dtype] = set()
    for block in model.layers.values():
        block.register_forward_hook(lambda _, __, y: seen.add(y.dtype))
    stepper.backward(0)
    assert seen == {getattr(torch, precision)}
    assert {gradient.dtype for gradient in gradients(stepper).values()} == {torch.float32}


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_low_precision_gradients_point_the_same_way(precision: str) -> None:
    low, high = stepper_of(f"step.precision={precision}"), stepper_of("step.precision=float32")
    assert low.backward(0) == pytest.approx(high.backward(0), rel=1e-2)
    wanted = torch.cat([gradient.flatten() for gradient in gradients(high).values()])
    found = torch.cat([gradient.flatten() for gradient in gradients(low).values()])
    assert torch.cosine_similarity(wanted, found, dim=0) > 0.99
    assert not torch.equal(wanted, found / low.model.loss_scale)


def test_an_overflow_skips_the_step_and_leaves_the_weights() -> None:
    stepper = stepper_of("step.precision=float16")
    assert stepper.scale is not None
    stepper.scale.value = stepper.model.loss_scale = 2.0**40
    before = {name: weight.detach().clone() for name, weight in stepper.model.named_parameters()}
    report = stepper.step(0)
    assert math.isinf(report.grad_norm)
    assert stepper.scale.value == stepper.model.loss_scale == 2.0**39
    assert all(torch.equal(weight, before[name]) for name, weight in stepper.model.named_parameters())
    assert not stepper.optimiser.state
