"""A small stand-in of the risk service on a free port of 127.0.0.1, in the process of the test."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import orjson
from aiohttp import web

from deepseek_ray.data.events import Prediction, Transaction

KEY = "a-key-for-the-stand-in"
Refusal = Callable[[dict[str, Any]], web.Response | None]


class RiskServer:
    """Remembers what it is sent.

    Args:
        refuse: given the body of a posted request, an answer that replaces the usual one, or None.
        delay_s: time before a score is answered.
    """

    def __init__(self, *, refuse: Refusal = lambda body: None, delay_s: float = 0.0) -> None:
        self._refuse, self._delay_s = refuse, delay_s
        self.scored: list[Transaction] = []
        self.labels: dict[str, bool] = {}
        self.feedback_sizes: list[int] = []
        self.keys: set[str] = set()
        self.timeouts_ms: list[float] = []
        self.threshold, self.model_version = 0.5, "1"
        self.busy: dict[str, int] = {}
        """Open requests of a card; ``overtaken`` says whether there ever were two."""
        self.overtaken = False
        self.most_at_once = 0

    @asynccontextmanager
    async def running(self) -> AsyncIterator[str]:
        """Serve while the block runs; gives the address."""
        app = web.Application()
        app.router.add_post("/v1/risk/score", self._score)
        app.router.add_post("/v1/risk/feedback", self._feedback)
        app.router.add_post("/v1/risk/threshold", self._set_threshold)
        app.router.add_get("/v1/risk/model", self._model)
        runner = web.AppRunner(app, shutdown_timeout=0)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        try:
            yield f"http://127.0.0.1:{runner.addresses[0][1]}"
        finally:
            await runner.cleanup()

    async def _score(self, request: web.Request) -> web.Response:
        self.keys.add(request.headers["X-API-Key"])
        self.timeouts_ms += [float(value) for value in request.headers.getall("X-Request-Timeout-Ms", [])]
        body = orjson.loads(await request.read())
        events = [Transaction.model_validate_json(orjson.dumps(item)) for item in body["transactions"]]
        await self._work([item.card_id for item in events])
        if (refusal := self._refuse(body)) is not None:
            return refusal
        self.scored += events
        answers = [prediction(item, self.threshold).model_dump(mode="json") for item in events]
        return web.Response(body=orjson.dumps({"predictions": answers}))

    async def _work(self, cards: list[str]) -> None:
        for card in cards:
            self.busy[card] = self.busy.get(card, 0) + 1
            self.overtaken |= self.busy[card] > 1
        self.most_at_once = max(self.most_at_once, sum(self.busy.values()))
        await asyncio.sleep(self._delay_s)
        for card in cards:
            self.busy[card] -= 1

    async def _feedback(self, request: web.Request) -> web.Response:
        body = orjson.loads(await request.read())
        if (refusal := self._refuse(body)) is not None:
            return refusal
        self.feedback_sizes.append(len(body["feedback"]))
        fresh = {item["prediction_id"]: item["is_fraud"] for item in body["feedback"]}
        accepted = len(fresh.keys() - self.labels.keys())
        self.labels |= fresh
        return web.Response(body=orjson.dumps({"accepted": accepted, "repeated": len(fresh) - accepted}))

    async def _set_threshold(self, request: web.Request) -> web.Response:
        body = orjson.loads(await request.read())
        if (refusal := self._refuse(body)) is not None:
            return refusal
        if body["model_version"] not in ("", self.model_version):
            return web.json_response({"detail": "Another version serves.", "type": "other-version"}, status=409)
        self.threshold = body["threshold"]
        return await self._model(request)

    async def _model(self, request: web.Request) -> web.Response:
        return web.Response(body=orjson.dumps({"model_version": self.model_version, "threshold": self.threshold}))


def prediction(transaction: Transaction, threshold: float) -> Prediction:
    """A decision whose id tells the transaction: ``p-t1`` for ``t1``."""
    return Prediction(
        prediction_id=f"p-{transaction.transaction_id}",
        transaction_id=transaction.transaction_id,
        probability=0.1,
        decision="approve",
        threshold=threshold,
        model_name="risk",
        model_version="1",
        feature_service="risk_v1",
        latency_ms=1.0,
    )
