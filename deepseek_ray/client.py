"""Clients of the services: connections are kept, every failure is a typed error.

with Client("127.0.0.1:8000", timeout_s=0.1) as client:            # any service; gRPC first, else HTTP
    answer = client.call("risk.score", {"transaction_id": ...})

async with RiskClient("http://127.0.0.1:8000", api_key=key) as client:  # the risk service's records, over HTTP
    predictions = await client.score([transaction])
"""

from __future__ import annotations

import random
import re
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import orjson

from deepseek_ray import caller
from deepseek_ray.address import Address, Trust
from deepseek_ray.answers import closed, parsed, too_late, unreachable
from deepseek_ray.channels import Channel, GrpcChannel, HttpChannel
from deepseek_ray.data.events import Feedback, Prediction, Transaction
from deepseek_ray.errors import (
    ConfigError,
    DeadlineError,
    OverloadedError,
    UnreachableError,
    WrongAddressError,
)
from deepseek_ray.http_session import HttpSession

DEFAULT_TIMEOUT_S = 30.0
BACKOFF_S = 0.02
"""Before the second retry of a call; doubled for each one after it, with jitter."""

_IDEMPOTENT = re.compile(r"risk\.(score|feedback|model)|models[./].+")
"""Calls that give the same answer when they are done twice: a transaction is scored once by its id, a label is taken
once by its prediction's id, and a model server keeps nothing."""


class RiskClient:
    """Scores transactions and sends labels over HTTP.

    Args:
        base_url: for example ``http://127.0.0.1:8000``.
        api_key: key of the service; by default the environment variable DEEPSEEK_RAY_API_KEY.
        timeout_s: time allowed for one request; the service is told.
        connections: connections kept open.
        ca_file: authorities that are trusted, PEM; by default those of the system or of SSL_CERT_FILE.

    Raises:
        ConfigError: the address or the time is none.
        EnvironmentProblemError: there is no key, or ``ca_file`` cannot be used.
    """

    def __init__(
        self,
        base_url: str,
        *,
        api_key: str | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        connections: int = 8,
        ca_file: str | Path | None = None,
    ) -> None:
        address = Address.parse(base_url, "base_url", tls=ca_file is not None)
        self._timeout_s = caller.timeout_s("timeout_s", timeout_s)
        self._http = HttpSession(address, caller.api_key(api_key), Trust.of(ca_file, address), connections)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._http.close()

    async def score(self, transactions: Sequence[Transaction]) -> list[Prediction]:
        """Decisions for transactions, in their order.

        Raises:
            RequestError: the service refused the request (4xx).
            OverloadedError: its queue is full; try later.
            ServingError: it failed (5xx) or did not answer.
        """
        body = b'{"transactions":[' + b",".join(t.model_dump_json().encode() for t in transactions) + b"]}"
        answer = await self._call("POST", "/v1/risk/score", body)
        return [Prediction.model_validate(item) for item in answer["predictions"]]

    async def feedback(self, labels: Sequence[Feedback]) -> int:
        """Send labels; returns how many were new. Raises like :meth:`score`."""
        body = b'{"feedback":[' + b",".join(label.model_dump_json().encode() for label in labels) + b"]}"
        return int((await self._call("POST", "/v1/risk/feedback", body))["accepted"])

    async def set_threshold(self, threshold: float, model_version: str = "") -> dict[str, Any]:
        """Move the decision threshold of a version, "" for the one that serves. Raises like :meth:`score`.

        Raises:
            RequestError: 409 when another version serves by now.
        """
        body = orjson.dumps({"threshold": threshold, "model_version": model_version})
        return await self._call("POST", "/v1/risk/threshold", body)

    async def model(self) -> dict[str, Any]:
        """The version that answers now. Raises like :meth:`score`."""
        return await self._call("GET", "/v1/risk/model", None)

    async def _call(self, method: str, path: str, body: bytes | None) -> dict[str, Any]:
        return parsed(await self._http.ask(method, path, body or b"", self._timeout_s), path)


