"""What the model must beat, on the same rows and features: logistic regression and a tuned LightGBM.

Both are deterministic for a seed. LightGBM tries a small fixed grid; the last days of the training rows choose the
setting and the number of trees, then it is fitted again on all of them.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any

import lightgbm as lgb
import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from deepseek_ray import metrics
from deepseek_ray.data.datasets import RiskDataset

_GRID: tuple[dict[str, Any], ...] = (
    {"num_leaves": 31, "min_child_samples": 50, "feature_fraction": 0.5, "lambda_l2": 1.0, "learning_rate": 0.05},
    {"num_leaves": 15, "min_child_samples": 100, "feature_fraction": 0.3, "lambda_l2": 10.0, "learning_rate": 0.05},
    {"num_leaves": 63, "min_child_samples": 100, "feature_fraction": 0.3, "lambda_l2": 10.0, "learning_rate": 0.05},
    {"num_leaves": 8, "min_child_samples": 20, "feature_fraction": 0.3, "lambda_l2": 1.0, "learning_rate": 0.05},
)
PUBLISHED: dict[str, Any] = {"num_leaves": 31, "min_child_samples": 100, "learning_rate": 0.05, "num_trees": 200}
_MAX_TREES = 600
_PATIENCE = 30


@dataclass(frozen=True)
class Yardstick:
    """A fitted yardstick.

    Args:
        name: ``logistic`` or ``lightgbm``.
        model: scikit-learn pipeline or LightGBM booster.
        settings: what was chosen.
    """

    name: str
    model: Any
    settings: dict[str, Any] = field(default_factory=dict)

    def predict_proba(self, features: NDArray[Any]) -> NDArray[np.float64]:
        """Probability of fraud (n,) for features (n, F)."""
        if isinstance(self.model, lgb.Booster):
            return np.asarray(self.model.predict(features), dtype=np.float64)
        return np.asarray(self.model.predict_proba(features)[:, 1], dtype=np.float64)

    def importance(self, feature_names: tuple[str, ...], top: int = 20) -> list[tuple[str, float]]:
        """Largest features: total gain of the trees, or absolute weights of the standardised features."""
        if isinstance(self.model, lgb.Booster):
            weight = self.model.feature_importance("gain")
        else:
            weight = np.abs(self.model[-1].coef_[0])
        return [(feature_names[index], float(weight[index])) for index in np.argsort(-weight, kind="stable")[:top]]


def fit_logistic(train: RiskDataset, *, regularisation: float = 1.0, seed: int = 0) -> Yardstick:
    """Logistic regression on standardised features, as in the handbook (C = 1).

    Args:
        train: labelled rows.
        regularisation: scikit-learn's C.
        seed: of the solver.
    """
    model = make_pipeline(StandardScaler(), LogisticRegression(C=regularisation, max_iter=300, random_state=seed))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # not converging fully on separable features changes no ranking
        model.fit(train.features.astype(np.float64), train.label)
    return Yardstick("logistic", model, {"C": regularisation})


def fit_lightgbm(
    train: RiskDataset, *, validation_fraction: float = 0.15, seed: int = 0, num_threads: int = 2
) -> Yardstick:
    """LightGBM, tuned on the last days of the training rows by average precision, then fitted on all of them.

    Args:
        train: labelled rows of at least two days.
        validation_fraction: share of the days that chooses.
        seed: of sampling.
        num_threads: cores; the result does not depend on it.

    Raises:
        DataError: all rows lie in one day.
    """
    early, late = train.split_tail(validation_fraction)
    base = _base(seed, num_threads)
    rows = lgb.Dataset(early.features, early.label, params=base, free_raw_data=False)
    trials = []
    for setting in _GRID:
        booster = _early_stopped({**base, **setting}, rows, late)
        score = metrics.average_precision(late.label, booster.predict(late.features))
        trials.append((score, booster.best_iteration, setting))
    score, trees, setting = max(trials, key=lambda trial: trial[0])
    # More rows carry a few more trees: scale by the growth of the data, as is usual after early stopping.
    rounds = max(1, round(trees * len(train) / len(early)))
    final = lgb.train({**base, **setting}, lgb.Dataset(train.features, train.label), num_boost_round=rounds)
    chosen = {**setting, "num_trees": rounds, "validation_average_precision": score}
    return Yardstick("lightgbm", final, chosen)


def fit_lightgbm_published(train: RiskDataset, *, seed: int = 0, num_threads: int = 2) -> Yardstick:
    """LightGBM with the fixed settings that reproduce the published-protocol figures; nothing is tuned.

    Args:
        train: labelled rows.
        seed: of sampling.
        num_threads: cores; the result does not depend on it.
    """
    settings = {**_base(seed, num_threads), "bagging_freq": 0, **PUBLISHED}
    trees = settings.pop("num_trees")
    model = lgb.train(settings, lgb.Dataset(train.features, train.label), num_boost_round=trees)
    return Yardstick("lightgbm", model, dict(PUBLISHED))


def _base(seed: int, num_threads: int) -> dict[str, Any]:
    return {
        "objective": "binary", "metric": "average_precision", "bagging_fraction": 0.8, "bagging_freq": 1,
        "max_bin": 255, "min_data_in_bin": 3, "seed": seed, "deterministic": True, "force_row_wise": True,
        "num_threads": num_threads, "verbosity": -1, "feature_pre_filter": False,
    }  # fmt: skip


def _early_stopped(params: dict[str, Any], rows: lgb.Dataset, late: RiskDataset) -> lgb.Booster:
    held_out = lgb.Dataset(late.features, late.label, reference=rows)
    stop = lgb.early_stopping(_PATIENCE, verbose=False)
    return lgb.train(params, rows, num_boost_round=_MAX_TREES, valid_sets=[held_out], callbacks=[stop])
