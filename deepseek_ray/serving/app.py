"""The HTTP face of the risk service."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from deepseek_ray.errors import OverloadedError, ServingError
from deepseek_ray.serving import openapi, wire
from deepseek_ray.serving.asgi import AsgiApp, Receive, Response, Routes, Scope, json_response, read_body
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
from deepseek_ray.serving.monitor import Monitor

ADMIN_ROUTES = frozenset({"/v1/risk/threshold"})
"""Routes that change what the service does for everyone."""


@dataclass(frozen=True)
class Service:
    """What the routes need, and nothing of how it is made.

    Attributes:
        live: the version that serves now.
        refused: why the registry's champion is not the version that serves, or "".
        healthy: False when the service should get no traffic.
        shutdown: called once when the server stops.
        standing: the arms beside the champion, and how this replica came to its version.
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
    standing: Callable[[], dict[str, Any]] = dict


class RiskApp(AsgiApp):
    """ASGI application of the risk service."""

    def __init__(self, service: Service, keys: Keyring) -> None:
        self._service = service
        routes: Routes = {
            "/v1/risk/score": {"POST": self._score},
            "/v1/risk/feedback": {"POST": self._feedback},
            "/v1/risk/threshold": {"POST": self._threshold},
            "/v1/risk/model": {"GET": self._model},
            "/readyz": {"GET": self._readyz},
        }
        super().__init__(
            routes,
            keys,
            service.monitor,
            document=openapi.document,
            shutdown=service.shutdown,
            admin_routes=ADMIN_ROUTES,
        )

    async def _score(self, scope: Scope, receive: Receive) -> Response:
        received_s = time.perf_counter()
        service = self._service
        body = await read_body(scope, receive, service.max_body_bytes)
        if service.batcher.overloaded and not wire.may_hold_many(body):  # cheaper before the body is parsed than after
            service.batcher.check(service.patience.deadline_s(scope["headers"], received_s, 1))
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
        body = await read_body(scope, receive, service.max_body_bytes)
        items, _ = wire.parse_feedback(body, service.limits, service.now_us())
        scope["grant"].bucket.charge(len(items) - 1)
        deadline_s = service.patience.deadline_s(scope["headers"], received_s)
        command = FeedbackCommand(items)
        result = await service.batcher.submit(command, weight=len(items), arrived_s=received_s, deadline_s=deadline_s)
        assert isinstance(result, FeedbackResult)
        return json_response({"accepted": result.accepted, "repeated": result.repeated})

    async def _threshold(self, scope: Scope, receive: Receive) -> Response:
        received_s = time.perf_counter()
        service = self._service
        change = wire.parse_threshold(await read_body(scope, receive, service.max_body_bytes))
        deadline_s = service.patience.deadline_s(scope["headers"], received_s)
        command = ThresholdCommand(change.threshold, change.model_version)
        live = await service.batcher.submit(command, arrived_s=received_s, deadline_s=deadline_s)
        assert isinstance(live, LiveModel)
        return json_response(self.without_folders(_describe(live, self._service.refused())))

    async def _model(self, scope: Scope, receive: Receive) -> Response:
        service = self._service
        told = _describe(service.live(), service.refused()) | service.standing()
        return json_response(self.without_folders(told))

    async def _readyz(self, scope: Scope, receive: Receive) -> Response:
        if not self._service.healthy():
            # a balancer that hears 503 sends no traffic, and only a batch makes the worker write again
            with suppress(OverloadedError):
                await self._service.batcher.submit(FeedbackCommand([]), weight=0)
            raise ServingError(
                "Feature state waits to be written to its store.",
                fix="see the service's log; free space or restart the store",
            )
        return json_response({"status": "ready", "model_version": self._service.live().version})


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
