"""When a store that does not answer is asked again: seldom enough that its time-outs do not become everyone's."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable

from deepseek_ray.errors import EnvironmentProblemError

AWAY = (EnvironmentProblemError, sqlite3.Error, OSError)
"""What the feature store's doors raise when it cannot be reached, locked, or has no space."""

FIRST_S, LONGEST_S = 1.0, 30.0


class Outage:
    """Off, or on with a time for the next try; the pause doubles with each failure."""

    def __init__(self, now_s: Callable[[], float] = time.monotonic) -> None:
        self._now_s = now_s
        self._pause_s, self._next_s = 0.0, 0.0

    @property
    def on(self) -> bool:
        """Whether the store was away when last asked."""
        return self._pause_s > 0

    @property
    def due(self) -> bool:
        """Whether it is time to ask again."""
        return self._now_s() >= self._next_s

    def begin(self) -> None:
        """It did not answer, for the first time or again."""
        self._pause_s = min(max(FIRST_S, 2 * self._pause_s), LONGEST_S)
        self._next_s = self._now_s() + self._pause_s

    def end(self) -> None:
        """It answers."""
        self._pause_s = 0.0
