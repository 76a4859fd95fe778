"""A bucket grants its rate and a burst, and remembers a debt."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek_ray.serving.rate import TokenBucket


def test_a_burst_then_the_rate() -> None:
    bucket = TokenBucket(rate=2.0, burst=3.0)
    assert [bucket.take(10.0) for _ in range(4)] == [0.0, 0.0, 0.0, 0.5]
    assert bucket.take(10.5) == 0.0
    assert bucket.take(10.5) == pytest.approx(0.5)


def test_many_records_leave_a_debt() -> None:
    bucket = TokenBucket(rate=10.0, burst=10.0)
    assert bucket.take(0.0) == 0.0
    bucket.charge(99)
    assert bucket.take(0.0) == pytest.approx(9.1)
    assert bucket.take(9.0) > 0
    assert bucket.take(9.2) == 0.0


def test_no_rate_is_no_limit() -> None:
    bucket = TokenBucket(rate=0.0, burst=0.0)
    assert all(bucket.take(0.0) == 0.0 for _ in range(1_000))


@given(st.lists(st.floats(0, 2), min_size=1, max_size=200), st.floats(0.5, 50), st.floats(1, 20))
def test_never_more_than_burst_plus_rate_times_time(gaps: list[float], rate: float, burst: float) -> None:
    bucket = TokenBucket(rate, burst)
    now = granted = 0.0
    for gap in gaps:
        now += gap
        granted += bucket.take(now) == 0.0
    assert granted <= burst + rate * (now - gaps[0]) + 1e-6
