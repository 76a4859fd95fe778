"""AdamW and its schedule."""

from __future__ import annotations

import math

import torch
from torch import nn


def make_optimiser(model: nn.Module, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101); only matrices decay, not norms, biases or the router."""
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        keep = parameter.ndim < 2 or "router" in name
        (free if keep else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": free, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.99))


def learning_rate(step: int, total_steps: int, lr: float, warmup_fraction: float) -> float:
    """Linear warm-up, then a cosine down to a fiftieth of the peak (Loshchilov and Hutter 2017, arXiv:1608.03983).

    Args:
        step: 0 .. total_steps - 1.
        total_steps: steps of the whole training.
        lr: peak.
        warmup_fraction: share of the steps spent rising.
    """
    warmup = max(1, round(warmup_fraction * total_steps))
    if step < warmup:
        return lr * (step + 1) / warmup
    done = (step - warmup) / max(1, total_steps - warmup)
    return lr * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))


def set_learning_rate(optimiser: torch.optim.Optimizer, lr: float) -> None:
    """Give every parameter group the rate."""
    for group in optimiser.param_groups:
        group["lr"] = lr
