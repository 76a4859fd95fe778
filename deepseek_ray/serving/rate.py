"""How many records a key may send: a token bucket, refilled by the time that passes.

Own code, 20 lines of it: aiolimiter makes callers wait where a service must refuse, and the token buckets of
``limits`` go through a store with string keys, timers and locks (tens of microseconds) for one event loop's counter.
"""

from __future__ import annotations

import math


class TokenBucket:
    """A rate with room for a burst. A request costs one record in advance and the others once they are counted;
    the second part may leave a debt, which later requests wait for.

    Args:
        rate: records a second; 0 for no limit.
        burst: records that may come at once, at least 1.
    """

    def __init__(self, rate: float, burst: float) -> None:
        self.rate = rate
        self.burst = max(burst, 1.0)
        self._tokens = self.burst
        self._seen_s = -math.inf

    def take(self, now_s: float) -> float:
        """Take one record; 0 where it is granted, else the seconds until it would be."""
        if not self.rate:
            return 0.0
        if now_s > self._seen_s:
            self._tokens = min(self.burst, self._tokens + (now_s - self._seen_s) * self.rate)
            self._seen_s = now_s
        if self._tokens >= 1.0:
            self._tokens -= 1.0
            return 0.0
        return (1.0 - self._tokens) / self.rate

    def charge(self, records: int) -> None:
        """Take what a granted request brought beyond its first record."""
        self._tokens -= records