class Client:
    """Calls any service: over gRPC while its connection stands, else over HTTP. Safe to share between threads.

    The first call connects, within ``connect_timeout_s`` of its own; a deadline counts from then on. A call that is
    idempotent is tried again, over the other way where there is one, as long as its deadline allows.

    Args:
        address: ``host:port`` that the service printed; it tells the port of gRPC itself. Also an ``http://`` or
            ``https://`` address (the latter encrypts both ways), or the port of gRPC alone, which leaves no fallback.
        api_key: key of the service; by default the environment variable DEEPSEEK_RAY_API_KEY.
        timeout_s: deadline of a call, unless the call has its own.
        connect_timeout_s: for finding the service and connecting.
        retries: at most so many more attempts.
        ca_file: authorities that are trusted over both ways, PEM; by default those of the system or of the
            environment's SSL_CERT_FILE. With it, ``host:port`` means https.

    Raises:
        ConfigError: the address, a time or the number of retries is none.
        EnvironmentProblemError: there is no key, or ``ca_file`` cannot be used.
    """

    def __init__(
        self,
        address: str,
        *,
        api_key: str | None = None,
        timeout_s: float = 1.0,
        connect_timeout_s: float = 5.0,
        retries: int = 3,
        ca_file: str | Path | None = None,
    ) -> None:
        self._address = Address.parse(address, "address", tls=ca_file is not None)
        self._url, self._trust = self._address.url, Trust.of(ca_file, self._address)
        self._api_key = caller.api_key(api_key)
        self._timeout_s = caller.timeout_s("timeout_s", timeout_s)
        self._connect_timeout_s = caller.timeout_s("connect_timeout_s", connect_timeout_s)
        if not isinstance(retries, int) or retries < 0:
            raise ConfigError(f"retries = {retries!r} is no number of attempts.", fix="give 0 or a whole number above")
        self._retries, self._closed = retries, False
        self._connecting = threading.Lock()
        self._rpc: GrpcChannel | None = None
        self._http: HttpChannel | None = None

    def call(
        self,
        method: str,
        payload: Mapping[str, Any] | None = None,
        *,
        timeout_s: float | None = None,
        idempotent: bool | None = None,
    ) -> dict[str, Any]:
        """The answer to one call.

        Args:
            method: ``risk.score`` for ``/v1/risk/score``; with slashes where a name has a dot.
            payload: what the HTTP route takes as its body.
            timeout_s: deadline of this call, over all attempts.
            idempotent: whether it may be sent again; known for the routes of this package.

        Raises:
            RequestError: the service refused (4xx); carries status, kind, field and fix.
            OverloadedError: it is full or away; ``retry_after_s`` says when to come back.
            DeadlineError: the deadline passed.
            UnreachableError: there is no connection, or it broke; WrongAddressError: something else answers.
            ServingError: the service failed.
            ClosedError: the client is closed.
            ConfigError: ``timeout_s`` is no time.
        """
        allowed_s = self._timeout_s if timeout_s is None else caller.timeout_s("timeout_s", timeout_s)
        self.connect()
        body = b"" if payload is None else orjson.dumps(dict(payload))
        again = _IDEMPOTENT.fullmatch(method) is not None if idempotent is None else idempotent
        return parsed(self._send(method, body, allowed_s, self._retries if again else 0), f"{method} at {self._url}")

    def connect(self) -> None:
        """Find out how the service can be reached, and connect. Later calls come at once.

        Raises:
            UnreachableError: nothing answers at the address; WrongAddressError: something else does.
            ClosedError: the client is closed.
        """
        if self._http is not None or self._rpc is not None:
            return
        with self._connecting:
            if self._closed:
                raise closed(self._url)
            if self._http is None and self._rpc is None:
                self._rpc, self._http = self._find()

    def close(self) -> None:
        """Give the connections back; a closed client answers no call any more. Closing twice is closing once."""
        with self._connecting:
            self._closed = True
            channels: tuple[Channel | None, ...] = (self._rpc, self._http)
            self._rpc = self._http = None
        for channel in channels:
            if channel is not None:
                channel.close()

    def __enter__(self) -> Self:
        self.connect()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def transport(self) -> str:
        """What the next call uses: ``grpc`` or ``http``."""
        return "grpc" if isinstance(self._channel(), GrpcChannel) else "http"

    def _channel(self) -> Channel:
        rpc, http = self._rpc, self._http
        chosen = rpc if rpc is not None and (rpc.ready or http is None) else http
        if self._closed:
            raise closed(self._url)
        if chosen is None:
            raise UnreachableError(f"The client of {self._url} is not connected.", fix="call connect() first")
        return chosen

    def _other(self, broken: Channel) -> Channel:
        """What to try after a break: the other way, if there is one and it stands."""
        rpc, http = self._rpc, self._http
        if broken is rpc:
            return http or broken
        return rpc if rpc is not None and rpc.ready else broken

    def _send(self, method: str, body: bytes, allowed_s: float, retries: int) -> bytes:
        deadline = time.monotonic() + allowed_s
        channel = self._channel()
        for attempt in range(retries + 1):
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                raise too_late(f"{method} at {self._url}", allowed_s)
            try:
                return channel.send(method, body, left_s)
            except (UnreachableError, OverloadedError) as error:
                if isinstance(error, UnreachableError):
                    channel = self._other(channel)
                wait_s = error.retry_after_s if isinstance(error, OverloadedError) else _backoff(attempt)
                if attempt == retries or time.monotonic() + wait_s >= deadline:
                    raise
                time.sleep(wait_s)
        raise AssertionError("the last attempt returns or raises")

    def _find(self) -> tuple[GrpcChannel | None, HttpChannel | None]:
        end = time.monotonic() + self._connect_timeout_s
        http = HttpChannel(self._address, self._api_key, self._trust)
        try:
            port = http.rpc_port(self._connect_timeout_s / 2)
        except (UnreachableError, DeadlineError) as error:
            http.close()
            if isinstance(error, WrongAddressError):
                raise
            return self._rpc_alone(end, error), None
        except BaseException:
            http.close()
            raise
        if not port:
            return None, http
        rpc = GrpcChannel(replace(self._address, port=port), self._api_key, self._trust)
        rpc.wait_ready(end - time.monotonic())
        return rpc, http

    def _rpc_alone(self, end: float, over_http: UnreachableError | DeadlineError) -> GrpcChannel:
        """The address may be that of gRPC itself."""
        rpc = GrpcChannel(self._address, self._api_key, self._trust)
        if not rpc.wait_ready(end - time.monotonic()):
            rpc.close()
            raise unreachable(self._url, f"neither gRPC nor HTTP ({over_http.message})", over_http.fix)
        return rpc


def _backoff(attempt: int) -> float:
    return BACKOFF_S * 2 ** (attempt - 1) * random.uniform(0.5, 1.0) if attempt else 0.0
