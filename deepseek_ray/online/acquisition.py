"""Active learning: which decisions to send for labelling, when only so many can be looked at.

Most of the budget goes to rows that would teach the most and differ from each other: BADGE (Ash et al. 2020, "Deep
batch active learning by diverse, uncertain gradient lower bounds", arXiv:1906.03671) draws rows by k-means++ in the
space of the gradients that a label would have on the last layer. With few frauds these are the rows of high risk,
which pays in card fraud (Carcillo et al. 2018, "Streaming active learning strategies for real-life credit card fraud
detection", arXiv:1804.07481). A share is drawn at random, as there: only it finds what the model is blind to.

Legend: n rows, D model width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.cluster import kmeans_plusplus

from deepseek_ray.errors import DataError
from deepseek_ray.models import RiskModel

EXPLORE = 0.1
"""Share of the budget that is drawn at random."""
MAX_POOL = 20_000
"""Rows that are compared with each other; of a larger pool the most uncertain."""


@dataclass(frozen=True)
class Choice:
    """Rows to label.

    Args:
        rows: numbers of the chosen rows, those of the greatest effect first.
        explored: True where the row was drawn at random.
    """

    rows: NDArray[np.int64]
    explored: NDArray[np.bool_]


def choose(
    model: RiskModel,
    features: NDArray[Any],
    sequence: NDArray[Any],
    budget: int,
    *,
    explore: float = EXPLORE,
    seed: int = 0,
) -> Choice:
    """Choose rows of a pool without labels.

    Args:
        model: the version that serves.
        features: (n, F).
        sequence: (n, N, C).
        budget: rows that can be labelled; all of them when the pool is not larger.
        explore: share of the budget drawn at random, 0-1.
        seed: of both draws.

    Raises:
        DataError: the pool is empty.
        ValueError: the budget or the share is out of range.
    """
    if budget < 1 or not 0.0 <= explore <= 1.0:
        raise ValueError(f"need budget={budget} >= 1 and 0 <= explore={explore:g} <= 1")
    if not len(features):
        raise DataError("There is no decision to choose from.", fix="serve some, or look at more days")
    budget = min(budget, len(features))
    random_rows = np.random.default_rng(seed).permutation(len(features))[: round(budget * explore)]
    left = np.setdiff1d(np.arange(len(features)), random_rows)
    count = budget - len(random_rows)
    telling = left[diverse(gradients(model, features[left], sequence[left]), count, seed)] if count else left[:0]
    explored = np.arange(budget) >= len(telling)
    return Choice(np.concatenate([telling, random_rows]).astype(np.int64), explored)


def gradients(model: RiskModel, features: NDArray[Any], sequence: NDArray[Any]) -> NDArray[np.float64]:
    """Gradient (n, D) of each row's loss on the head's weights, were its likelier label true: the least it can be.

    For a log-odds h = w z and probability p it is (p - y) z with y the likelier label, so its length is at most
    min(p, 1 - p) times that of z.
    """
    seen: list[NDArray[np.float64]] = []
    hook = model.head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach().double().numpy()))
    try:
        p = model.predict_proba(features, sequence)
    finally:
        hook.remove()
    return np.where(p >= 0.5, p - 1.0, p)[:, None] * np.concatenate(seen)


def diverse(vectors: NDArray[np.float64], count: int, seed: int) -> NDArray[np.int64]:
    """Numbers of rows (n, D), drawn by k-means++ from the longest ones: long, and far from each other."""
    length = np.linalg.norm(vectors, axis=1)
    longest = np.argsort(-length, kind="stable")[:MAX_POOL]
    if count >= len(longest):
        return longest[:count].astype(np.int64)
    _, chosen = kmeans_plusplus(vectors[longest], n_clusters=count, random_state=seed)
    picked = np.unique(chosen)
    if len(picked) < count:  # equal rows have no distance to draw by
        rest = np.setdiff1d(np.arange(len(longest)), picked)[: count - len(picked)]
        picked = np.concatenate([picked, rest])
    return longest[np.sort(picked)].astype(np.int64)
