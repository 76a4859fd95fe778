"""The backbone on the kernels computes what it computes on plain torch: losses, gradients, the next step."""

from __future__ import annotations

import pytest
import torch

from deepseek_ray.data.samples import RandomSamples
from deepseek_ray.kernels import dispatch
from deepseek_ray.presets_moe import load_moe_preset
from deepseek_ray.train.pretraining import make_stepper
from tests.kernels.checks import DEVICE, assert_near, needs_kernels


def trained(
    backend: str, monkeypatch: pytest.MonkeyPatch, **shape: object
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses of three steps, and the gradients of the last."""
    monkeypatch.setenv(dispatch.VARIABLE, backend)
    dispatch.choice.cache_clear()
    settings = {"num_layers": 2, "num_dense_layers": 1, **shape}
    overrides = [f"backbone.{name}={value}" for name, value in settings.items()]
    step = ["step.batch_size=2", "step.micro_batch_size=1", "step.precision=float32", "corpus.seq_len=16"]
    config = load_moe_preset("debug_moe", overrides=[*overrides, *step])
    samples = RandomSamples(config.backbone, config.corpus.seq_len, config.seed)
    stepper = make_stepper(config, samples, torch.device(DEVICE))
    losses = [stepper.step(number).loss for number in range(3)]
    gradients = {
        name: weight.grad.clone() for name, weight in stepper.model.named_parameters() if weight.grad is not None
    }
    dispatch.choice.cache_clear()
    return losses, gradients


@needs_kernels
@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"router": "softmax", "num_groups": 4, "top_groups": 2, "qk_norm": True},
        {"attention": "sliding", "window": 5},
    ],
    ids=["plain", "groups", "sliding"],
)
def test_three_steps_on_the_kernels_are_three_steps_on_torch(
    shape: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted, reference = trained("torch", monkeypatch, **shape)
    found, gradients = trained("triton", monkeypatch, **shape)
    assert found == pytest.approx(wanted, rel=1e-5)
    assert not all(torch.equal(gradient, reference[name]) for name, gradient in gradients.items())  # another path
    for name, gradient in gradients.items():
        assert_near(gradient, reference[name], 2e-3)
