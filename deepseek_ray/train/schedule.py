"""The learning rate of a step."""

from __future__ import annotations

import math

from deepseek_ray.config_moe import StepConfig


def learning_rate(step: int, settings: StepConfig) -> float:
    """Linear warm-up, then: cosine to a tenth (arXiv:1608.03983), constant, or constant with a linear end (wsd).

    Warm-up, stable, decay: Hu et al. 2024, arXiv:2404.06395.
    """
    warm = round(settings.warmup_fraction * settings.steps)
    if step < warm:
        return settings.lr * (step + 1) / warm
    if settings.schedule == "cosine":
        done = (step - warm) / max(1, settings.steps - warm)
        return settings.lr * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))
    decay = round(settings.decay_fraction * settings.steps)
    if settings.schedule == "wsd" and step >= settings.steps - decay:
        return settings.lr * max(0, settings.steps - step) / max(1, decay)
    return settings.lr
