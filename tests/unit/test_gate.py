"""The gate as a pure function."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_ray.config import GateConfig
from deepseek_ray.data.evidence import schema_digest
from deepseek_ray.online.gate import GATES, Check, Evidence, GateDecision, VectorContract, decide

CONTRACT = VectorContract(
    schema=schema_digest(["a", "b"], 16, 6), feature_service="risk_default_v1", feature_digest="f"
)
CHAMPION = Evidence(
    name="risk",
    version="1",
    average_precision=0.60,
    cp100=0.30,
    calibration_error=0.01,
    p99_ms=5.0,
    prevalence=0.01,
    heldout_digest="days",
    contract=CONTRACT,
    old_average_precision=0.50,
)
BETTER = replace(CHAMPION, version="2", average_precision=0.65, cp100=0.31)
BOUNDS = GateConfig()
SHARES = st.floats(0, 1)


def failed(decision: GateDecision) -> list[str]:
    return [check.name for check in decision.failed]


def test_a_better_challenger_is_promoted() -> None:
    decision = decide(CHAMPION, BETTER, BOUNDS)
    assert decision.promote
    assert tuple(check.name for check in decision.checks) == GATES
    assert (decision.name, decision.version, decision.champion_version) == ("risk", "2", "1")


def test_equal_is_not_worse() -> None:
    assert decide(CHAMPION, replace(CHAMPION, version="2"), BOUNDS).promote


@pytest.mark.parametrize(
    ("change", "gate"),
    [
        ({"average_precision": 0.599}, "average_precision"),
        ({"cp100": 0.29}, "card_precision_at_100"),
        ({"calibration_error": 0.021}, "calibration_error"),
        ({"p99_ms": 20.1}, "p99_scoring_ms"),
        ({"contract": replace(CONTRACT, schema="x")}, "schema"),
        ({"contract": replace(CONTRACT, feature_service="risk_wide_v1")}, "feature_service"),
        ({"contract": replace(CONTRACT, feature_digest="g")}, "feature_service"),
        ({"old_average_precision": 0.48}, "forgetting"),
        ({"old_average_precision": None}, "forgetting"),
    ],
)
def test_each_gate_stops_its_own_fault(change: dict[str, object], gate: str) -> None:
    assert failed(decide(CHAMPION, replace(BETTER, **change), BOUNDS)) == [gate]  # type: ignore[arg-type]


def test_bounds_tolerate_what_they_say() -> None:
    worse = replace(BETTER, average_precision=0.55, cp100=0.28, old_average_precision=0.46)
    bounds = GateConfig(max_average_precision_drop=0.1, max_cp100_drop=0.1, max_forgetting=0.1)
    assert decide(CHAMPION, worse, bounds).promote


@pytest.mark.parametrize("digest", ["other days", ""])
def test_numbers_of_different_days_are_not_compared(digest: str) -> None:
    decision = decide(CHAMPION, replace(BETTER, heldout_digest=digest), BOUNDS)
    assert failed(decision) == ["average_precision", "card_precision_at_100", "forgetting"]
    assert "different held-out rows" in decision.failed[0].detail


def test_a_version_of_another_model_is_not_compared() -> None:
    assert not decide(CHAMPION, replace(BETTER, name="other"), BOUNDS).promote


def test_the_first_version_passes_absolute_gates_only() -> None:
    first = replace(BETTER, old_average_precision=None)
    assert decide(None, first, BOUNDS).promote
    assert decide(None, first, BOUNDS).champion_version is None


@pytest.mark.parametrize(
    ("change", "gate"),
    [
        ({"average_precision": 0.01}, "average_precision"),
        ({"cp100": 0.0}, "card_precision_at_100"),
        ({"calibration_error": 0.5}, "calibration_error"),
        ({"p99_ms": 50.0}, "p99_scoring_ms"),
        ({"contract": replace(CONTRACT, schema="")}, "schema"),
        ({"contract": replace(CONTRACT, feature_digest="")}, "feature_service"),
    ],
)
def test_the_first_version_must_pass_them(change: dict[str, object], gate: str) -> None:
    assert failed(decide(None, replace(BETTER, **change), BOUNDS)) == [gate]  # type: ignore[arg-type]


def test_serving_may_move_to_another_vector_on_purpose() -> None:
    wide = replace(CONTRACT, schema="w", feature_service="risk_wide_v1")
    challenger = replace(BETTER, contract=wide)
    assert decide(CHAMPION, challenger, BOUNDS, live=wide).promote
    assert failed(decide(CHAMPION, BETTER, BOUNDS, live=wide)) == ["schema", "feature_service"]


@pytest.mark.parametrize(
    "number", ["average_precision", "cp100", "calibration_error", "p99_ms", "old_average_precision"]
)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, -0.1])
def test_numbers_that_are_none_are_refused(number: str, bad: float) -> None:
    assert not decide(CHAMPION, replace(BETTER, **{number: bad}), BOUNDS).promote  # type: ignore[arg-type]


@pytest.mark.parametrize("number", ["average_precision", "cp100", "old_average_precision"])
def test_a_champion_without_a_number_cannot_be_beaten(number: str) -> None:
    assert not decide(replace(CHAMPION, **{number: math.nan}), BETTER, BOUNDS).promote  # type: ignore[arg-type]


def test_a_decision_without_every_check_does_not_promote() -> None:
    decision = GateDecision(name="risk", version="2", champion_version="1", checks=(Check("schema", True, 1, 1),))
    assert not decision.promote
    assert len(decision.failed) == len(GATES) - 1


def test_a_decision_is_json_even_with_nan() -> None:
    tree = json.loads(decide(CHAMPION, replace(BETTER, p99_ms=math.nan), BOUNDS).to_json())
    assert tree["promote"] is False
    assert tree["evidence"]["challenger"]["p99_ms"] is None
    assert tree["evidence"]["bounds"]["max_forgetting"] == BOUNDS.max_forgetting


def test_evidence_read_back_from_json_decides_the_same() -> None:
    tree = json.loads(decide(CHAMPION, replace(BETTER, p99_ms=math.nan), BOUNDS).to_json())["evidence"]["challenger"]
    again = Evidence(**{**tree, "contract": VectorContract(**tree["contract"])})
    assert failed(decide(CHAMPION, again, BOUNDS)) == ["p99_scoring_ms"]


@settings(deadline=None)
@given(champion=SHARES, challenger=SHARES, gain=SHARES, drop=SHARES)
def test_more_precision_never_turns_yes_into_no(champion: float, challenger: float, gain: float, drop: float) -> None:
    bounds = GateConfig(max_average_precision_drop=drop)
    one = replace(CHAMPION, average_precision=champion)
    low = replace(BETTER, average_precision=challenger)
    high = replace(BETTER, average_precision=min(1.0, challenger + gain))
    assert decide(one, low, bounds).promote <= decide(one, high, bounds).promote


@settings(deadline=None)
@given(error=st.floats(0, 1), p99=st.floats(0, 100), old=SHARES, easier=SHARES)
def test_less_error_time_and_forgetting_never_turn_yes_into_no(
    error: float, p99: float, old: float, easier: float
) -> None:
    worse = replace(BETTER, calibration_error=error, p99_ms=p99, old_average_precision=old)
    better = replace(
        BETTER,
        calibration_error=error * (1 - easier),
        p99_ms=p99 * (1 - easier),
        old_average_precision=old + (1 - old) * easier,
    )
    assert decide(CHAMPION, worse, BOUNDS).promote <= decide(CHAMPION, better, BOUNDS).promote


@settings(deadline=None)
@given(numbers=st.tuples(*[st.floats(allow_nan=True, allow_infinity=True)] * 5))
def test_no_number_makes_the_gate_raise_or_promote_nonsense(numbers: tuple[float, ...]) -> None:
    ap, cp, ece, p99, old = numbers
    challenger = replace(
        BETTER, average_precision=ap, cp100=cp, calibration_error=ece, p99_ms=p99, old_average_precision=old
    )
    decision = decide(CHAMPION, challenger, BOUNDS)
    assert not decision.promote or all(math.isfinite(number) for number in numbers)
    json.loads(decision.to_json())


@pytest.mark.parametrize(
    ("prevalence", "num_rows", "passes"),
    [(0.02, 5_000, True), (0.05, 5_000, False), (0.05, 20, True), (0.0, 5_000, False), (0.0, 100, True)],
)
def test_labels_of_another_kind_are_refused_where_chance_does_not_explain_them(
    prevalence: float, num_rows: int, passes: bool
) -> None:
    """One row in a hundred used to be a fraud: three times that is too much, if there are enough rows to tell."""
    changes = {"prevalence": prevalence, "num_rows": num_rows, "old_prevalence": 0.01}
    decision = decide(replace(CHAMPION, **changes), replace(BETTER, **changes), BOUNDS)
    assert failed(decision) == ([] if passes else ["label_shift"])
