"""How long a request may take: said by its client in a header, else by a setting.

From the request's arrival on it is carried as a moment, so that time spent anywhere counts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from deepseek_ray.errors import RequestError
from deepseek_ray.rpc import MAX_TIMEOUT_S, TIMEOUT_HEADER

MAX_TIMEOUT_MS = round(1e3 * MAX_TIMEOUT_S)
_HEADER = TIMEOUT_HEADER.encode()


@dataclass(frozen=True)
class Patience:
    """How long requests may wait that say nothing themselves.

    Attributes:
        timeout_s: seconds for any of them.
        objective_s: seconds for decisions that fit one batch, which the latency objective is about; 0: as the others.
        batch: records that fit one batch.
    """

    timeout_s: float = math.inf
    objective_s: float = 0.0
    batch: int = 1

    def deadline_s(self, headers: Iterable[tuple[bytes, bytes]], arrived_s: float, records: int | None = None) -> float:
        """The moment after which an answer is worth nothing.

        Args:
            headers: of the request.
            arrived_s: when it arrived; the answer is on the same clock.
            records: how many decisions it asks for; None if it asks for none.
        """
        urgent = self.objective_s and records is not None and records <= self.batch
        return arrived_s + timeout_s(headers, min(self.objective_s, self.timeout_s) if urgent else self.timeout_s)


NO_HURRY = Patience()


def timeout_s(headers: Iterable[tuple[bytes, bytes]], default_s: float) -> float:
    """Seconds that a request allows.

    Args:
        headers: ASGI headers, lower-case names.
        default_s: of a request that says nothing.

    Raises:
        RequestError: 400, the header is no number of milliseconds within 0 and ten minutes.
    """
    for name, value in headers:
        if name == _HEADER:
            return _parsed_ms(value) / 1e3
    return default_s


def _parsed_ms(value: bytes) -> float:
    try:
        timeout_ms = float(value)
    except ValueError:
        timeout_ms = -1.0
    if 0 < timeout_ms <= MAX_TIMEOUT_MS:
        return timeout_ms
    shown = value[:40].decode("latin-1")
    raise RequestError(
        f"The header X-Request-Timeout-Ms = {shown!r} is no time allowed for a request.",
        status=400,
        kind="invalid-header",
        field="X-Request-Timeout-Ms",
        fix=f"send milliseconds, above 0 and at most {MAX_TIMEOUT_MS}, or leave the header out",
    )
