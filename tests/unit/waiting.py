"""Waiting for what another thread or process does."""

from __future__ import annotations

import time
from collections.abc import Callable


def await_until(reached: Callable[[], bool]) -> None:
    """Give up after a minute."""
    give_up = time.monotonic() + 60
    while not reached():
        assert time.monotonic() < give_up
        time.sleep(0.02)
