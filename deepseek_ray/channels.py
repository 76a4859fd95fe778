"""How a call travels to a service: over gRPC, or over HTTP. Connections are kept; failures are typed errors."""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Protocol

import httpx
import orjson

from deepseek_ray.errors import (
    DeadlineError,
    DeepseekRayError,
    OverloadedError,
    RequestError,
    ServingError,
    UnreachableError,
)
from deepseek_ray.rpc import CALL, PROBLEM_KEY, STATUS_KEY, TIMEOUT_HEADER, CallReply, CallRequest, path_of

MAX_MESSAGE_BYTES = 64 << 20
_GET = re.compile(r"(risk\.model|models[./][^./]+)")
"""Calls whose HTTP route takes no body."""


class Channel(Protocol):
    """A way to a service."""

    def send(self, method: str, payload: bytes, timeout_s: float) -> bytes:
        """The answer's body.

        Raises:
            RequestError, OverloadedError, ServingError: the service refused or failed.
            UnreachableError: there is no connection; DeadlineError: there was no answer in time.
        """

    def close(self) -> None: ...


class HttpChannel:
    """HTTP/1.1 with connections that stay open.

    Args:
        base_url: for example ``http://127.0.0.1:8000``.
        api_key: of the service.
        connections: kept open at most.
    """

    def __init__(self, base_url: str, api_key: str, connections: int = 8) -> None:
        self.base_url = base_url.rstrip("/")
        limits = httpx.Limits(max_connections=connections, max_keepalive_connections=connections)
        headers = {"X-API-Key": api_key, "Content-Type": "application/json"}
        self._client = httpx.Client(base_url=self.base_url, headers=headers, limits=limits, trust_env=False)

    def send(self, method: str, payload: bytes, timeout_s: float) -> bytes:
        path = path_of(method)
        verb = "GET" if not payload and _GET.fullmatch(method) else "POST"
        response = self._ask(verb, path, payload, timeout_s)
        retry_after_s = _seconds(response.headers.get("retry-after"))
        return accepted(response.status_code, response.content, path, retry_after_s)

    def rpc_port(self, timeout_s: float) -> int:
        """The port of gRPC that the service names, 0 for none.

        Raises:
            UnreachableError: nothing answers at the address, or not HTTP.
        """
        answer = self._ask("GET", "/healthz", b"", timeout_s)
        with suppress(ValueError, TypeError):
            return int(orjson.loads(answer.content)["rpc_port"])
        return 0

    def close(self) -> None:
        self._client.close()

    def _ask(self, verb: str, path: str, payload: bytes, timeout_s: float) -> httpx.Response:
        try:
            headers = {TIMEOUT_HEADER: f"{1e3 * timeout_s:.3f}"}
            return self._client.request(verb, path, content=payload or None, timeout=timeout_s, headers=headers)
        except httpx.TimeoutException as error:
            raise too_late(f"{self.base_url}{path}", timeout_s) from error
        except httpx.HTTPError as error:
            raise unreachable(f"{self.base_url}{path}", repr(error)) from error


class GrpcChannel:
    """One HTTP/2 connection that all calls share; gRPC restores it in the background when it breaks.

    Args:
        target: ``host:port``.
        api_key: of the service.
    """

    def __init__(self, target: str, api_key: str) -> None:
        import grpc  # here, so that a user of HTTP alone does without

        self._grpc, self.target = grpc, target
        size = ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES)
        again = ("grpc.max_reconnect_backoff_ms", 2_000)
        self._channel = grpc.insecure_channel(target, options=[size, again, ("grpc.enable_http_proxy", 0)])
        self._metadata = (("x-api-key", api_key),)
        self._call = self._channel.unary_unary(
            CALL, request_serializer=CallRequest.SerializeToString, response_deserializer=CallReply.FromString
        )
        self._ready = threading.Event()
        self._channel.subscribe(self._on_state, try_to_connect=True)

    @property
    def ready(self) -> bool:
        """Whether the connection stands now."""
        return self._ready.is_set()

    def wait_ready(self, timeout_s: float) -> bool:
        """Wait for the connection; False when it does not come about."""
        return self._ready.wait(timeout_s)

    def send(self, method: str, payload: bytes, timeout_s: float) -> bytes:
        path_of(method)  # a name that is none is refused here
        request = CallRequest(method=method, payload=payload)
        try:
            return bytes(self._call(request, timeout=timeout_s, metadata=self._metadata).payload)
        except self._grpc.RpcError as error:
            raise self._typed(error, method, timeout_s) from error

    def close(self) -> None:
        self._channel.unsubscribe(self._on_state)
        self._channel.close()

    def _on_state(self, state: Any) -> None:
        states = self._grpc.ChannelConnectivity
        if state is states.READY:
            self._ready.set()
        elif state is not states.IDLE:
            self._ready.clear()

    def _typed(self, error: Any, method: str, timeout_s: float) -> DeepseekRayError:
        trailing = dict(error.trailing_metadata() or ())
        if status := trailing.get(STATUS_KEY):
            return refusal(int(status), trailing.get(PROBLEM_KEY, b""), method, _seconds(trailing.get("retry-after")))
        codes, where = self._grpc.StatusCode, f"{method} at {self.target}"
        if error.code() is codes.DEADLINE_EXCEEDED:
            return too_late(where, timeout_s)
        if error.code() in (codes.UNAVAILABLE, codes.CANCELLED):
            return unreachable(where, error.details())
        return ServingError(f"{where} failed: {error.code().name} {error.details()}", fix="see the service's log")


def accepted(status: int, body: bytes, where: str, retry_after_s: float = 1.0) -> bytes:
    """The body of an answer that is no refusal; else raises what :func:`refusal` makes of it."""
    if status < 400:
        return body
    raise refusal(status, body, where, retry_after_s)


def refusal(status: int, body: bytes, where: str, retry_after_s: float = 1.0) -> ServingError:
    """The error that an HTTP status and its problem body stand for."""
    problem = _problem(body)
    detail = f"{where} answered {status}: {problem.get('detail', problem)}"
    if status in (429, 503):
        return OverloadedError(detail, fix="send more slowly", retry_after_s=retry_after_s)
    if status == 504:
        return DeadlineError(detail, fix="allow more time, or send fewer records a request")
    if status < 500:
        kind, field, fix = (str(problem.get(name, "")) for name in ("type", "field", "fix"))
        return RequestError(detail, status=status, kind=kind, field=field, fix=fix)
    return ServingError(detail, fix="see the service's log")


def _problem(body: bytes) -> Mapping[str, Any]:
    try:
        found = orjson.loads(body)
    except orjson.JSONDecodeError:
        found = None
    return found if isinstance(found, dict) else {"detail": body[:200].decode(errors="replace")}


def _seconds(text: str | None) -> float:
    return float(text) if text and re.fullmatch(r"\d{1,6}", text) else 1.0


def unreachable(where: str, why: str) -> UnreachableError:
    """Nothing answered there."""
    return UnreachableError(f"{where} did not answer: {why}.", fix="see that the service runs")


def too_late(where: str, timeout_s: float) -> DeadlineError:
    """Nothing answered there in time."""
    return DeadlineError(f"{where} did not answer within {timeout_s:.3g} s.", fix="allow more time, or try again later")
