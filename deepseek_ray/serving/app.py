"""The HTTP face of the risk service: plain ASGI, no framework on the hot route, no Ray.

Every route but the health ones asks for the API key; every error is a problem body (RFC 9457).
"""

from __future__ import annotations

import json
import time
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from deepseek_ray.errors import DeepseekRayError, OverloadedError, RequestError, ServingError
from deepseek_ray.logs import get_logger, trace_of
from deepseek_ray.serving import openapi, problem, wire
from deepseek_ray.serving.auth import Keyring
from deepseek_ray.serving.batching import Batcher
from deepseek_ray.serving.commands import (
    Command,
    FeedbackCommand,
    FeedbackResult,
    LiveModel,
    Result,
    ScoreCommand,
    ScoreResult,
    ThresholdCommand,
)
from deepseek_ray.serving.deadline import NO_HURRY, Patience
from deepseek_ray.serving.keys import Scope as KeyScope
from deepseek_ray.serving.monitor import Monitor

logger = get_logger(__name__)

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Headers = Iterable[tuple[bytes, bytes]]

JSON = b"application/json"
ADMIN_ROUTES = frozenset({"/v1/risk/threshold"})
"""Routes that change what the service does for everyone."""


@dataclass(frozen=True)
class Response:
    """Status, body and headers of an answer."""

    status: int
    body: bytes
    content_type: bytes = JSON
    headers: tuple[tuple[bytes, bytes], ...] = ()


@dataclass(frozen=True)
class Service:
    """What the routes need, and nothing of how it is made.

    Attributes:
        live: the version that serves now.
        refused: why the registry's champion is not the version that serves, or "".
        healthy: False when the service should get no traffic.
        shutdown: called once when the server stops.
        patience: deadlines of requests that name none.
    """

    batcher: Batcher[Command, Result]
    monitor: Monitor
    limits: wire.Limits
    max_body_bytes: int
    live: Callable[[], LiveModel]
    refused: Callable[[], str]
    healthy: Callable[[], bool]
    shutdown: Callable[[], None]
    patience: Patience = NO_HURRY
    now_us: Callable[[], int] = lambda: time.time_ns() // 1_000


Handler = Callable[[Scope, Receive], Awaitable[Response]]


