"""Contracts of the loop: transaction, prediction, feedback. Money is integer cents, time is UTC."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, AwareDatetime, BaseModel, ConfigDict, Field, StringConstraints

SECOND_US = 1_000_000
DAY_US = 86_400 * SECOND_US

MAX_AMOUNT_CENTS = 10**11
"""One thousand million currency units: beyond it a sum of squares may leave int64."""

Identifier = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.:\-]{0,63}$")]
Code = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_\-]{1,32}$")]


def _to_utc(value: datetime) -> datetime:
    return value.astimezone(UTC)


UtcTime = Annotated[AwareDatetime, AfterValidator(_to_utc)]

CHANNELS = ("chip", "contactless", "online", "atm", "unknown")
Channel = Literal["chip", "contactless", "online", "atm", "unknown"]
Decision = Literal["approve", "review"]


class Record(BaseModel):
    """A strict record: unknown fields are errors, values are not coerced from other types."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Transaction(Record):
    """One card payment as it is known when the decision is due."""

    transaction_id: Identifier
    event_time: UtcTime = Field(description="when the card was used; RFC 3339 with an offset")
    card_id: Identifier
    terminal_id: Identifier
    amount_cents: int = Field(strict=True, ge=0, le=MAX_AMOUNT_CENTS, description="minor currency units")
    device_id: Identifier = "unknown"
    channel: Channel = "unknown"
    country: Code = "unknown"
    merchant_category: Code = "unknown"


class Reason(Record):
    """One feature's share in a score."""

    feature: str
    value: float
    contribution: float = Field(description="log-odds; above 0 speaks for fraud")


class Prediction(Record):
    """One decision with all that is needed to recompute it."""

    prediction_id: Identifier
    transaction_id: Identifier
    probability: float = Field(ge=0, le=1)
    decision: Decision
    threshold: float = Field(ge=0, le=1)
    model_name: str
    model_version: str
    feature_service: str
    cold: list[str] = Field(default_factory=list, description="keys never seen before: scored without history")
    reasons: list[Reason] = Field(default_factory=list)
    latency_ms: float = Field(ge=0)
    degraded: bool = Field(False, description="histories could not be read: scored from memory and defaults")


class Feedback(Record):
    """The truth about one decision, any time later. Idempotent by prediction id."""

    prediction_id: Identifier
    is_fraud: bool = Field(strict=True)
    observed_at: UtcTime = Field(description="when the label became known")


EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def to_us(value: datetime) -> int:
    """Microseconds since the Unix epoch (UTC), exact."""
    delta = value.astimezone(UTC) - EPOCH
    return (delta.days * 86_400 + delta.seconds) * SECOND_US + delta.microseconds


def delay_us(days: float) -> int:
    """A delay in days as whole microseconds; the one rounding that every engine shares."""
    return round(days * DAY_US)


TRANSACTION_COLUMNS: dict[str, Any] = {
    "transaction_id": "str",
    "event_time": "datetime[us, UTC]",
    "order_us": "int64",
    "card_id": "str",
    "terminal_id": "str",
    "amount_cents": "int64",
    "device_id": "str",
    "channel": "str",
    "country": "str",
    "merchant_category": "str",
    "is_fraud": "int8, null when unknown",
    "fraud_scenario": "int8, 0 when none or unknown",
    "label_us": "int64, when the label may be used; null when unknown",
}
"""The transactions table. ``order_us`` is the event time in microseconds, made strictly increasing
within every card and terminal by the order of arrival: window frames run over it, so that batch and
stream see exactly the same events."""
