"""A small asynchronous client of the risk service: keeps connections, names every failure.

async with RiskClient("http://127.0.0.1:8000", api_key=key) as client:
    predictions = await client.score([transaction])
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

import aiohttp
import orjson

from deepseek_ray.data.events import Feedback, Prediction, Transaction
from deepseek_ray.errors import EnvironmentProblemError, OverloadedError, RequestError, ServingError

DEFAULT_TIMEOUT_S = 30.0


class RiskClient:
    """Scores transactions and sends labels over HTTP.

    Args:
        base_url: for example ``http://127.0.0.1:8000``.
        api_key: key of the service; by default the environment variable DEEPSEEK_RAY_API_KEY.
        timeout_s: time allowed for one request.
        connections: connections kept open.

    Raises:
        EnvironmentProblemError: there is no key.
    """

    def __init__(
        self, base_url: str, *, api_key: str | None = None, timeout_s: float = DEFAULT_TIMEOUT_S, connections: int = 8
    ) -> None:
        key = api_key or os.environ.get("DEEPSEEK_RAY_API_KEY", "")
        if not key:
            raise EnvironmentProblemError("No API key is given.", fix="set DEEPSEEK_RAY_API_KEY to the service's key")
        self._base_url = base_url.rstrip("/")
        self._headers = {"X-API-Key": key, "Content-Type": "application/json"}
        self._timeout = aiohttp.ClientTimeout(total=timeout_s)
        self._connections = connections
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        connector = aiohttp.TCPConnector(limit=self._connections)
        self._session = aiohttp.ClientSession(headers=self._headers, timeout=self._timeout, connector=connector)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._session is not None:
            await self._session.close()

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
        assert self._session is not None, "use 'async with RiskClient(...)'"
        try:
            async with self._session.request(method, self._base_url + path, data=body) as response:
                return _check(response.status, await response.read(), path)
        except (aiohttp.ClientError, TimeoutError) as error:
            raise ServingError(
                f"{self._base_url}{path} did not answer: {error!r}.", fix="see that the service runs"
            ) from error


def _check(status: int, body: bytes, path: str) -> dict[str, Any]:
    try:
        answer = orjson.loads(body)
    except orjson.JSONDecodeError:
        answer = {"detail": body[:200].decode(errors="replace")}
    if status < 400:
        return dict(answer)
    detail = f"{path} answered {status}: {answer.get('detail', answer)}"
    if status in (429, 503):
        raise OverloadedError(detail, fix="send more slowly")
    if status < 500:
        raise RequestError(detail, status=status, kind=str(answer.get("type", "")), fix=str(answer.get("fix", "")))
    raise ServingError(detail, fix="see the service's log")
