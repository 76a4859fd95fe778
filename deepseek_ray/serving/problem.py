"""Problem bodies (RFC 9457): what is wrong, with which field and value, and what to do about it."""

from __future__ import annotations

import json
import math
from http import HTTPStatus
from typing import Any

from pydantic import ValidationError

from deepseek_ray.errors import DeepseekRayError, LateError, OverloadedError, RequestError, StaleEventError
from deepseek_ray.logs import hide_folders
from deepseek_ray.serving.wording import MISSING, detail_of, json_type

CONTENT_TYPE = b"application/problem+json"
MAX_ERRORS = 20
MAX_VALUE_CHARS = 80
RETRY_AFTER_S = 1

_FIXES = {
    "missing": "add the field",
    "extra_forbidden": "remove the field, or correct its spelling",
    "int_type": "send a whole number without quotes, in minor currency units",
    "int_from_float": "send a whole number, in minor currency units",
    "greater_than_equal": "send a value that is not below the lower bound",
    "less_than_equal": "send a value that is not above the upper bound",
    "timezone_aware": "give the time an offset, for example 2026-01-31T12:00:00Z",
    "datetime_from_date_parsing": "write the time as RFC 3339, for example 2026-01-31T12:00:00Z",
    "bool_type": "send true or false without quotes",
    "string_type": "send a string in quotes",
    "string_pattern_mismatch": "use letters, digits, '_', '-', '.' and ':' only, within the length limit",
    "literal_error": "use one of the listed values",
    "model_type": "send a JSON object",
}


class FieldErrors(RequestError):
    """Several wrong fields of one body; all of them are reported."""

    def __init__(self, errors: list[dict[str, Any]], *, status: int = 422, kind: str = "invalid-field") -> None:
        first = errors[0]
        super().__init__(
            f"{_place(first)}: {first['detail']}.",
            status=status,
            kind=kind,
            field=first["field"],
            fix=first["fix"],
        )
        self.errors = errors[:MAX_ERRORS]
        self.total = len(errors)


def _place(error: dict[str, Any]) -> str:
    if not error["field"]:
        return "The body"
    shown = "" if error["detail"] == MISSING else f" = {json.dumps(error['value'], ensure_ascii=False)}"
    return f"Field {error['field']!r}{shown}"


def field_errors(error: ValidationError, prefix: str = "") -> list[dict[str, Any]]:
    """Field, value, detail and fix for each problem that pydantic found."""
    return [_entry(item, prefix) for item in error.errors(include_url=False, include_context=False)]


def _entry(item: Any, prefix: str) -> dict[str, Any]:
    path = ".".join(str(part) for part in item["loc"])
    value = None if item["type"] == "missing" else item["input"]
    return field_error(
        f"{prefix}.{path}" if prefix and path else prefix or path,
        value,
        detail_of(item),
        _FIXES.get(item["type"], "send a value of the documented type and range, see /docs"),
    )


def field_error(field: str, value: Any, detail: str, fix: str) -> dict[str, Any]:
    """One entry of a problem's ``errors`` list, its value cut to a printable length."""
    return {"field": field, "value": _printable(value), "detail": detail.rstrip("."), "fix": fix}


def _printable(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, int) and abs(value) > 2**53:
        return str(value) if value.bit_length() < 256 else f"an integer of {value.bit_length()} bits"
    if isinstance(value, bool | int | float | type(None)):
        return value
    text = value if isinstance(value, str) else json_type(value)
    text = text.encode("utf-8", "replace").decode("utf-8")
    return text if len(text) <= MAX_VALUE_CHARS else f"{text[:MAX_VALUE_CHARS]}…"


def to_problem(error: Exception, root: str = "") -> tuple[int, dict[str, Any]]:
    """HTTP status and problem body of an error; an unforeseen error gives 500 and no inner detail.

    Args:
        root: the run folder. A file is named as seen from there, any other by its last part: where a server keeps
            its files is not its clients' business.
    """
    if isinstance(error, RequestError):
        return error.status, _body(error.status, error.kind, error.message, error.fix, error)
    if isinstance(error, StaleEventError):
        fix = error.fix or "send a card's transactions in the order of their times"
        return 409, _body(409, "stale-event", error.message, fix)
    if isinstance(error, OverloadedError):
        status = 503 if isinstance(error, LateError) else 429
        return status, _body(status, error.kind, error.message, error.fix or f"retry after {RETRY_AFTER_S} s")
    if isinstance(error, DeepseekRayError):
        return 503, _body(503, "unavailable", hide_folders(error.message, root), hide_folders(error.fix, root))
    detail = "The service failed on this request; its log has the cause."
    return 500, _body(500, "internal", detail, "retry once, then report it")


def _body(status: int, kind: str, detail: str, fix: str, error: RequestError | None = None) -> dict[str, Any]:
    body: dict[str, Any] = {
        "type": f"urn:deepseek-ray:problem:{kind}",
        "title": HTTPStatus(status).phrase,
        "status": status,
        "detail": detail,
        "fix": fix,
    }
    if error is not None and error.field:
        body["field"] = error.field
    if isinstance(error, FieldErrors):
        body["errors"] = error.errors
        body["error_count"] = error.total
    return body


def headers_for(status: int, error: Exception | None = None) -> list[tuple[bytes, bytes]]:
    """Extra response headers that a status calls for."""
    if status == 401:
        return [(b"www-authenticate", b'Bearer realm="deepseek-ray", Basic realm="deepseek-ray"')]
    if status in (429, 503):
        wait_s = error.retry_after_s if isinstance(error, OverloadedError) else 0.0
        return [(b"retry-after", str(max(RETRY_AFTER_S, math.ceil(wait_s))).encode())]
    return []


def encode(body: dict[str, Any]) -> bytes:
    """JSON bytes of a problem body."""
    return json.dumps(body, allow_nan=False, ensure_ascii=False).encode("utf-8")
