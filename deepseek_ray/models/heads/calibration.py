"""Calibration: a straight line over the log-odds, so that a score of 1 % means one fraud in a hundred."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

_NEWTON_STEPS = 50
_RIDGE = 1e-3
_MIN_SCALE = 0.05


class PlattScaling(nn.Module):
    """Calibrated log-odds = scale * logit + shift (Platt 1999); order is kept because scale > 0."""

    scale: Tensor
    shift: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("shift", torch.zeros(()))

    def forward(self, logit_B: Tensor) -> Tensor:
        """Calibrated log-odds; same shape."""
        return logit_B * self.scale + self.shift

    def fit(self, logit_B: NDArray[np.float64], label_B: NDArray[np.int8]) -> None:
        """Fit on held-out rows by Newton's method on the log-likelihood, drawn weakly to (1, 0).

        Without both classes the scaling stays as it is.
        """
        label = label_B.astype(np.float64)
        if not 0 < label.sum() < len(label):
            return
        design = np.column_stack([logit_B, np.ones(len(logit_B))]).astype(np.float64)
        anchor = np.array([1.0, 0.0])
        theta = anchor.copy()
        for _ in range(_NEWTON_STEPS):
            probability = 1 / (1 + np.exp(-np.clip(design @ theta, -60, 60)))
            gradient = design.T @ (probability - label) + _RIDGE * (theta - anchor)
            hessian = (design.T * (probability * (1 - probability))) @ design + _RIDGE * np.eye(2)
            move = np.linalg.solve(hessian, gradient)
            theta -= move / max(1.0, float(np.abs(move).max()))  # a bounded step cannot diverge
            if np.abs(move).max() < 1e-10:
                break
        self.scale.fill_(max(_MIN_SCALE, float(theta[0])))
        self.shift.fill_(float(theta[1]))