class RiskApp:
    """ASGI application of the risk service."""

    def __init__(self, service: Service, keys: Keyring) -> None:
        self._service = service
        self._keys = keys
        self._routes: dict[str, dict[str, Handler]] = {
            "/v1/risk/score": {"POST": self._score},
            "/v1/risk/feedback": {"POST": self._feedback},
            "/v1/risk/threshold": {"POST": self._threshold},
            "/v1/risk/model": {"GET": self._model},
            "/healthz": {"GET": self._healthz},
            "/readyz": {"GET": self._readyz},
            "/metrics": {"GET": self._metrics},
            "/openapi.json": {"GET": self._openapi},
            "/docs": {"GET": self._docs},
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one HTTP request, or the server's start and stop."""
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1003})
            return
        start = time.perf_counter()
        path = scope["path"]
        response = await self._respond(scope, receive, path)
        await _send(send, response)
        route = path if path in self._routes else "other"
        self._service.monitor.answered(route, response.status, time.perf_counter() - start)

    async def _respond(self, scope: Scope, receive: Receive, path: str) -> Response:
        try:
            if path not in openapi.OPEN_ROUTES:
                scope["grant"] = self._keys.check(scope["headers"], _needed_scope(path, scope["method"]))
            return await self._find(path, scope["method"])(scope, receive)
        except Exception as error:
            if isinstance(error, OverloadedError):
                self._service.monitor.shed.labels(error.kind).inc()
            elif not isinstance(error, DeepseekRayError):
                route = path if path in self._routes else "an unknown path"
                logger.error("request to %s failed: %s", route, trace_of(error))
            return _problem(error)

    def _find(self, path: str, method: str) -> Handler:
        methods = self._routes.get(path)
        if methods is None:
            detail = f"There is no route {path[:80]!r}."
            raise RequestError(detail, status=404, kind="unknown-route", fix="see /docs for the routes")
        if method not in methods:
            allowed = ", ".join(methods)
            raise RequestError(f"{path} does not take {method}.", status=405, kind="wrong-method", fix=f"use {allowed}")
        return methods[method]

    async def _score(self, scope: Scope, receive: Receive) -> Response:
        received_s = time.perf_counter()
        service = self._service
        body = await _read(scope, receive, service.max_body_bytes)
        events, many = wire.parse_transactions(body, service.limits, service.now_us())
        scope["grant"].bucket.charge(len(events) - 1)
        result = await service.batcher.submit(
            ScoreCommand(events, received_s),
            weight=len(events),
            arrived_s=received_s,
            deadline_s=service.patience.deadline_s(scope["headers"], received_s, len(events)),
        )
        assert isinstance(result, ScoreResult)
        encoded = [item.model_dump_json().encode("utf-8") for item in result.predictions]
        headers = ((b"x-repeated", str(result.repeated).encode()),) if result.repeated else ()
        return Response(200, b'{"predictions":[' + b",".join(encoded) + b"]}" if many else encoded[0], headers=headers)

    async def _feedback(self, scope: Scope, receive: Receive) -> Response:
        received_s = time.perf_counter()
        service = self._service
        body = await _read(scope, receive, service.max_body_bytes)
        items, _ = wire.parse_feedback(body, service.limits, service.now_us())
        scope["grant"].bucket.charge(len(items) - 1)
        deadline_s = service.patience.deadline_s(scope["headers"], received_s)
        command = FeedbackCommand(items)
        result = await service.batcher.submit(command, weight=len(items), arrived_s=received_s, deadline_s=deadline_s)
        assert isinstance(result, FeedbackResult)
        return _json({"accepted": result.accepted, "repeated": result.repeated})

    async def _threshold(self, scope: Scope, receive: Receive) -> Response:
        received_s = time.perf_counter()
        service = self._service
        change = wire.parse_threshold(await _read(scope, receive, service.max_body_bytes))
        deadline_s = service.patience.deadline_s(scope["headers"], received_s)
        command = ThresholdCommand(change.threshold, change.model_version)
        live = await service.batcher.submit(command, arrived_s=received_s, deadline_s=deadline_s)
        assert isinstance(live, LiveModel)
        return _json(_describe(live, self._service.refused()))

    async def _model(self, scope: Scope, receive: Receive) -> Response:
        return _json(_describe(self._service.live(), self._service.refused()))

    async def _healthz(self, scope: Scope, receive: Receive) -> Response:
        return _json({"status": "alive"})

    async def _readyz(self, scope: Scope, receive: Receive) -> Response:
        if not self._service.healthy():
            # a balancer that hears 503 sends no traffic, and only a batch makes the worker write again
            with suppress(OverloadedError):
                await self._service.batcher.submit(FeedbackCommand([]), weight=0)
            raise ServingError(
                "Feature state waits to be written to its store.",
                fix="see the service's log; free space or restart the store",
            )
        return _json({"status": "ready", "model_version": self._service.live().version})

    async def _metrics(self, scope: Scope, receive: Receive) -> Response:
        monitor = self._service.monitor
        return Response(200, monitor.render(), monitor.content_type.encode())

    async def _openapi(self, scope: Scope, receive: Receive) -> Response:
        return _json(openapi.document())

    async def _docs(self, scope: Scope, receive: Receive) -> Response:
        return Response(200, openapi.page().encode("utf-8"), b"text/html; charset=utf-8")

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        while True:
            message = await receive()
            if message["type"] == "lifespan.shutdown":
                self._service.shutdown()
                await send({"type": "lifespan.shutdown.complete"})
                return
            await send({"type": "lifespan.startup.complete"})


def _needed_scope(path: str, method: str) -> KeyScope:
    if path in ADMIN_ROUTES:
        return "admin"
    return "read" if method in ("GET", "HEAD") else "write"


async def _read(scope: Scope, receive: Receive, limit: int) -> bytes:
    """The body; how long it may take is the server's business, see slow_clients.py."""
    declared = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
    if declared.isdigit() and int(declared) > limit:
        raise _too_large(int(declared), limit)
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise RequestError("The client closed the connection.", status=400, kind="disconnected")
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > limit:
            raise _too_large(size, limit)
        if not message.get("more_body", False):
            return parts[0] if len(parts) == 1 else b"".join(parts)


def _too_large(size: int, limit: int) -> RequestError:
    return RequestError(
        f"The body has at least {size} bytes; at most {limit} are taken.",
        status=413,
        kind="body-too-large",
        fix="send fewer records a request, or raise serving.max_body_bytes",
    )


def _describe(live: LiveModel, refused: str) -> dict[str, Any]:
    return {
        "model_name": live.name,
        "model_version": live.version,
        "run_id": live.run_id,
        "feature_service": live.feature_service,
        "feature_digest": live.feature_digest,
        "threshold": live.threshold,
        "since": _iso(live.since_us),
        "refused": refused,
    }


def _iso(time_us: int) -> str:
    seconds, micros = divmod(time_us, 1_000_000)
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(seconds))}.{micros:06d}Z"


def _json(value: dict[str, Any]) -> Response:
    return Response(200, json.dumps(value, allow_nan=False).encode("utf-8"))


def _problem(error: Exception) -> Response:
    status, body = problem.to_problem(error)
    return Response(status, problem.encode(body), problem.CONTENT_TYPE, tuple(problem.headers_for(status, error)))


async def _send(send: Send, response: Response) -> None:
    length = str(len(response.body)).encode()
    headers = [(b"content-type", response.content_type), (b"content-length", length), *response.headers]
    await send({"type": "http.response.start", "status": response.status, "headers": headers})
    await send({"type": "http.response.body", "body": response.body})
