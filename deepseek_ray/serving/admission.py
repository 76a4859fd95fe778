"""What a batch may take in: no stale event, no id with two contents, no contradicting label; a request whole or not."""

from __future__ import annotations

from dataclasses import dataclass, field

from deepseek_ray.data.events import Feedback, Transaction, to_us
from deepseek_ray.data.prediction_log import LabelTarget, LoggedPrediction
from deepseek_ray.errors import RequestError
from deepseek_ray.serving.commands import ScoreCommand


@dataclass
class Plan:
    """What a batch will do: new events in order, and the answers already at hand."""

    stored: dict[str, LoggedPrediction]
    last_us: dict[str, int]
    fresh: dict[str, Transaction] = field(default_factory=dict)
    received_s: dict[str, float] = field(default_factory=dict)
    refused: dict[int, Exception] = field(default_factory=dict)


def admit(command: ScoreCommand, plan: Plan) -> None:
    """Take a request into the plan as a whole, or raise and leave the plan as it was."""
    fresh: dict[str, Transaction] = {}
    last_us: dict[str, int] = {}
    for index, event in enumerate(command.transactions):
        known = plan.stored.get(event.transaction_id)
        earlier = known.transaction if known else fresh.get(event.transaction_id, plan.fresh.get(event.transaction_id))
        if earlier is not None:
            _check_same(event, earlier, index, together=event.transaction_id in fresh)
            continue
        event_us = to_us(event.event_time)
        last = last_us.get(event.card_id, plan.last_us.get(event.card_id, event_us))
        if event_us < last:
            raise _stale(event, last, index)
        fresh[event.transaction_id] = event
        last_us[event.card_id] = event_us
    plan.fresh |= fresh
    plan.last_us |= last_us
    plan.received_s |= dict.fromkeys(fresh, command.received_s)


def _check_same(event: Transaction, earlier: Transaction, index: int, *, together: bool) -> None:
    if event == earlier:
        return
    changed = next(name for name in Transaction.model_fields if getattr(event, name) != getattr(earlier, name))
    values = f"{getattr(earlier, changed)!s}, now {getattr(event, changed)!s}"
    before = "stands in the request twice, the second time" if together else "was sent before"
    raise RequestError(
        f"Transaction {event.transaction_id!r} (number {index} of the request) {before} with another "
        f"{changed}: {values}.",
        status=409,
        kind="duplicate-transaction",
        field="transaction_id",
        fix="give each transaction its own id" if together else "repeat a request unchanged, or give a new id",
    )


def _stale(event: Transaction, last_us: int, index: int) -> RequestError:
    late_s = (last_us - to_us(event.event_time)) / 1e6
    return RequestError(
        f"event_time {event.event_time.isoformat()} of transaction {event.transaction_id!r} (number {index} of the "
        f"request) is {late_s:g} s older than the last event of card {event.card_id!r}.",
        status=409,
        kind="stale-event",
        field="event_time",
        fix="send a card's transactions in the order of their times",
    )


def label_target(item: Feedback, target: LabelTarget | None, skew_us: int, index: int) -> LabelTarget:
    if target is None:
        raise RequestError(
            f"Prediction {item.prediction_id!r} (number {index} of the request) is not in the log.",
            status=404,
            kind="unknown-prediction",
            field="prediction_id",
            fix="send the prediction_id that the score response carried",
        )
    if to_us(item.observed_at) < target.event_us - skew_us:
        raise RequestError(
            f"observed_at {item.observed_at.isoformat()} lies before the transaction that it is about.",
            field="observed_at",
            kind="invalid-field",
            fix="send the time when the label became known",
        )
    return target


def is_new_label(item: Feedback, target: LabelTarget, earlier: Feedback | None) -> bool:
    held = target.is_fraud if earlier is None else earlier.is_fraud
    if held is None:
        return True
    if held != item.is_fraud:
        where = "is already labelled" if earlier is None else "stands in the request twice, the first time with"
        raise RequestError(
            f"Prediction {item.prediction_id!r} {where} is_fraud={str(held).lower()}.",
            status=409,
            kind="conflicting-feedback",
            field="is_fraud",
            fix="settle which label is true; " + ("the first one stays" if earlier is None else "none was taken"),
        )
    return False
