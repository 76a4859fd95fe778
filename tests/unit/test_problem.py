"""Problem bodies name what is wrong and give nothing else away."""

from __future__ import annotations

import json

import pytest
from pydantic import ValidationError

from deepseek_ray.data.events import Transaction
from deepseek_ray.errors import (
    DeepseekRayError,
    EnvironmentProblemError,
    LateError,
    OverloadedError,
    RequestError,
    StaleEventError,
)
from deepseek_ray.serving.problem import FieldErrors, encode, field_errors, headers_for, to_problem


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (RequestError("no", status=404, kind="unknown-route"), 404, "unknown-route"),
        (StaleEventError("old"), 409, "stale-event"),
        (OverloadedError("full"), 429, "overloaded"),
        (EnvironmentProblemError("disk full"), 503, "unavailable"),
        (KeyError("secret"), 500, "internal"),
    ],
)
def test_each_error_has_its_status_and_type(error: Exception, status: int, kind: str) -> None:
    found, body = to_problem(error)
    assert (found, body["status"], body["type"]) == (status, status, f"urn:deepseek-ray:problem:{kind}")
    assert "secret" not in encode(body).decode()


def test_all_wrong_fields_are_listed_with_values_that_json_can_hold() -> None:
    with pytest.raises(ValidationError) as caught:
        Transaction.model_validate({"transaction_id": "x" * 500, "amount_cents": float("nan"), "card_id": {"a": 1}})
    status, body = to_problem(FieldErrors(field_errors(caught.value, "transactions.3")))
    assert status == 422
    assert body["error_count"] == len(body["errors"]) >= 5
    by_field = {item["field"]: item for item in body["errors"]}
    assert by_field["transactions.3.amount_cents"]["value"] == "nan"
    assert len(by_field["transactions.3.transaction_id"]["value"]) < 100
    assert by_field["transactions.3.terminal_id"]["fix"] == "add the field"
    json.loads(encode(body))


def test_a_thousand_errors_are_counted_but_not_all_listed() -> None:
    error = {"field": "f", "value": 1, "detail": "d", "fix": "x"}
    _, body = to_problem(FieldErrors([error] * 1_000))
    assert (body["error_count"], len(body["errors"])) == (1_000, 20)


def test_lone_surrogates_and_huge_integers_can_be_told() -> None:
    with pytest.raises(ValidationError) as caught:
        Transaction.model_validate({"card_id": "\ud800", "amount_cents": 10**100})
    encode(to_problem(FieldErrors(field_errors(caught.value)))[1])


def test_who_is_refused_for_now_is_told_when_to_come_back() -> None:
    assert dict(headers_for(429)) == dict(headers_for(503)) == {b"retry-after": b"1"}
    assert b"www-authenticate" in dict(headers_for(401))
    assert headers_for(422) == []


def test_the_fix_of_an_error_reaches_the_client() -> None:
    assert to_problem(DeepseekRayError("gone", fix="come back"))[1]["fix"] == "come back"


def test_overload_says_when_to_come_back_and_what_ran_out() -> None:
    late = LateError("The request would be answered in 2,300 ms.", kind="deadline", retry_after_s=2.3)
    status, body = to_problem(late)
    assert (status, body["type"]) == (503, "urn:deepseek-ray:problem:deadline")
    assert dict(headers_for(status, late)) == {b"retry-after": b"3"}
    fast = OverloadedError("Too fast.", kind="rate-limited", retry_after_s=0.01)
    status, body = to_problem(fast)
    assert (status, body["type"]) == (429, "urn:deepseek-ray:problem:rate-limited")
    assert dict(headers_for(status, fast)) == {b"retry-after": b"1"}


def test_an_address_of_a_file_is_cut_to_what_clients_may_know() -> None:
    error = EnvironmentProblemError("The log '/srv/run/predictions.db' is full.", fix="clear /srv/run/serving")
    assert to_problem(error, "/srv/run")[1]["detail"] == "The log 'predictions.db' is full."
    assert to_problem(error, "/srv/run")[1]["fix"] == "clear serving"
    assert to_problem(error)[1]["detail"] == "The log 'predictions.db' is full."
