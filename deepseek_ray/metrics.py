"""How good a score is: ranking, card precision, recall at a false-alarm rate, calibration. Pure numpy and scikit-learn.

Legend: n rows. Every function takes label (n,) of 0 and 1 and probability (n,), any monotone score where only the
order counts. A figure that is not defined, for want of one of the classes, is NaN.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score, roc_curve


def average_precision(label: ArrayLike, probability: ArrayLike) -> float:
    """Area under the precision-recall curve as a step sum; NaN without a fraud."""
    return float(average_precision_score(label, probability)) if np.any(np.asarray(label) == 1) else float("nan")


def auc(label: ArrayLike, probability: ArrayLike) -> float:
    """Area under the ROC curve; NaN when a class is missing."""
    return float(roc_auc_score(label, probability)) if _both(label) else float("nan")


def recall_at_fpr(label: ArrayLike, probability: ArrayLike, fpr: float = 0.01) -> float:
    """Largest recall whose false-positive rate is at most ``fpr``; NaN when a class is missing."""
    if not _both(label):
        return float("nan")
    false_rate, true_rate, _ = roc_curve(label, probability, drop_intermediate=False)
    return float(true_rate[false_rate <= fpr].max())


def false_positives_at_recall(label: ArrayLike, probability: ArrayLike, recall: float) -> int:
    """Fewest genuine rows at or above a threshold at which at least this share of the frauds is.

    Args:
        label: 0 or 1, both present.
        probability: any monotone score.
        recall: in (0, 1].

    Raises:
        ValueError: a class is missing or the recall is not in (0, 1].
    """
    if not _both(label) or not 0 < recall <= 1:
        raise ValueError(f"recall={recall!r} must be in (0, 1], and both classes present")
    y, p = np.asarray(label), np.asarray(probability, dtype=np.float64)
    fraud = np.sort(p[y == 1])[::-1]
    needed = math.ceil(recall * len(fraud) - 1e-9)  # 0.7 * 10 is a little more than 7
    return int((p[y == 0] >= fraud[needed - 1]).sum())


def cp100(
    probability: ArrayLike,
    card: ArrayLike,
    day: ArrayLike,
    label: ArrayLike,
    *,
    k: int = 100,
) -> float:
    """Card precision at k (Reproducible Machine Learning for Credit Card Fraud Detection, section 4.4).

    Each day, the k cards with the highest score of that day; the share that is truly compromised on that day. Cards
    detected leave for the days after. Mean over days.

    Args:
        probability: score of each transaction.
        card: card of each transaction; ints or strings.
        day: day number of each transaction.
        label: 1 for fraud.
        k: cards reviewed a day.

    Returns:
        in [0, 1]; NaN without rows.
    """
    code = np.unique(np.asarray(card), return_inverse=True)[1]
    day, label = np.asarray(day, dtype=np.int64), np.asarray(label, dtype=np.int64)
    probability = np.asarray(probability, dtype=np.float64)
    days = np.unique(day)
    found = np.zeros(int(code.max(initial=-1)) + 1, dtype=bool)
    precision = []
    for one in days:
        rows = np.flatnonzero(day == one)
        rows = rows[~found[code[rows]]]
        hits = _compromised_among_top(probability[rows], code[rows], label[rows], k)
        found[hits] = True
        precision.append(len(hits) / k)
    return float(np.mean(precision)) if precision else float("nan")


def calibration_error(label: ArrayLike, probability: ArrayLike, num_bins: int = 15) -> float:
    """Expected calibration error: mean gap between predicted and true rate over bins of equal width, by bin size."""
    gap = calibration_curve(label, probability, num_bins)
    return float((np.abs(gap.predicted - gap.observed) * gap.count).sum() / max(1, gap.count.sum()))


@dataclass(frozen=True)
class CalibrationCurve:
    """Bins of predicted probability that hold at least one row: means and size, each (bins,)."""

    predicted: NDArray[np.float64]
    observed: NDArray[np.float64]
    count: NDArray[np.int64]


def calibration_curve(label: ArrayLike, probability: ArrayLike, num_bins: int = 15) -> CalibrationCurve:
    """Predicted against true rate in bins of equal width over [0, 1]."""
    p, y = np.asarray(probability, dtype=np.float64), np.asarray(label, dtype=np.float64)
    place = np.minimum((p * num_bins).astype(np.int64), num_bins - 1)
    count = np.bincount(place, minlength=num_bins)
    used = count > 0
    predicted = np.bincount(place, weights=p, minlength=num_bins)[used] / count[used]
    observed = np.bincount(place, weights=y, minlength=num_bins)[used] / count[used]
    return CalibrationCurve(predicted, observed, count[used])


def by_scenario(label: ArrayLike, probability: ArrayLike, scenario: ArrayLike, fpr: float = 0.01) -> dict[int, float]:
    """Recall of each kind of fraud at the threshold that gives ``fpr`` over all genuine rows."""
    y, p, kind = np.asarray(label), np.asarray(probability, dtype=np.float64), np.asarray(scenario)
    if not _both(y):
        return {}
    genuine = np.sort(p[y == 0])[::-1]
    threshold = genuine[min(int(fpr * len(genuine)), len(genuine) - 1)]
    kinds = np.unique(kind[(y == 1) & (kind > 0)])
    return {int(one): float(np.mean(p[(y == 1) & (kind == one)] > threshold)) for one in kinds}


def curves(label: ArrayLike, probability: ArrayLike, num_points: int = 200) -> dict[str, list[list[float]]]:
    """Points to draw, thinned to about ``num_points``.

    Returns:
        ``pr``: [recall, precision], ``roc``: [false-positive rate, recall], ``calibration``: [predicted, observed,
        rows]; the first two are empty when a class is missing.
    """
    bins = calibration_curve(label, probability)
    drawn = {"calibration": np.column_stack([bins.predicted, bins.observed, bins.count]).tolist()}
    if not _both(label):
        return {"pr": [], "roc": [], **drawn}
    precision, recall, _ = precision_recall_curve(label, probability)
    false_rate, true_rate, _ = roc_curve(label, probability)
    # Alarms are affordable only where the false rate is small: even steps in recall keep that end resolved.
    pr = _thin(np.column_stack([recall, precision])[::-1], 0, num_points)
    return {"pr": pr, "roc": _thin(np.column_stack([false_rate, true_rate]), 1, num_points), **drawn}


def _thin(points: NDArray[np.float64], axis: int, num_points: int) -> list[list[float]]:
    place = np.searchsorted(points[:, axis], np.linspace(0, 1, num_points))
    kept = np.unique(np.concatenate([[0], np.minimum(place, len(points) - 1), [len(points) - 1]]))
    chosen: list[list[float]] = points[kept].tolist()
    return chosen


def evaluate(
    label: ArrayLike,
    probability: ArrayLike,
    *,
    card: ArrayLike,
    day: ArrayLike,
) -> dict[str, float]:
    """Every figure of the report under its name there."""
    return {
        "average_precision": average_precision(label, probability),
        "auc": auc(label, probability),
        "cp100": cp100(probability, card, day, label),
        "recall_at_1pct_fpr": recall_at_fpr(label, probability),
        "calibration_error": calibration_error(label, probability),
    }


def _both(label: ArrayLike) -> bool:
    y = np.asarray(label)
    return bool(np.any(y == 1) and np.any(y == 0))


def _compromised_among_top(
    probability: NDArray[np.float64], code: NDArray[np.int64], label: NDArray[np.int64], k: int
) -> NDArray[np.int64]:
    """Compromised cards among the k with the highest score; ties go to the smaller card."""
    cards, place = np.unique(code, return_inverse=True)
    best = np.full(len(cards), -np.inf)
    np.maximum.at(best, place, probability)
    bad = np.zeros(len(cards), dtype=np.int64)
    np.maximum.at(bad, place, label)
    top = np.argsort(-best, kind="stable")[:k]
    return cards[top[bad[top] == 1]]
