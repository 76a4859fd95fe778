"""API keys: read once at start, compared in constant time, never logged."""

from __future__ import annotations

import base64
import hashlib
import hmac
import os
import secrets
from collections.abc import Iterable

from deepseek_ray.errors import EnvironmentProblemError, RequestError

MIN_KEY_CHARS = 16


class ApiKey:
    """One accepted key. Holds only its digest, so that a dump of this object gives nothing away."""

    def __init__(self, key: str) -> None:
        self._digest = _digest(key.encode("utf-8"))

    def check(self, headers: Iterable[tuple[bytes, bytes]]) -> None:
        """Accept a request whose X-API-Key or Authorization header (Bearer, or Basic password) carries the key.

        Args:
            headers: ASGI headers, lower-case names.

        Raises:
            RequestError: status 401, no key or the wrong one.
        """
        given = _given(headers)
        if given is None:
            raise RequestError(
                "The request carries no API key.",
                status=401,
                kind="missing-api-key",
                field="X-API-Key",
                fix="send the header 'X-API-Key: <key>' or 'Authorization: Bearer <key>'",
            )
        if not hmac.compare_digest(_digest(given), self._digest):
            raise RequestError(
                "The API key is wrong.",
                status=401,
                kind="wrong-api-key",
                field="X-API-Key",
                fix="use the key that the service was started with",
            )


def load_key(variable: str) -> str:
    """The key in an environment variable.

    Raises:
        EnvironmentProblemError: the variable is unset or its value too short to be a secret.
    """
    key = os.environ.get(variable, "").strip()
    if not key:
        raise EnvironmentProblemError(
            f"The environment variable {variable} holds no API key.",
            fix=f"set {variable}, or start with --generate-key to have one made and printed",
        )
    if len(key) < MIN_KEY_CHARS:
        raise EnvironmentProblemError(
            f"The API key in {variable} has {len(key)} characters.",
            fix=f"use at least {MIN_KEY_CHARS}, for example the output of 'openssl rand -hex 24'",
        )
    return key


def generate_key() -> str:
    """A fresh random key of 192 bits."""
    return secrets.token_urlsafe(24)


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _given(headers: Iterable[tuple[bytes, bytes]]) -> bytes | None:
    for name, value in headers:
        if name == b"x-api-key":
            return value.strip()
        if name == b"authorization":
            return _from_authorization(value)
    return None


def _from_authorization(value: bytes) -> bytes | None:
    scheme, _, rest = value.partition(b" ")
    if scheme.lower() == b"bearer":
        return rest.strip()
    if scheme.lower() == b"basic":  # what a browser or a Prometheus scraper can send; the user name is ignored
        try:
            return base64.b64decode(rest.strip(), validate=True).partition(b":")[2]
        except ValueError:
            return None
    return None
