"""The contracts of the loop refuse what would spoil a feature or a label."""

from __future__ import annotations

import math
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from deepseek_ray.data.events import MAX_AMOUNT_CENTS, Feedback, Prediction, Transaction, to_us

PAYMENT: dict[str, Any] = {
    "transaction_id": "tx1",
    "event_time": "2026-01-31T12:30:00+01:00",
    "card_id": "c1",
    "terminal_id": "t1",
    "amount_cents": 1_250,
}
LABEL: dict[str, Any] = {"prediction_id": "p1", "is_fraud": True, "observed_at": "2026-02-01T00:00:00Z"}


def refused(model: type[BaseModel], **fields: Any) -> str:
    """The field that a record is refused for."""
    with pytest.raises(ValidationError) as caught:
        model.model_validate(fields)
    return ".".join(str(part) for part in caught.value.errors()[0]["loc"])


def test_times_become_utc_and_attributes_unknown() -> None:
    made = Transaction.model_validate(PAYMENT)
    assert made.event_time == datetime(2026, 1, 31, 11, 30, tzinfo=UTC)
    assert made.event_time.tzinfo is UTC
    assert (made.device_id, made.channel, made.country, made.merchant_category) == ("unknown",) * 4


@pytest.mark.parametrize("amount", [-1, 12.5, "1250", True, math.nan, math.inf, MAX_AMOUNT_CENTS + 1, None])
def test_an_amount_is_whole_cents_in_range(amount: Any) -> None:
    assert refused(Transaction, **{**PAYMENT, "amount_cents": amount}) == "amount_cents"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("event_time", "2026-01-31T12:30:00"),
        ("event_time", "yesterday"),
        ("card_id", ""),
        ("card_id", "-c1"),
        ("card_id", "c" * 65),
        ("terminal_id", "t 1"),
        ("device_id", "d\n"),
        ("channel", "phone"),
        ("country", "F R"),
        ("colour", "red"),
    ],
)
def test_a_wrong_or_unknown_field_is_named(field: str, value: str) -> None:
    assert refused(Transaction, **{**PAYMENT, field: value}) == field


@pytest.mark.parametrize("field", list(PAYMENT))
def test_a_missing_field_is_named(field: str) -> None:
    assert refused(Transaction, **{name: value for name, value in PAYMENT.items() if name != field}) == field


def test_a_label_is_a_true_boolean_with_a_zoned_time() -> None:
    assert Feedback.model_validate(LABEL).is_fraud
    assert refused(Feedback, **{**LABEL, "is_fraud": 1}) == "is_fraud"
    assert refused(Feedback, **{**LABEL, "observed_at": "2026-02-01T00:00:00"}) == "observed_at"


def test_a_prediction_is_a_probability() -> None:
    fields = {
        "prediction_id": "p1",
        "transaction_id": "tx1",
        "probability": 1.5,
        "decision": "review",
        "threshold": 0.5,
        "model_name": "risk",
        "model_version": "1",
        "feature_service": "risk_default_v1",
        "latency_ms": 3.0,
    }
    assert refused(Prediction, **fields) == "probability"
    assert Prediction.model_validate({**fields, "probability": 0.5}).cold == []


@given(st.datetimes(min_value=datetime(1970, 1, 2), max_value=datetime(2200, 1, 1)), st.integers(-14 * 60, 14 * 60))
def test_microseconds_are_exact_in_any_zone(moment: datetime, minutes: int) -> None:
    zoned = moment.replace(tzinfo=timezone(timedelta(minutes=minutes)))
    assert timedelta(microseconds=to_us(zoned)) == zoned - datetime(1970, 1, 1, tzinfo=UTC)


def test_a_transaction_survives_json() -> None:
    made = Transaction.model_validate(PAYMENT)
    assert Transaction.model_validate_json(made.model_dump_json()) == made
