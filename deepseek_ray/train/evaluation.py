"""Models side by side on the held-out days, as plain data for the run's results and the tracking store."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepseek_ray import metrics, models
from deepseek_ray.data.datasets import RiskDataset
from deepseek_ray.models import RiskModel
from deepseek_ray.train.job import SELECT
from deepseek_ray.train.trainer import MOE, FitResult
from deepseek_ray.train.yardsticks import Yardstick

_IMPORTANCE_ROWS = 2_000
_IMPORTANCE_TOP = 20


def judge(fitted: FitResult, yardsticks: Sequence[Yardstick], holdout: RiskDataset) -> dict[str, Any]:
    """Score every model on the same labelled rows.

    Returns:
        ``models``: name -> figures, ``by_scenario`` and ``curves``; of the Mixture-of-Experts model also
        ``expert_load`` [L][E], ``importance`` (name, mean absolute log-odds) and ``loss`` (epoch, training loss,
        average precision on the validation days). Figures that are not defined are None.
    """
    loaded = {name: models.load(job.model_dir) for name, job in fitted.jobs.items()}
    scores = {name: model.predict_proba(holdout.features, holdout.sequence) for name, model in loaded.items()}
    scores |= {one.name: one.predict_proba(holdout.features) for one in yardsticks}
    select = [record for record in fitted.jobs[MOE].history if record["phase"] == SELECT]
    return {
        "models": {name: figures(score, holdout) for name, score in scores.items()},
        "expert_load": loaded[MOE].expert_load(holdout.features, holdout.sequence).tolist(),
        "importance": importance(loaded[MOE], holdout),
        "loss": [(one["epoch"] + 1, one["loss"], one.get("average_precision")) for one in select],
    }


def figures(score: NDArray[np.float64], rows: RiskDataset) -> dict[str, Any]:
    """One model's figures on labelled rows, with its curves."""
    numbers = metrics.evaluate(rows.label, score, card=rows.card, day=rows.day)
    kinds = metrics.by_scenario(rows.label, score, rows.scenario)
    finite: dict[str, Any] = {name: value if np.isfinite(value) else None for name, value in numbers.items()}
    recall = {str(kind): value for kind, value in kinds.items()}
    return finite | {"by_scenario": recall, "curves": metrics.curves(rows.label, score)}


def importance(model: RiskModel, rows: RiskDataset) -> list[tuple[str, float]]:
    """Features by mean absolute contribution to the log-odds over the first rows, largest first."""
    sample = slice(0, _IMPORTANCE_ROWS)
    share = np.abs(model.attribute(rows.features[sample], rows.sequence[sample])).mean(0)
    largest = np.argsort(-share, kind="stable")[:_IMPORTANCE_TOP]
    return [(rows.feature_names[index], float(share[index])) for index in largest]
