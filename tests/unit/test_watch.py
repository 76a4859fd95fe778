"""The watch over a live service: drift against the training days, quality as labels mature, tomorrow's threshold."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest

from deepseek_ray.config import ServingConfig
from deepseek_ray.data.datasets import RiskDataset
from deepseek_ray.data.events import DAY_US
from deepseek_ray.metrics import average_precision
from deepseek_ray.online.watch import Watch

NAMES = ("amount", "constant", "count")


def reference(num_rows: int = 2_000) -> RiskDataset:
    """Training days: an amount, a feature that never varies, a count."""
    rng = np.random.default_rng(0)
    features = np.stack([rng.lognormal(size=num_rows), np.ones(num_rows), rng.poisson(3, num_rows)], axis=1)
    order = np.arange(num_rows)
    return RiskDataset.build(
        features, np.zeros((num_rows, 1, 6)), np.zeros(num_rows), order, order, feature_names=NAMES
    )


def served(
    num_rows: int = 1_500, *, seed: int = 1, factor: float = 1.0, version: str = "1", threshold: float = 0.5
) -> pl.DataFrame:
    """One day's rows of the prediction log; ``factor`` moves the amounts."""
    rng = np.random.default_rng(seed)
    amounts, counts = factor * rng.lognormal(size=num_rows), rng.poisson(3, num_rows)
    probability = rng.random(num_rows) ** 3
    return pl.DataFrame(
        {
            "feature_values": [np.array([a, 1.0, c]).tobytes() for a, c in zip(amounts, counts, strict=True)],
            "probability": probability,
            "decision": np.where(probability >= threshold, "review", "approve"),
            "threshold": [threshold] * num_rows,
            "model_version": [version] * num_rows,
        }
    )


def labels(*pairs: tuple[float, int | None], day: float = 0.0) -> pl.DataFrame:
    """Probability and truth, which may be unknown; known on a day counted from 0."""
    schema = {"probability": pl.Float64, "is_fraud": pl.Int64}
    return pl.DataFrame(pairs, schema=schema, orient="row").with_columns(known_us=pl.lit(round(day * DAY_US), pl.Int64))


def watch(alert_rate: float = 0.1) -> Watch:
    return Watch(reference(), ServingConfig(alert_rate=alert_rate), threshold=0.5)


def test_a_day_like_the_training_days_shows_no_drift() -> None:
    report = watch().close_day("2026-01-05", served(), labels(), frauds=3)
    assert report.psi_max < 0.1
    assert (report.day, report.transactions, report.frauds, report.model_version) == ("2026-01-05", 1_500, 3, "1")


def test_a_feature_that_moved_is_named_first_and_a_constant_one_never() -> None:
    seen = watch()
    report = seen.close_day("2026-01-05", served(factor=4.0), labels(), frauds=0)
    assert report.psi_max > 0.25
    assert [result.name for result in seen.results] == ["amount", "count"]
    assert report.ks_max == max(result.ks for result in seen.results)


def test_quality_counts_known_labels_only() -> None:
    known = [(0.9, 1), (0.8, 0), (0.7, 1), (0.1, 0)]
    report = watch().close_day("2026-01-05", served(), labels(*known, (0.95, None)), frauds=0)
    assert report.average_precision == pytest.approx(average_precision([1, 0, 1, 0], [0.9, 0.8, 0.7, 0.1]))


def test_a_recovery_shows_as_soon_as_its_labels_are_in() -> None:
    wrong = pl.concat([labels((0.1, 1), (0.9, 0), (0.8, 0), (0.7, 0), day=day) for day in range(20)])
    right = [labels((0.9, 1), (0.1, 0), day=20 + day) for day in range(3)]
    seen = watch()
    lost = seen.close_day("2026-01-24", served(), wrong, frauds=0).average_precision
    assert lost == pytest.approx(average_precision([1, 0, 0, 0], [0.1, 0.9, 0.8, 0.7]))
    assert seen.close_day("2026-01-27", served(), pl.concat([wrong, *right]), frauds=0).average_precision == 1.0


def test_a_threshold_by_cost_stands_where_a_review_pays() -> None:
    costs = ServingConfig(threshold_policy="cost", review_cost=5.0, missed_fraud_cost=100.0)
    seen = Watch(reference(), costs, threshold=0.5)
    for seed in (1, 2):
        assert seen.close_day(f"2026-01-0{seed}", served(seed=seed), labels(), frauds=0).threshold == 0.05


@pytest.mark.parametrize("known", [labels(), labels((0.3, None)), labels((0.3, 0), (0.9, 0))])
def test_without_a_known_fraud_there_is_no_quality(known: pl.DataFrame) -> None:
    assert watch().close_day("2026-01-05", served(), known, frauds=0).average_precision is None


def test_the_threshold_moves_to_what_people_can_review() -> None:
    day = served()
    report = watch(alert_rate=0.1).close_day("2026-01-05", day, labels(), frauds=0)
    assert report.alerts == int((day["probability"] >= 0.5).sum())
    assert float((day["probability"] >= report.threshold).mean()) == pytest.approx(0.1, abs=0.001)  # type: ignore[arg-type]


def test_another_version_starts_from_its_own_threshold_and_scores() -> None:
    seen = watch(alert_rate=0.1)
    seen.close_day("2026-01-05", served(), labels(), frauds=0)
    few = served(500, version="2", threshold=0.3)
    both = pl.concat([served(1_000, seed=2), few])
    assert seen.close_day("2026-01-06", both, labels(), frauds=0).threshold == 0.3
    much = served(1_500, seed=3, version="2")
    report = seen.close_day("2026-01-07", much, labels(), frauds=0)
    own = pl.concat([few, much])["probability"]
    assert float((own >= report.threshold).mean()) == pytest.approx(0.1, abs=0.001)  # type: ignore[arg-type]


def test_a_swap_is_told_with_its_day() -> None:
    seen = watch()
    for day, version in (("2026-01-05", "1"), ("2026-01-06", "1"), ("2026-01-07", "2")):
        seen.close_day(day, served(version=version), labels(), frauds=0)
    assert list(seen.swaps) == [{"at_day": "2026-01-07", "from_version": "1", "to_version": "2"}]


def test_everything_is_plain_data_for_the_report() -> None:
    seen = watch()
    seen.close_day("2026-01-05", served(), labels((0.9, 1)), frauds=1)
    plain = seen.plain()
    assert plain["swaps"] == []
    (day,) = plain["days"]  # type: ignore[misc]
    assert day["average_precision"] == 1.0
    assert {tuple(entry) for entry in plain["drift_features"]} == {("feature", "psi", "ks")}  # type: ignore[attr-defined]
