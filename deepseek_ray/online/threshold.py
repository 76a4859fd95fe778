"""The decision threshold: as many alerts as people can review, or a review wherever it pays."""

from __future__ import annotations

from collections import deque

import numpy as np
import numpy.typing as npt

from deepseek_ray.config import ServingConfig
from deepseek_ray.errors import DataError

THRESHOLD_TAG = "threshold"
"""Tag of a version: the threshold that it starts with."""

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


def cost_threshold(review_cost: float, missed_fraud_cost: float) -> float:
    """Probability from which a review pays, given a calibrated score (Elkan 2001, "The foundations of cost-sensitive
    learning").

    Args:
        review_cost: cost of one review, above 0.
        missed_fraud_cost: cost of one fraud that is approved, in the same unit, above ``review_cost``.
    """
    return review_cost / missed_fraud_cost


def policy_threshold(scores: npt.ArrayLike, config: ServingConfig) -> float:
    """The threshold that ``serving.threshold_policy`` asks for.

    Args:
        scores: probabilities [n] that one version gave; only ``alert_rate`` looks at them.
        config: the policy with its settings.

    Raises:
        DataError: ``alert_rate`` needs scores, and there are none, or one is no probability.
    """
    if config.threshold_policy == "cost":
        return cost_threshold(config.review_cost, config.missed_fraud_cost)
    return budget_threshold(scores, config.alert_rate)


class LiveThreshold:
    """The policy's threshold over a sliding window of scores.

    Args:
        config: the policy; ``alert_rate`` moves with the scores, ``cost`` stands still.
        initial: threshold until ``min_scores`` are seen, for example from the held-out days.
        window: newest scores kept.
        min_scores: scores needed before the threshold moves.
        refresh_every: scores between two moves; sorting for each event would cost more than scoring it.
    """

    def __init__(
        self,
        config: ServingConfig,
        initial: float,
        *,
        window: int = 20_000,
        min_scores: int = 1_000,
        refresh_every: int = 200,
    ) -> None:
        if not 0.0 <= initial <= 1.0:
            raise ValueError(f"initial={initial} must be between 0 and 1")
        if window < min_scores or min_scores < 1 or refresh_every < 1:
            raise ValueError(
                f"need window={window} >= min_scores={min_scores} >= 1 and refresh_every={refresh_every} >= 1"
            )
        self._config = config
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
            self.value = policy_threshold(np.fromiter(self._scores, dtype=np.float64), self._config)
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
