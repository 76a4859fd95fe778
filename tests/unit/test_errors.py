"""Errors travel between processes and say what to do."""

from __future__ import annotations

import pickle

import pytest

from deepseek_ray import errors
from deepseek_ray.errors import DeepseekRayError, RequestError

ALL = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, DeepseekRayError)]


@pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.__name__)
def test_an_error_survives_pickling_with_its_fix(kind: type[DeepseekRayError]) -> None:
    back = pickle.loads(pickle.dumps(kind("port 8000 is in use.", fix="choose another")))  # noqa: S301
    assert type(back) is kind
    assert str(back) == "port 8000 is in use. Fix: choose another"
    assert (back.message, back.args) == ("port 8000 is in use.", ("port 8000 is in use.",))


def test_a_request_error_keeps_what_the_http_body_needs() -> None:
    error = RequestError("amount_cents is negative.", status=422, kind="invalid-field", field="amount_cents")
    back = pickle.loads(pickle.dumps(error))  # noqa: S301
    assert (back.status, back.kind, back.field) == (422, "invalid-field", "amount_cents")


def test_without_a_fix_the_message_stands_alone() -> None:
    assert str(DeepseekRayError("it broke.")) == "it broke."


def test_the_tree_in_the_docstring_names_every_error() -> None:
    assert [kind.__name__ for kind in ALL if kind.__name__ not in (errors.__doc__ or "")] == []
