"""From raw numbers to vectors: the event's features and the card's recent events.

Legend: B rows, F features, Q bins a feature, N recent events, C channels of one, D model width, G frequencies.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

SEQUENCE_CHANNELS = ("amount_cents", "age_s", "same_terminal", "same_country", "channel", "known_fraud")
"""Channels of one recent event; age -1 marks padding."""

_NUM_CHANNEL_CODES = 5
_NUM_FREQUENCIES = 4
_MAX_SAMPLE = 60_000


class FeatureAdapter(nn.Module):
    """Piecewise-linear encoding of numeric features (Gorishniy et al. 2022, arXiv:2203.05556).

    Each feature is cut into bins; bin q of value x holds ((x - left) / width) clamped to [0, 1]. A linear layer over
    the code is then a sum of piecewise-linear curves, one a feature. Up to a quarter of the Q bins are steps: they rise
    between two neighbouring values where a tree splits the label best, because a ramp as wide as a quantile cannot
    follow a rule such as "above 220". Widths of zero (fewer than Q bins) encode as 0.
    """

    left_FQ: Tensor
    inverse_width_FQ: Tensor
    median_F: Tensor

    def __init__(self, num_features: int, num_bins: int) -> None:
        super().__init__()
        self.register_buffer("left_FQ", torch.zeros(num_features, num_bins))
        self.register_buffer("inverse_width_FQ", torch.zeros(num_features, num_bins))
        self.register_buffer("median_F", torch.zeros(num_features))

    @property
    def width(self) -> int:
        """Length of one row's code, F * Q."""
        return self.left_FQ.numel()

    def fit(self, x_BF: NDArray[np.float32], label_B: NDArray[np.int8] | None = None) -> None:
        """Choose the bins from training rows: where a small tree splits the label, then quantiles.

        Args:
            x_BF: training rows.
            label_B: 0 or 1 a row; without it only quantiles are used.
        """
        num_bins = self.left_FQ.shape[1]
        rows = _sample_rows(len(x_BF), label_B)
        target = None if label_B is None else label_B[rows]
        for index in range(x_BF.shape[1]):
            values = x_BF[rows, index].astype(np.float64)
            steps = _steps(values, target, num_bins // 2)
            edges = _bin_edges(values, target, num_bins - len(steps))
            # PLE of float32 values against float32 edges: what is fitted is what is stored.
            left = torch.from_numpy(np.concatenate([edges[:-1], steps[:, 0]])).to(self.left_FQ)
            right = torch.from_numpy(np.concatenate([edges[1:], steps[:, 1]])).to(self.left_FQ)
            self.left_FQ[index] = left[0]
            self.inverse_width_FQ[index] = 0.0
            self.left_FQ[index, : len(left)] = left
            self.inverse_width_FQ[index, : len(left)] = 1.0 / (right - left)
            self.median_F[index] = float(np.median(values))

    def forward(self, x_BF: Tensor) -> Tensor:
        """Encode: (B, F) -> (B, F * Q), each value in [0, 1]."""
        code_BFQ = (x_BF.unsqueeze(-1) - self.left_FQ) * self.inverse_width_FQ
        return code_BFQ.clamp_(0.0, 1.0).flatten(1)


class SequenceAdapter(nn.Module):
    """Embeds each recent event: amounts and ages on a log scale, flags, channel, and Fourier terms of the age.

    The age terms are fixed sine and cosine waves of log(1 + age): from seconds to months in one scale, and the same
    for every gap, so that attention can learn "a burst in the last ten minutes" as easily as "a quiet month".
    """

    frequency_G: Tensor

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.register_buffer("frequency_G", math.pi * 2.0 ** torch.arange(_NUM_FREQUENCIES) / 16.0)
        width = 5 + _NUM_CHANNEL_CODES + 2 * _NUM_FREQUENCIES
        self.project = nn.Linear(width, d_model)

    def forward(self, s_BNC: Tensor) -> tuple[Tensor, Tensor]:
        """Embed: (B, N, C) -> events (B, N, D) and a mask (B, N), True where there is an event."""
        present_BN = s_BNC[..., 1] >= 0
        amount_BN1 = torch.log1p(s_BNC[..., 0:1].clamp(min=0.0)) / 10.0
        age_BN1 = torch.log1p(s_BNC[..., 1:2].clamp(min=0.0))
        flags_BN3 = s_BNC[..., [2, 3, 5]]
        channel_BN = s_BNC[..., 4].round().long().clamp(0, _NUM_CHANNEL_CODES - 1)
        channel_BNK = nn.functional.one_hot(channel_BN, _NUM_CHANNEL_CODES).to(s_BNC.dtype)
        phase_BNG = age_BN1 * self.frequency_G
        parts = [amount_BN1, age_BN1 / 10.0, flags_BN3, channel_BNK, phase_BNG.sin(), phase_BNG.cos()]
        return self.project(torch.cat(parts, dim=-1)), present_BN


def _sample_rows(num_rows: int, label_B: NDArray[np.int8] | None) -> NDArray[np.int64]:
    """All frauds and an even sample of the rest, at most _MAX_SAMPLE of these; no random numbers."""
    rows = np.arange(num_rows)
    keep = np.zeros(num_rows, dtype=bool) if label_B is None else label_B == 1
    others = rows[~keep]
    step = max(1, math.ceil(len(others) / _MAX_SAMPLE))
    return np.sort(np.concatenate([rows[keep], others[::step]]))


def _bin_edges(values: NDArray[np.float64], label: NDArray[np.int8] | None, num_bins: int) -> NDArray[np.float64]:
    """At most num_bins + 1 increasing edges from the smallest to the largest value.

    Quantiles alone put every edge at 0 for a count that is mostly 0; splits of a tree fitted to the label, and
    quantiles of the distinct values, keep the rare part resolved.
    """
    low, high = float(values.min()), float(values.max())
    if not high > low:
        return np.array([low, low + 1.0])
    distinct = np.unique(values)
    wanted = num_bins - 1
    inner = _tree_splits(values, label, (num_bins + 1) // 2)
    spread = np.linspace(0, 1, num_bins // 4 + 2)[1:-1]
    inner = np.union1d(inner, np.quantile(distinct, spread))
    if room := wanted - len(inner):
        inner = np.union1d(inner, np.quantile(values, np.linspace(0, 1, max(room, 0) + 2)[1:-1]))
    inner = inner[(inner > low) & (inner < high)]
    if len(inner) > wanted:
        inner = inner[np.linspace(0, len(inner) - 1, wanted).round().astype(int)]
    edges = np.concatenate([[low], inner, [high]]).astype(np.float32).astype(np.float64)
    # Edges closer than float32 resolves would give infinite slopes.
    apart = np.concatenate([[True], np.diff(edges) > 1e-6 * max(1e-3, high - low)])
    return edges[apart] if apart.sum() > 1 else np.array([low, high])


def _steps(values: NDArray[np.float64], label: NDArray[np.int8] | None, most: int) -> NDArray[np.float64]:
    """[S, 2] neighbouring values around the best splits of the label, S <= most."""
    distinct = np.unique(values).astype(np.float32).astype(np.float64)
    splits = _tree_splits(values, label, most + 1)
    above = np.searchsorted(distinct, splits, side="right")
    pairs = np.stack([distinct[above - 1], distinct[np.minimum(above, len(distinct) - 1)]], axis=1)
    return pairs[pairs[:, 1] - pairs[:, 0] > 1e-9 * max(1.0, float(np.abs(distinct).max()))]


def _tree_splits(values: NDArray[np.float64], label: NDArray[np.int8] | None, num_leaves: int) -> NDArray[np.float64]:
    if label is None or num_leaves < 2 or label.min() == label.max():
        return np.empty(0)
    from sklearn.tree import DecisionTreeClassifier  # only fitting needs it, scoring does not

    leaf = max(8, len(values) // 2000)
    tree = DecisionTreeClassifier(max_leaf_nodes=num_leaves, min_samples_leaf=leaf, random_state=0)
    tree.fit(values[:, None], label)
    threshold: NDArray[np.float64] = tree.tree_.threshold[tree.tree_.feature >= 0]
    return np.unique(threshold)
