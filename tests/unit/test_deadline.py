"""How long a request may take comes from its header, else from the settings."""

from __future__ import annotations

import math

import pytest

from deepseek_ray.errors import RequestError
from deepseek_ray.serving.deadline import NO_HURRY, Patience

PATIENCE = Patience(timeout_s=30.0, objective_s=0.05, batch=64)


@pytest.mark.parametrize(
    ("headers", "records", "wanted_s"),
    [
        ([], 1, 0.05),  # a decision that says nothing: the objective
        ([], 64, 0.05),
        ([], 65, 30.0),  # more than a batch: no single decision waits for it
        ([], None, 30.0),  # labels are not decisions
        ([(b"host", b"x"), (b"x-request-timeout-ms", b"120")], 1, 0.12),
        ([(b"x-request-timeout-ms", b"0.5")], None, 0.0005),
    ],
)
def test_the_nearest_word_counts(headers: list[tuple[bytes, bytes]], records: int | None, wanted_s: float) -> None:
    assert PATIENCE.deadline_s(headers, 100.0, records) == pytest.approx(100.0 + wanted_s)


def test_without_settings_there_is_no_deadline() -> None:
    assert NO_HURRY.deadline_s([], 5.0, 1) == math.inf


@pytest.mark.parametrize("value", [b"", b"soon", b"0", b"-5", b"nan", b"inf", b"600001", b"\xff"])
def test_other_headers_are_refused_by_name(value: bytes) -> None:
    with pytest.raises(RequestError, match="X-Request-Timeout-Ms") as caught:
        PATIENCE.deadline_s([(b"x-request-timeout-ms", value)], 0.0, 1)
    assert (caught.value.status, caught.value.field) == (400, "X-Request-Timeout-Ms")
