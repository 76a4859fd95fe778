"""What an answer stands for, whichever way it came: its body, or a typed error."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import orjson

from deepseek_ray.errors import (
    ClosedError,
    DeadlineError,
    OverloadedError,
    RequestError,
    ServingError,
    UnreachableError,
    WrongAddressError,
)

_FIX_ADDRESS = "give the address that the service printed"


def accepted(status: int, body: bytes, where: str, retry_after_s: float = 1.0) -> bytes:
    """The body of an answer that is no refusal; else raises what :func:`refusal` makes of it."""
    if status < 300:
        return body
    raise refusal(status, body, where, retry_after_s)


def refusal(status: int, body: bytes, where: str, retry_after_s: float = 1.0) -> ServingError:
    """The error that an HTTP status and its problem body stand for."""
    problem = _problem(body)
    detail = f"{where} answered {status}: {problem.get('detail', problem)}"
    if status < 400:
        return WrongAddressError(detail, fix=_FIX_ADDRESS)
    if status in (429, 503):
        return OverloadedError(detail, fix="send more slowly", retry_after_s=retry_after_s)
    if status == 504:
        return DeadlineError(detail, fix="allow more time, or send fewer records a request")
    if status < 500:
        kind, field, fix = (str(problem.get(name, "")) for name in ("type", "field", "fix"))
        return RequestError(detail, status=status, kind=kind, field=field, fix=fix)
    return ServingError(detail, fix="see the service's log")


def parsed(body: bytes, where: str) -> dict[str, Any]:
    """The JSON object of an answer.

    Raises:
        WrongAddressError: it is none, so no service of ours gave it.
    """
    try:
        found = orjson.loads(body)
    except orjson.JSONDecodeError:
        found = None
    if not isinstance(found, dict):
        raise another(where, f"no JSON object: {_shown(body)!r}")
    return found


def rpc_port(body: bytes, where: str) -> int:
    """The port of gRPC that a service names in its answer to /healthz, 0 for none.

    Raises:
        WrongAddressError: another program answered.
    """
    port = parsed(body, where).get("rpc_port")
    if not isinstance(port, int) or isinstance(port, bool) or not 0 <= port <= 65_535:
        raise another(where, f"'rpc_port' = {port!r}: {_shown(body)!r}")
    return port


def seconds(text: str | None) -> float:
    """The time of a Retry-After header; a second where there is none."""
    return float(text) if text and re.fullmatch(r"\d{1,6}", text) else 1.0


def another(where: str, what: str) -> WrongAddressError:
    """Something else answers there."""
    return WrongAddressError(f"{where} is no service of deepseek_ray, it answered with {what}.", fix=_FIX_ADDRESS)


def unreachable(where: str, why: str, fix: str = "see that the service runs") -> UnreachableError:
    """Nothing answered there."""
    return UnreachableError(f"{where} did not answer: {why}.", fix=fix)


def too_late(where: str, timeout_s: float) -> DeadlineError:
    """Nothing answered there in time."""
    return DeadlineError(f"{where} did not answer within {timeout_s:.3g} s.", fix="allow more time, or try again later")


def closed(where: str) -> ClosedError:
    """A client was used after its end."""
    return ClosedError(f"The client of {where} is closed.", fix="make a new one, or call inside its with block")


def _problem(body: bytes) -> Mapping[str, Any]:
    try:
        found = orjson.loads(body)
    except orjson.JSONDecodeError:
        found = None
    return found if isinstance(found, dict) else {"detail": _shown(body)}


def _shown(body: bytes) -> str:
    return body[:200].decode(errors="replace")
