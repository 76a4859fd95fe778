"""Which number formats to train in, by hardware; and the scale that keeps float16 gradients from vanishing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch import distributed as dist

from deepseek_ray.errors import ConfigError
from deepseek_ray.train.clip import local_part

Precision = Literal["auto", "float64", "float32", "bfloat16", "float16"]


def precision_of(setting: Precision, device: torch.device) -> tuple[torch.dtype, torch.dtype]:
    """(type of the weights and moments, type to compute in).

    ``auto`` computes in bfloat16 on a GPU that has it, in float16 on an older one, in float32 on a CPU. Low precision
    keeps float32 weights.

    Raises:
        ConfigError: the device does not compute in the type.
    """
    if setting == "auto":
        setting = _automatic(device)
    if setting == "bfloat16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise ConfigError("step.precision = 'bfloat16': this GPU does not have it.", fix="set 'auto' or 'float16'")
    compute: torch.dtype = getattr(torch, setting)
    return (compute if setting == "float64" else torch.float32), compute


def _automatic(device: torch.device) -> Precision:
    if device.type != "cuda":
        return "float32"
    return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"


@dataclass
class LossScale:
    """Dynamic loss scaling (Micikevicius et al. 2018, arXiv:1710.03740): halve after an overflow, double after calm.

    Attributes:
        value: factor on the loss.
        calm_steps: steps without overflow before it doubles.
    """

    value: float = 2.0**16
    calm_steps: int = 2000
    _calm: int = 0

    def update(self, *, finite: bool) -> None:
        """Take notice of a step's gradients."""
        self._calm = self._calm + 1 if finite else 0
        if not finite:
            self.value = max(self.value / 2, 1.0)
        elif self._calm == self.calm_steps:
            self.value, self._calm = self.value * 2, 0

    def state(self) -> Tensor:
        """For a checkpoint: [2], value and calm steps so far."""
        return torch.tensor([self.value, self._calm], dtype=torch.float64)

    def restore(self, state: Tensor) -> None:
        """Go on from a checkpoint."""
        self.value, self._calm = float(state[0]), int(state[1])


@torch.no_grad()
def unscale(weights: list[nn.Parameter], scale: float) -> bool:
    """Divide all gradients by the scale; False when one on any process is not finite.

    Args:
        weights: those of this process.
        scale: of the loss that made the gradients.
    """
    bad = torch.zeros((), device=local_part(weights[0]).device)
    for weight in weights:
        if weight.grad is not None:
            gradient: Tensor = local_part(weight.grad)
            gradient.div_(scale)
            bad += (~torch.isfinite(gradient)).any()
    if dist.is_initialized():
        dist.all_reduce(bad)
    return not bool(bad)
