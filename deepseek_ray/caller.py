"""What a caller of a service must give: its key, and how long it waits."""

from __future__ import annotations

import os
from numbers import Real
from typing import Any

from deepseek_ray.errors import ConfigError, EnvironmentProblemError
from deepseek_ray.rpc import MAX_TIMEOUT_S


def api_key(given: str | None) -> str:
    """The key, by default the environment's.

    Raises:
        EnvironmentProblemError: there is none, or one that no header may hold.
    """
    key = given or os.environ.get("DEEPSEEK_RAY_API_KEY", "")
    if not key:
        raise EnvironmentProblemError("No API key is given.", fix="set DEEPSEEK_RAY_API_KEY to the service's key")
    if not (key.isascii() and key.isprintable()) or key != key.strip():  # it is not shown: it may be a real one
        raise EnvironmentProblemError(
            "The API key holds a space at an end, a line break or a character beyond ASCII.",
            fix="set DEEPSEEK_RAY_API_KEY to the key alone",
        )
    return key


def timeout_s(field: str, value: Any) -> float:
    """A time that a call may be allowed, in seconds.

    Raises:
        ConfigError: it is none.
    """
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 < float(value) <= MAX_TIMEOUT_S:  # nor is NaN
        raise ConfigError(
            f"{field} = {value!r} is no time allowed for a call.",
            fix=f"give seconds above 0 and at most {MAX_TIMEOUT_S:g}",
        )
    return float(value)
