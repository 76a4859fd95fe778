"""The figures a run is judged by, and the verdict on each: met, missed, or not measured."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from deepseek_ray.report.results import Results, Score, Train, dotted

Scalar = float | int | str
State = Literal["met", "missed", "not measured"]

_HOLDS: dict[str, Callable[[float, float], bool]] = {"≤": operator.le, "≥": operator.ge, "=": operator.eq}


@dataclass(frozen=True)
class Bound:
    """What a figure must hold.

    Args:
        key: its name in report.json.
        label: what it is, in words.
        relation: ≤, ≥ or =.
        limit: a number, or the key of the figure to compare with.
        unit: of the figure, or "".
        note: how to read it.
    """

    key: str
    label: str
    relation: str
    limit: float | str
    unit: str = ""
    note: str = ""


LATENCY_BOUND_MS = 50.0
"""Bound on the 99th percentile of a decision over HTTP."""

BOUNDS = (
    Bound(
        "average_precision",
        "Average precision, held-out days",
        "≥",
        "lightgbm_average_precision",
        note="against LightGBM on the same features and days; the promise is for the mean of three seeds",
    ),
    Bound(
        "cp100",
        "Card precision at 100",
        "≥",
        "lightgbm_cp100",
        note="share of truly compromised cards among the 100 highest-scored cards of a day; LightGBM on the same days",
    ),
    Bound("min_expert_load", "Least-used expert's share of the load", "≥", 0.01, note="no expert may starve"),
    Bound(
        "served_offline_max_diff",
        "Served score against offline score",
        "≤",
        1e-6,
        note="largest difference, same version and vector",
    ),
    Bound(
        "feature_differences",
        "Served features that differ offline",
        "=",
        0,
        note="recomputed by the point-in-time join",
    ),
    Bound("http_p50_ms", "Decision time, median", "≤", 10, "ms", "over HTTP at 50 requests/s, features included"),
    Bound(
        "http_p99_ms",
        "Decision time, 99th percentile",
        "≤",
        LATENCY_BOUND_MS,
        "ms",
        "over HTTP at 50 requests/s, features included",
    ),
    Bound("update_failed_requests", "Requests failed during the update", "=", 0, note="the swap happens under traffic"),
    Bound(
        "update_gain",
        "Gain of the update after the drift",
        "≥",
        0.20,
        note="average precision, relative to the frozen champion",
    ),
    Bound(
        "update_forgetting",
        "Loss of the update on the old pattern",
        "≤",
        0.02,
        note="average precision, relative to the frozen champion",
    ),
    Bound("wall_s", "Whole run", "≤", 720, "s", "on two cores, environment ready"),
)

RATE_OF_THE_BOUND = 50.0
"""Requests a second at which decision times are promised; a slower test proves nothing."""


@dataclass(frozen=True)
class Verdict:
    """A bound with the figure of this run."""

    bound: Bound
    value: float | None
    limit: float | None
    state: State


def judge(flat: Mapping[str, Scalar]) -> list[Verdict]:
    """The verdict on every bound; a figure or a limit that is absent is not measured."""
    return [_judge_one(bound, flat) for bound in BOUNDS]


def _judge_one(bound: Bound, flat: Mapping[str, Scalar]) -> Verdict:
    value = _number(flat.get(bound.key))
    limit = _number(flat.get(bound.limit)) if isinstance(bound.limit, str) else bound.limit
    if value is None or limit is None:
        return Verdict(bound, value, limit, "not measured")
    return Verdict(bound, value, limit, "met" if _HOLDS[bound.relation](value, limit) else "missed")


def _number(value: Scalar | None) -> float | None:
    return None if value is None or isinstance(value, str) else float(value)


def flatten(results: Results) -> dict[str, Scalar]:
    """The content of report.json: headline figures under plain names, then all others as ``stage.path``.

    Figures of the run as a whole, such as ``wall_s``, have plain names and win over those of a stage.
    """
    headline = {**_from_training(results.train), **_from_operation(results), **dict(dotted(results.run, ""))}
    stages = {stage: tree for stage, tree in results.raw.items() if stage != "run"}
    detail = {key: value for stage, tree in stages.items() for key, value in dotted(tree, stage)}
    return {key: value for key, value in {**headline, **detail}.items() if _kept(value)}


def _kept(value: Scalar | None) -> bool:
    return value is not None and not (isinstance(value, float) and not math.isfinite(value))


def _from_training(train: Train | None) -> dict[str, Any]:
    if train is None:
        return {}
    figures: dict[str, Any] = {"seed": train.seed}
    for name, model in train.models.items():
        prefix = "" if name == "moe" else f"{name}_"
        for metric in ("average_precision", "cp100", "auc", "recall_at_1pct_fpr", "calibration_error"):
            figures[prefix + metric] = getattr(model, metric)
    loads = [share for layer in train.expert_load for share in layer if share is not None]
    figures["min_expert_load"] = min(loads, default=None)
    for name in ("num_features", "rows_train", "rows_holdout", "label_delay_days", "feature_service", "git_commit"):
        figures[name] = getattr(train, name)
    return figures


def _from_operation(results: Results) -> dict[str, Any]:
    figures: dict[str, Any] = {"champion_version": champion(results)}
    if data := results.data:
        figures |= {
            name: getattr(data, name) for name in ("num_transactions", "num_frauds", "fraud_rate", "quarantined")
        }
    if verify := results.verify:
        names = ("served_offline_max_diff", "feature_differences", "feature_rows")
        figures |= {name: getattr(verify, name) for name in names}
    if (latency := results.latency) and (latency.rate_per_s or 0.0) >= RATE_OF_THE_BOUND:
        measured = ("http_p50_ms", "http_p90_ms", "http_p99_ms", "http_achieved_rate")
        figures |= {name: getattr(latency, name) for name in measured}
    if update := results.update:
        figures |= {name: getattr(update, name) for name in ("update_failed_requests", "seconds_label_to_live")}
        retrain = update.after_drift.get("full_retrain", Score())
        figures["full_retrain_average_precision"] = retrain.average_precision
        figures["update_gain"] = _first(update.update_gain, _change(update.after_drift))
        figures["update_forgetting"] = _first(update.update_forgetting, _change(update.old_pattern, sign=-1.0))
    return figures


def _first(*values: float | None) -> float | None:
    return next((value for value in values if value is not None), None)


def _change(scores: Mapping[str, Score], *, sign: float = 1.0) -> float | None:
    """Relative change of average precision from the frozen champion to the updated model."""
    before = scores.get("frozen", Score()).average_precision
    after = scores.get("updated", Score()).average_precision
    return None if not before or after is None else sign * (after / before - 1.0)


def champion(results: Results) -> str | None:
    """The version that serves at the end of the run."""
    for entry in reversed(results.history):
        if entry.champion_after:
            return entry.champion_after
        if entry.action == "promote":
            return entry.version
    if update := results.update:
        return update.challenger_version if update.promoted else update.champion_version
    return None
