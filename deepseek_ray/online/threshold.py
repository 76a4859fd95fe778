"""The decision threshold: as many alerts as people can review, or as little loss as possible."""

from __future__ import annotations

from collections import deque

import numpy as np
import numpy.typing as npt

from deepseek_ray.errors import DataError

Floats = npt.NDArray[np.float64]


def budget_threshold(scores: npt.ArrayLike, alert_rate: float) -> float:
    """Lowest threshold at which at most ``alert_rate`` of the scores are at or above it.

    Ties are never split: when all the highest scores are equal and too many, none is an alert and
    the threshold is just above them (at most 1).

    Args:
        scores: probabilities [n].
        alert_rate: share that may be reviewed, 0-1.

    Raises:
        DataError: there are no scores, or one is no probability.
        ValueError: ``alert_rate`` is out of range.
    """
    if not 0.0 < alert_rate < 1.0:
        raise ValueError(f"alert_rate={alert_rate} must be between 0 and 1")
    descending = np.sort(_probabilities(scores))[::-1]
    allowed = int(np.floor(alert_rate * descending.size))
    if allowed == 0:
        return _above(float(descending[0]))
    candidate = float(descending[allowed - 1])
    if np.count_nonzero(descending >= candidate) <= allowed:
        return candidate
    return _above(candidate)


def cost_threshold(
    scores: npt.ArrayLike,
    labels: npt.ArrayLike,
    amounts: npt.ArrayLike,
    *,
    review_cost: float,
    caught_share: float = 1.0,
) -> float:
    """Threshold with the least loss on labelled decisions: missed fraud plus the cost of reviews.

    Args:
        scores: probabilities [n].
        labels: 1 for fraud [n].
        amounts: what a missed fraud costs, same unit as ``review_cost`` [n].
        review_cost: cost of one review, >= 0.
        caught_share: share of a reviewed fraud's amount that is saved, 0-1.

    Returns:
        One of the scores, or just above the highest when no review pays.

    Raises:
        DataError: arrays are empty, differ in length, or a score is no probability.
    """
    p, y, a = _probabilities(scores), np.asarray(labels, dtype=np.float64), np.asarray(amounts, dtype=np.float64)
    if not p.shape == y.shape == a.shape:
        raise DataError(
            f"scores {p.shape}, labels {y.shape} and amounts {a.shape} differ.", fix="give one of each a row"
        )
    order = np.argsort(-p, kind="stable")
    gain = np.cumsum(y[order] * a[order] * caught_share - review_cost)
    last_of_tie = np.append(p[order][1:] != p[order][:-1], True)
    gain = np.where(last_of_tie, gain, -np.inf)
    best = int(np.argmax(gain))
    return float(p[order][best]) if gain[best] > 0 else _above(float(p.max()))


def bayes_threshold(amount: float, *, review_cost: float, caught_share: float = 1.0) -> float:
    """Probability above which reviewing one payment pays, given a calibrated score (Elkan 2001).

    Args:
        amount: what a missed fraud costs, same unit as ``review_cost``.
    """
    saved = amount * caught_share
    return min(1.0, review_cost / saved) if saved > 0 else 1.0


class AlertBudget:
    """A threshold that follows the scores of a sliding window.

    Args:
        alert_rate: share of decisions that may be reviewed, 0-1.
        initial: threshold until ``min_scores`` are seen, for example from the held-out days.
        window: newest scores kept.
        min_scores: scores needed before the threshold moves.
        refresh_every: scores between two moves; sorting for each event would cost more than scoring it.
    """

    def __init__(
        self,
        alert_rate: float,
        initial: float,
        *,
        window: int = 20_000,
        min_scores: int = 1_000,
        refresh_every: int = 200,
    ) -> None:
        if not 0.0 < alert_rate < 1.0:
            raise ValueError(f"alert_rate={alert_rate} must be between 0 and 1")
        if not 0.0 <= initial <= 1.0:
            raise ValueError(f"initial={initial} must be between 0 and 1")
        if window < min_scores or min_scores < 1 or refresh_every < 1:
            raise ValueError(
                f"need window={window} >= min_scores={min_scores} >= 1 and refresh_every={refresh_every} >= 1"
            )
        self.alert_rate = alert_rate
        self.value = initial
        self._min_scores = min_scores
        self._refresh_every = refresh_every
        self._since_refresh = 0
        self._scores: deque[float] = deque(maxlen=window)

    def observe(self, scores: npt.ArrayLike) -> float:
        """Add scores [n] in order; return the threshold for what comes next.

        Raises:
            DataError: a score is no probability.
        """
        new = np.asarray(scores, dtype=np.float64).ravel()
        if new.size == 0:
            return self.value
        self._scores.extend(_probabilities(new).tolist())
        self._since_refresh += new.size
        if len(self._scores) >= self._min_scores and self._since_refresh >= self._refresh_every:
            self.value = budget_threshold(np.fromiter(self._scores, dtype=np.float64), self.alert_rate)
            self._since_refresh = 0
        return self.value

    def reset(self, initial: float) -> None:
        """Forget all scores: another model has another score distribution."""
        if not 0.0 <= initial <= 1.0:
            raise ValueError(f"initial={initial} must be between 0 and 1")
        self._scores.clear()
        self._since_refresh = 0
        self.value = initial


def _above(value: float) -> float:
    return min(1.0, float(np.nextafter(value, 2.0)))


def _probabilities(scores: npt.ArrayLike) -> Floats:
    p = np.asarray(scores, dtype=np.float64).ravel()
    if p.size == 0:
        raise DataError("There are no scores to set a threshold from.", fix="wait for more decisions")
    if not ((p >= 0) & (p <= 1)).all():
        raise DataError("A score is no probability.", fix="pass scores between 0 and 1")
    return p
