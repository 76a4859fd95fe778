"""The report on drift and quality: live rows against a version's baseline, and which bounds are passed.

Pure: rows and a baseline in, a report out. What has too few rows to be judged is left out of the checks.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import polars as pl

from deepseek_ray.config import DriftConfig
from deepseek_ray.data.evidence import Check
from deepseek_ray.data.prediction_archive import stack_values
from deepseek_ray.data.prediction_span import Span
from deepseek_ray.online.baseline import Baseline, HeldOut
from deepseek_ray.online.drift import DriftResult, Floats, compare, compare_all
from deepseek_ray.online.gate import relative_drop
from deepseek_ray.online.quality import Quality, judge_quality
from deepseek_ray.online.streams import StreamResult, follow
from deepseek_ray.paths import finite


@dataclass(frozen=True)
class DriftReport:
    """What is known of the live decisions.

    Args:
        version: the version whose baseline they are compared with.
        newest_us: event time of the newest decision.
        decisions: live decisions compared, of which every ``step``-th was looked at.
        features: most moved first; empty with too few decisions.
        score: the version's own scores against those on the held-out days; None with too few.
        quality: on matured decisions, whichever version made them; None with too few.
        own_quality: on those that the version made itself; None with too few, as for a label delay after each swap.
        held_out: the version on the held-out days: ``rows``, ``average_precision``, ``cp100``, ``calibration_error``.
        streams: changes of scores, errors and labels.
        checks: what was judged; an alarm is a check that did not pass.
    """

    version: str
    newest_us: int
    decisions: int
    step: int
    features: tuple[DriftResult, ...]
    score: DriftResult | None
    quality: Quality | None
    own_quality: Quality | None
    held_out: dict[str, float | None]
    streams: tuple[StreamResult, ...]
    checks: tuple[Check, ...]

    @property
    def alarms(self) -> tuple[Check, ...]:
        """Checks that did not pass."""
        return tuple(check for check in self.checks if not check.passed)

    def plain(self) -> dict[str, Any]:
        """Everything as plain data fit for JSON."""
        tree: dict[str, Any] = finite(asdict(self))
        return {**tree, "alarms": [check.name for check in self.alarms]}


def judge_drift(baseline: Baseline, live: Span, matured: Span, newest_us: int, config: DriftConfig) -> DriftReport:
    """Compare live decisions with the baseline.

    Args:
        baseline: of the version that serves.
        live: newest decisions with their vectors, see ``prediction_span.read_vectors``.
        matured: decisions old enough for their labels, see ``prediction_span.read_labelled``.
        newest_us: event time of the newest decision.
        config: bounds, and how many rows a judgement needs.

    Raises:
        DataError: a live feature is NaN or infinite.
    """
    rows = live.rows.filter(pl.col("feature_digest") == baseline.feature_digest)
    own = rows.filter(pl.col("model_version") == baseline.version)
    enough = rows.height >= config.min_rows
    features = tuple(_features(baseline, rows)) if enough else ()
    scored = baseline.score is not None and own.height >= config.min_rows
    score = compare(baseline.score, own["probability"].to_numpy()) if scored and baseline.score else None
    own_matured = replace(matured, rows=matured.rows.filter(pl.col("model_version") == baseline.version))
    quality, own_quality = (
        judge_quality(one) if one.rows.height >= config.min_rows else None for one in (matured, own_matured)
    )
    streams = tuple(_streams(baseline.held_out, own, matured.rows, own_matured.rows, config))
    return DriftReport(
        version=baseline.version,
        newest_us=newest_us,
        decisions=rows.height,
        step=live.step,
        features=features,
        score=score,
        quality=quality,
        own_quality=own_quality,
        held_out=baseline.held_out.figures if baseline.held_out else {},
        streams=streams,
        checks=tuple(_checks(features, score, own_quality, baseline.held_out, streams, config)),
    )


def _features(baseline: Baseline, rows: pl.DataFrame) -> list[DriftResult]:
    values = stack_values(rows)
    place = {name: index for index, name in enumerate(baseline.feature_names)}
    return compare_all(baseline.features, {one.name: values[:, place[one.name]] for one in baseline.features})


def _streams(
    held_out: HeldOut | None, own: pl.DataFrame, matured: pl.DataFrame, own_matured: pl.DataFrame, config: DriftConfig
) -> list[StreamResult]:
    """Scores and squared errors of the version itself; labels of everything that has matured."""
    if held_out is None:
        return []
    label, told = _labels(matured), _labels(own_matured)
    errors = (told - own_matured["probability"].to_numpy()) ** 2
    live = {
        "score": (held_out.scores, own["probability"].to_numpy(), own["order_us"].to_numpy()),
        "error": ((held_out.labels - held_out.scores) ** 2, errors, own_matured["order_us"].to_numpy()),
        "label": (held_out.labels, label, matured["order_us"].to_numpy()),
    }
    enough = {name: parts for name, parts in live.items() if len(parts[1]) >= config.min_rows}
    return [follow(name, *parts, delta=config.adwin_delta) for name, parts in enough.items()]


def _labels(matured: pl.DataFrame) -> Floats:
    return matured["is_fraud"].fill_null(0).to_numpy().astype(np.float64)


def _checks(
    features: tuple[DriftResult, ...],
    score: DriftResult | None,
    quality: Quality | None,
    held_out: HeldOut | None,
    streams: tuple[StreamResult, ...],
    config: DriftConfig,
) -> list[Check]:
    checks = []
    if features:
        checks.append(_at_most("feature_drift", features[0].psi, config.max_feature_psi, features[0].name))
    if score is not None:
        checks.append(_at_most("score_drift", score.psi, config.max_score_psi, "against the held-out days"))
    if quality is not None:
        detail = f"predicted {quality.predicted_rate:.3%}, observed {quality.observed_rate:.3%}"
        checks.append(_at_most("calibration", quality.calibration_error, config.max_calibration_error, detail))
        checks += _ranking(quality, held_out, config)
    errors = [stream for stream in streams if stream.name == "error"]
    # scores and labels may change without harm; an error that grew is what the others are feared for
    return checks + [_at_most("error_change", float(one.rose), 0.0, _moved(one)) for one in errors]


def _ranking(quality: Quality, held_out: HeldOut | None, config: DriftConfig) -> list[Check]:
    now = quality.average_precision
    before = None if held_out is None else held_out.average_precision
    if now is None or before is None or quality.frauds < config.min_frauds:
        return []
    drop = relative_drop(before, now)
    return [_at_most("average_precision", drop, config.max_precision_drop, f"{before:.3f} -> {now:.3f}")]


def _at_most(name: str, value: float, bound: float, detail: str) -> Check:
    return Check(name, value <= bound, value, bound, detail)


def _moved(stream: StreamResult) -> str:
    return f"squared error {stream.before:.5f} -> {stream.after:.5f}"
