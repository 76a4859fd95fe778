"""The client against a small server: what it sends, what it returns, which error each failure becomes."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import orjson
import pytest
from aiohttp import web

from deepseek_ray.client import RiskClient
from deepseek_ray.data.events import Feedback
from deepseek_ray.errors import (
    ClosedError,
    EnvironmentProblemError,
    OverloadedError,
    RequestError,
    ServingError,
    WrongAddressError,
)
from tests.unit.risk_server import KEY, RiskServer
from tests.unit.serving_parts import NOW, event


def talk(server: RiskServer, story: Callable[[RiskClient], Awaitable[Any]], **options: Any) -> Any:
    """Run a story with a client of the server."""

    async def run() -> Any:
        async with server.running() as url, RiskClient(url, **({"api_key": KEY} | options)) as client:
            return await story(client)

    return asyncio.run(run())


def test_predictions_come_back_in_the_order_of_the_transactions() -> None:
    server = RiskServer()
    events = [event(number, amount=100 * number) for number in (3, 1, 2)]
    predictions = talk(server, lambda client: client.score(events))
    assert [item.transaction_id for item in predictions] == ["t3", "t1", "t2"]
    assert server.scored == events
    assert server.keys == {KEY}


def test_the_service_is_told_how_long_the_answer_is_waited_for() -> None:
    server = RiskServer()
    talk(server, lambda client: client.score([event(1)]), timeout_s=2.5)
    assert server.timeouts_ms == [2_500.0]


def test_after_its_block_a_client_is_closed() -> None:
    async def story() -> None:
        async with RiskServer().running() as url:
            async with RiskClient(url, api_key=KEY) as client:
                assert await client.model()
            with pytest.raises(ClosedError, match=url):
                await client.model()

    asyncio.run(story())


def test_an_answer_of_another_program_is_told_from_a_services() -> None:
    server = RiskServer(refuse=lambda request: web.Response(body=b"<html>hello</html>"))
    with pytest.raises(WrongAddressError, match="no JSON object"):
        talk(server, lambda client: client.score([event()]))


def test_the_key_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEEPSEEK_RAY_API_KEY", KEY)
    server = RiskServer()
    talk(server, lambda client: client.score([event(1)]), api_key=None)
    assert server.keys == {KEY}


def test_without_a_key_nothing_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DEEPSEEK_RAY_API_KEY", raising=False)
    with pytest.raises(EnvironmentProblemError, match="DEEPSEEK_RAY_API_KEY"):
        RiskClient("http://127.0.0.1:1")


def test_labels_threshold_and_model() -> None:
    server = RiskServer()

    async def story(client: RiskClient) -> None:
        label = Feedback(prediction_id="p-t1", is_fraud=True, observed_at=NOW)
        assert await client.feedback([label]) == 1
        assert await client.feedback([label]) == 0
        assert (await client.set_threshold(0.25))["threshold"] == 0.25
        assert (await client.set_threshold(0.3, "1"))["threshold"] == 0.3
        with pytest.raises(RequestError, match="Another version serves"):
            await client.set_threshold(0.9, "2")
        assert await client.model() == {"model_version": "1", "threshold": 0.3}

    talk(server, story)
    assert server.labels == {"p-t1": True}


@pytest.mark.parametrize(
    ("status", "body", "error", "message"),
    [
        (422, {"detail": "bad amount", "type": "invalid", "fix": "send cents"}, RequestError, "bad amount.*send cents"),
        (401, {"detail": "no key", "type": "unauthorized"}, RequestError, "answered 401: no key"),
        (429, {"detail": "full"}, OverloadedError, "full.*send more slowly"),
        (503, {"detail": "not ready"}, OverloadedError, "answered 503"),
        (500, {"detail": "broken"}, ServingError, "broken.*service's log"),
        (502, "<html>no JSON</html>", ServingError, "no JSON"),
    ],
)
def test_each_refusal_becomes_its_error(status: int, body: Any, error: type[Exception], message: str) -> None:
    server = RiskServer(refuse=lambda request: web.Response(status=status, body=as_bytes(body)))
    with pytest.raises(error, match=message) as caught:
        talk(server, lambda client: client.score([event()]))
    if isinstance(caught.value, RequestError):
        assert (caught.value.status, caught.value.kind) == (status, body["type"])


def test_a_server_that_is_away_is_named() -> None:
    async def story() -> None:
        async with RiskServer().running() as url:
            gone = url
        async with RiskClient(gone, api_key=KEY) as client:
            with pytest.raises(ServingError, match=f"{gone}/v1/risk/model did not answer"):
                await client.model()

    asyncio.run(story())


def test_a_server_that_says_nothing_is_given_up() -> None:
    server = RiskServer(delay_s=0.5)
    with pytest.raises(ServingError, match="did not answer"):
        talk(server, lambda client: client.score([event()]), timeout_s=0.05)


def as_bytes(body: Any) -> bytes:
    """JSON of a mapping; text as it is."""
    return body.encode() if isinstance(body, str) else orjson.dumps(body)
