"""One step of pretraining: the learning rate's corners, accumulation of gradients, what decays."""

from __future__ import annotations

import math

import pytest
import torch

from deepseek_ray.config_moe import StepConfig
from deepseek_ray.data.samples import RandomSamples
from deepseek_ray.errors import DivergedError
from deepseek_ray.presets_moe import load_moe_preset
from deepseek_ray.train.pretrain_step import Stepper
from deepseek_ray.train.pretraining import make_stepper
from deepseek_ray.train.schedule import learning_rate


def rates(**settings: object) -> list[float]:
    step = StepConfig.model_validate({"steps": 100, "lr": 1.0, "warmup_fraction": 0.1, **settings})
    return [learning_rate(number, step) for number in range(step.steps)]


def stepper_of(*settings: str) -> Stepper:
    config = load_moe_preset("debug_moe", overrides=["step.precision=float64", *settings])
    samples = RandomSamples(config.backbone, config.corpus.seq_len, config.seed, torch.float64)
    return make_stepper(config, samples, torch.device("cpu"))


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
def test_warm_up_is_linear_and_reaches_the_peak(schedule: str) -> None:
    found = rates(schedule=schedule)
    assert found[:10] == pytest.approx([(n + 1) / 10 for n in range(10)])
    assert found[9] == found[10] == 1.0


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
def test_without_warm_up_it_starts_at_the_peak(schedule: str) -> None:
    assert rates(schedule=schedule, warmup_fraction=0.0)[0] == 1.0


def test_cosine_passes_the_middle_and_ends_near_a_tenth() -> None:
    found = rates(schedule="cosine", warmup_fraction=0.0)
    assert found[50] == pytest.approx(0.55)
    assert 0.1 < found[99] < 0.101
    assert found == sorted(found, reverse=True)
    step = StepConfig(steps=100, lr=1.0, warmup_fraction=0.0)
    assert learning_rate(100, step) == learning_rate(1000, step) == pytest.approx(0.1)


def test_wsd_is_flat_and_then_falls_in_equal_steps() -> None:
    found = rates(schedule="wsd", decay_fraction=0.2)
    assert set(found[10:80]) == {1.0}
    assert found[80:] == pytest.approx([(100 - n) / 20 for n in range(80, 100)])
    assert rates(schedule="wsd", decay_fraction=0.0)[99] == 1.0


def test_constant_stays() -> None:
    assert set(rates(schedule="constant")[10:]) == {1.0}


def test_one_step_with_every_schedule() -> None:
    for schedule in ("cosine", "wsd", "constant"):
        assert rates(schedule=schedule, steps=1, warmup_fraction=0.0) == [1.0]


def test_the_optimiser_uses_the_rate_of_the_step() -> None:
    stepper = stepper_of("step.schedule=wsd")
    report = stepper.step(19)
    assert report.lr == learning_rate(19, stepper.config.step)
    assert {group["lr"] for group in stepper.optimiser.param_groups} == {report.lr}


@pytest.mark.parametrize("size", [2, 4])
def test_micro_batches_of_any_size_give_the_same_gradients(size: int) -> None:
    one, other = stepper_of("step.micro_batch_size=1"), stepper_of(f"step.micro_batch_size={size}")
    assert one.backward(0) == pytest.approx(other.backward(0), rel=1e-12)
    pairs = zip(one.model.named_parameters(), other.model.named_parameters(), strict=True)
    for (name, a), (_, b) in pairs:
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-12, atol=1e-15, msg=lambda text, name=name: f"{name} {text}")
    assert one.update(0, 0.0).load == other.update(0, 0.0).load


def test_norms_and_routers_do_not_decay() -> None:
    stepper = stepper_of("step.weight_decay=0.3", "backbone.qk_norm=true")
    decay = {
        id(weight): group["weight_decay"] for group in stepper.optimiser.param_groups for weight in group["params"]
    }
    named = dict(stepper.model.named_parameters())
    free = {name for name, weight in named.items() if decay[id(weight)] == 0.0}
    assert free == {name for name in named if "norm" in name or "router" in name}
    assert {decay[id(named[name])] for name in named.keys() - free} == {0.3}
    assert len(decay) == len(named)


def test_zero_gradients_shrink_only_what_decays() -> None:
    stepper = stepper_of("step.weight_decay=0.5", "step.warmup_fraction=0")
    before = {name: weight.detach().clone() for name, weight in stepper.model.named_parameters()}
    for _, weight in stepper.model.named_parameters():
        weight.grad = torch.zeros_like(weight)
    report = stepper.update(0, 0.0)
    for name, weight in stepper.model.named_parameters():
        factor = 1.0 if "norm" in name or "router" in name else 1.0 - 0.5 * report.lr
        torch.testing.assert_close(weight.detach(), before[name] * factor, rtol=1e-14, atol=0)


def test_training_that_diverges_is_an_error_and_moves_no_weight() -> None:
    stepper = stepper_of("step.max_grad_norm=0", "step.precision=float32")
    before = {name: weight.detach().clone() for name, weight in stepper.model.named_parameters()}
    loss = stepper.backward(0)
    next(weight for _, weight in stepper.model.named_parameters()).grad.fill_(math.inf)  # type: ignore[union-attr]
    with pytest.raises(DivergedError, match=r"diverged at step 0.*gradient norm (inf|nan)"):
        stepper.update(0, loss)
    assert all(torch.equal(weight, before[name]) for name, weight in stepper.model.named_parameters())


def test_an_overflow_that_no_scale_helps_is_an_error() -> None:
    stepper = stepper_of("step.precision=float16")
    assert stepper.scale is not None
    stepper.scale.value = stepper.model.loss_scale = 2.0
    loss = stepper.backward(0)
    next(weight for _, weight in stepper.model.named_parameters()).grad.fill_(math.inf)  # type: ignore[union-attr]
    with pytest.raises(DivergedError):
        stepper.update(0, loss)
