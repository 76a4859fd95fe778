"""Request bodies: bytes in, checked records out. A body is taken as a whole or not at all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import Field, ValidationError
from pydantic_core import from_json

from deepseek_ray.data.events import Feedback, Record, Transaction, to_us
from deepseek_ray.errors import RequestError
from deepseek_ray.serving.duplicate_keys import check_names, check_quotes
from deepseek_ray.serving.problem import FieldErrors, field_error, field_errors
from deepseek_ray.serving.wording import json_type

RecordT = TypeVar("RecordT", bound=Record)

_TIME_FIX = "write the time as RFC 3339 with an offset, for example 2026-01-31T12:00:00Z"


class ThresholdChange(Record):
    """A new decision threshold for a model version."""

    threshold: float = Field(strict=True, ge=0, le=1, allow_inf_nan=False, description="review at or above it")
    model_version: str = Field("", strict=True, max_length=64, description="empty: the version that serves now")


@dataclass(frozen=True)
class Limits:
    """Bounds of one body.

    Attributes:
        max_transactions: records a body.
        max_future_us: how far ahead of the service's clock an event may lie, microseconds.
    """

    max_transactions: int
    max_future_us: int


def may_hold_many(body: bytes) -> bool:
    """Whether a body looks like a list of transactions; else it is one transaction, or wrong, or oddly escaped."""
    return b'"transactions"' in body


def parse_transactions(body: bytes, limits: Limits, now_us: int) -> tuple[list[Transaction], bool]:
    """The transactions of a body, and whether it held a list of them.

    Raises:
        RequestError: 400 malformed, 413 too many, 422 wrong fields.
    """
    records, many = _parse(body, "transactions", Transaction, "event_time", limits)
    _check_times(records, "event_time", limits, now_us, "transactions" if many else "")
    return records, many


def parse_feedback(body: bytes, limits: Limits, now_us: int) -> tuple[list[Feedback], bool]:
    """The labels of a body, and whether it held a list of them; raises like ``parse_transactions``."""
    records, many = _parse(body, "feedback", Feedback, "observed_at", limits)
    _check_times(records, "observed_at", limits, now_us, "feedback" if many else "")
    return records, many


def parse_threshold(body: bytes) -> ThresholdChange:
    """A threshold change; raises like ``parse_transactions``."""
    loaded = load_json(body)
    check_names(body)
    try:
        return ThresholdChange.model_validate(loaded)
    except ValidationError as error:
        raise FieldErrors(field_errors(error)) from None


def load_json(body: bytes) -> Any:
    """A body's JSON value.

    Raises:
        RequestError: 400, it is empty or no JSON.
    """
    if not body.strip():
        raise RequestError("The body is empty.", status=400, kind="malformed-json", fix="send a JSON object")
    try:
        return from_json(body)
    except ValueError as error:
        raise RequestError(
            f"The body is not valid JSON: {error}.", status=400, kind="malformed-json", fix="send UTF-8 JSON, see /docs"
        ) from None


def _parse(body: bytes, key: str, kind: type[RecordT], time_field: str, limits: Limits) -> tuple[list[RecordT], bool]:
    loaded = load_json(body)
    if not isinstance(loaded, dict):
        detail = f"{json_type(loaded)}, not an object"
        raise FieldErrors([field_error("", loaded, detail, f"send one record, or {{{key!r}: [...]}}")])
    if key not in loaded:
        record = _one(loaded, kind, time_field, "")
        check_quotes(body, _quotes(loaded))
        return [record], False
    items = loaded[key]
    _check_list(loaded, key, items, limits)
    errors: list[dict[str, Any]] = []
    records: list[RecordT] = []
    for index, item in enumerate(items):
        try:
            records.append(_one(item, kind, time_field, f"{key}.{index}"))
        except FieldErrors as error:
            errors += error.errors
    if errors:
        raise FieldErrors(errors)
    check_quotes(body, 2 + sum(map(_quotes, items)))
    return records, True


def _quotes(item: dict[str, Any]) -> int:
    """Of a valid record: each of its names is a string, and so is each of its values but one, amount or label."""
    return 4 * len(item) - 2


def _check_list(loaded: dict[str, Any], key: str, items: Any, limits: Limits) -> None:
    others = [name for name in loaded if name != key]
    if others:
        detail = f"unknown field beside {key!r}"
        raise FieldErrors([field_error(others[0], loaded[others[0]], detail, "remove the field")])
    if not isinstance(items, list) or not items:
        raise FieldErrors([field_error(key, items, "not a list with at least one record", "send at least one record")])
    check_count(len(items), limits.max_transactions, key)


def check_count(num_records: int, limit: int, field: str) -> None:
    """Refuse a body with more records than are taken.

    Raises:
        RequestError: 413.
    """
    if num_records > limit:
        raise RequestError(
            f"The body holds {num_records} records; at most {limit} are taken.",
            status=413,
            kind="too-many-records",
            field=field,
            fix=f"send at most {limit} a request, or raise serving.max_transactions",
        )


def _one(item: Any, kind: type[RecordT], time_field: str, prefix: str) -> RecordT:
    errors: list[dict[str, Any]] = []
    if isinstance(item, dict) and time_field in item and not _looks_like_time(item[time_field]):
        # pydantic would read a number as seconds or milliseconds since 1970, by its size
        path = f"{prefix}.{time_field}" if prefix else time_field
        errors.append(field_error(path, item[time_field], "not an RFC 3339 time", _TIME_FIX))
        item = {name: value for name, value in item.items() if name != time_field}
    try:
        record = kind.model_validate(item)
    except ValidationError as error:
        found = field_errors(error, prefix)
        raise FieldErrors(errors + [e for e in found if not errors or not e["field"].endswith(time_field)]) from None
    if errors:
        raise FieldErrors(errors)
    return record


def _looks_like_time(value: Any) -> bool:
    return isinstance(value, str) and len(value) >= 16 and value[10] in "Tt "


def _check_times(records: Sequence[Record], field: str, limits: Limits, now_us: int, prefix: str) -> None:
    errors = []
    latest_s = (now_us + limits.max_future_us) / 1e6
    for index, record in enumerate(records):
        value = getattr(record, field)
        if 0 <= value.timestamp() < latest_s:  # the usual case, without exact arithmetic
            continue
        detail = _time_problem(to_us(value), limits, now_us)
        if detail:
            path = f"{prefix}.{index}.{field}" if prefix else field
            errors.append(field_error(path, value.isoformat(), detail, "send the true time, or set the sender's clock"))
    if errors:
        raise FieldErrors(errors)


def _time_problem(time_us: int, limits: Limits, now_us: int) -> str:
    if time_us < 0:
        return "a time before 1970"
    if time_us <= now_us + limits.max_future_us:
        return ""
    ahead_s, allowed_s = (time_us - now_us) / 1e6, limits.max_future_us / 1e6
    return f"{ahead_s:.0f} s ahead of the service's clock, {allowed_s:g} s are allowed"
