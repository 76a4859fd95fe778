"""Who may call: the key of a request's headers, looked up by its digest. Keys are never kept in clear, never logged."""

from __future__ import annotations

import base64
import math
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from deepseek_ray.errors import EnvironmentProblemError, OverloadedError, RequestError
from deepseek_ray.logs import get_logger
from deepseek_ray.serving.keys import SCOPES, KeyRecord, Scope, digest, digest_of, read_keys
from deepseek_ray.serving.rate import TokenBucket

logger = get_logger(__name__)

MIN_KEY_CHARS = 16
LOOK_EVERY_S = 1.0
"""How often the file of keys is looked at: a revoked key is dead after so long."""


@dataclass(frozen=True, slots=True)
class Grant:
    """What a key that is known may do.

    Attributes:
        level: position of its scope in ``SCOPES``.
        expires_s: Unix time from which it counts no more.
        bucket: its rate; shared by all requests of the key.
    """

    level: int
    expires_s: float
    bucket: TokenBucket


class Keyring:
    """All keys of a service: one of the environment, which may do everything, and those of a file.

    Looking a digest up in a table needs no constant time: what a caller could learn from timing is about the digest
    of its guess, which it cannot steer.

    Args:
        key: the environment's key, or what ``keys.hashed`` made of it; "" for none.
        file: digests of further keys; read again when it changes.
        rate: records a second for keys that have no rate of their own; 0 for no limit.
        burst_s: seconds of a rate that may come at once.

    Raises:
        EnvironmentProblemError: there is no key at all, or the file is damaged.
    """

    def __init__(
        self,
        key: str,
        file: Path | None = None,
        *,
        rate: float = 0.0,
        burst_s: float = 1.0,
        clock_s: Callable[[], float] = time.monotonic,
        now_s: Callable[[], float] = time.time,
    ) -> None:
        self._file, self._rate, self._burst_s = file, rate, burst_s
        self._clock_s, self._now_s = clock_s, now_s
        self._own: dict[bytes, Grant] = {}
        if key:
            self._own[digest_of(key)] = Grant(len(SCOPES) - 1, math.inf, self._bucket(None))
        self._known = dict(self._own)
        self._looked_s = -math.inf
        self._stamp: tuple[int, ...] = ()
        if file is not None:
            self._read(file)
        if not self._known:
            raise EnvironmentProblemError("The service has no API key.", fix="add one with: deepseek-ray keys add NAME")

    def check(self, headers: Iterable[tuple[bytes, bytes]], scope: Scope = "read") -> Grant:
        """Accept a request whose X-API-Key or Authorization header (Bearer, or Basic password) carries a key.

        Args:
            headers: ASGI headers, lower-case names.
            scope: what the request needs.

        Raises:
            RequestError: 401, no key, an unknown or an expired one; 403, one that may not do this.
            OverloadedError: the key's rate is used up.
        """
        clock_s = self._clock_s()
        if clock_s - self._looked_s >= LOOK_EVERY_S:
            self._look(clock_s)
        given = _given(headers)
        if given is None:
            raise _unknown("missing-api-key", "The request carries no API key.", _HOW)
        grant = self._known.get(digest(given))
        if grant is None:
            raise _unknown("wrong-api-key", "The API key is wrong.", "use a key of this service")
        if grant.expires_s <= self._now_s():
            raise _unknown("expired-api-key", "The API key has expired.", "ask for a new one: deepseek-ray keys add")
        if grant.level < SCOPES.index(scope):
            raise _forbidden(SCOPES[grant.level], scope)
        wait_s = grant.bucket.take(clock_s)
        if wait_s:
            raise _too_fast(grant.bucket, wait_s)
        return grant

    def _look(self, clock_s: float) -> None:
        """Read the file again if it is another one; a damaged one changes nothing until it is repaired."""
        self._looked_s = clock_s
        if self._file is None or _stamp(self._file) == self._stamp:
            return
        try:
            self._read(self._file)
            logger.info("%d API keys of the key file count now", len(self._known) - len(self._own))
        except EnvironmentProblemError as error:
            logger.error("the keys stay as they were: %s", error)

    def _read(self, file: Path) -> None:
        self._stamp = _stamp(file)  # before reading: a change in between is seen the next time
        before = self._known
        fresh = {bytes.fromhex(record.sha256): record for record in read_keys(file)}
        self._known = {hashed: self._grant(record, before.get(hashed)) for hashed, record in fresh.items()} | self._own

    def _grant(self, record: KeyRecord, before: Grant | None) -> Grant:
        bucket = self._bucket(record.rate_per_s)
        if before is not None and before.bucket.rate == bucket.rate:
            bucket = before.bucket  # reading the file again gives nobody a fresh burst
        expires_s = math.inf if record.expires is None else record.expires.timestamp()
        return Grant(SCOPES.index(record.scope), expires_s, bucket)

    def _bucket(self, rate: float | None) -> TokenBucket:
        chosen = self._rate if rate is None else rate
        return TokenBucket(chosen, chosen * self._burst_s)


def load_key(variable: str, file: Path | None = None) -> str:
    """The key in an environment variable; "" where it is not set and a file holds keys.

    Raises:
        EnvironmentProblemError: there is no key at all, or the variable's value is too short to be a secret.
    """
    key = os.environ.get(variable, "").strip()
    if not key and not (file and read_keys(file)):
        raise EnvironmentProblemError(
            f"The environment variable {variable} holds no API key, and no file does.",
            fix=f"set {variable}, start with --generate-key to have one made, or: deepseek-ray keys add NAME",
        )
    if key and len(key) < MIN_KEY_CHARS:
        raise EnvironmentProblemError(
            f"The API key in {variable} has {len(key)} characters.",
            fix=f"use at least {MIN_KEY_CHARS}, for example the output of 'openssl rand -hex 24'",
        )
    return key


_HOW = "send the header 'X-API-Key: <key>' or 'Authorization: Bearer <key>'"


def _unknown(kind: str, detail: str, fix: str) -> RequestError:
    return RequestError(detail, status=401, kind=kind, field="X-API-Key", fix=fix)


def _forbidden(has: Scope, needs: Scope) -> RequestError:
    return RequestError(
        f"The API key has the scope {has!r}; this needs {needs!r}.",
        status=403,
        kind="scope-too-small",
        field="X-API-Key",
        fix=f"use a key made with --scope {needs}",
    )


def _too_fast(bucket: TokenBucket, wait_s: float) -> OverloadedError:
    return OverloadedError(
        f"The API key may send {bucket.rate:g} records a second.",
        fix="send more slowly, or ask for a higher rate",
        kind="rate-limited",
        retry_after_s=wait_s,
    )


def _stamp(file: Path) -> tuple[int, ...]:
    try:
        found = file.stat()
    except OSError:
        return ()
    return found.st_mtime_ns, found.st_size, found.st_ino


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
