"""What is computed: adapters, attention, experts, heads. No collectives, no Ray."""

from __future__ import annotations

from pathlib import Path

import torch

from deepseek_ray.models.risk import RiskModel, RiskModelConfig

__all__ = ["RiskModel", "RiskModelConfig", "load"]


def load(path: str | Path, dtype: torch.dtype = torch.float64) -> RiskModel:
    """Read a saved model folder, ready to score in float64 (pass float32 to train it further).

    Raises:
        ModelFormatError: a file is missing, changed or does not fit its description.
    """
    return RiskModel.from_pretrained(path, dtype)
