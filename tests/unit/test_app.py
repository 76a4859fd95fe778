"""The HTTP face: every bad input gets a problem body that names field, value and fix."""

from __future__ import annotations

import asyncio
import gzip
import json
from collections.abc import Callable, Coroutine
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest

from deepseek_ray.errors import EnvironmentProblemError
from deepseek_ray.serving import duplicate_keys
from tests.unit.serving_parts import NOW, Rig, body, event, rig


def tell(path: Path, story: Callable[[httpx.AsyncClient], Coroutine[Any, Any, Any]], **options: int) -> Any:
    with rig(path, **options) as made:
        return asyncio.run(_with_client(made, story))


async def _with_client(made: Rig, story: Callable[[httpx.AsyncClient], Coroutine[Any, Any, Any]]) -> Any:
    async with made.client() as client:
        return await story(client)


def post(path: Path, content: Any, route: str = "/v1/risk/score") -> httpx.Response:
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    return tell(path, lambda client: client.post(route, content=data))


def test_one_transaction_gives_one_prediction(tmp_path: Path) -> None:
    answer = post(tmp_path, body(event(1, amount=9_000)))
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/json"
    assert answer.json()["decision"] == "review"


def test_many_transactions_give_as_many_in_order(tmp_path: Path) -> None:
    answer = post(tmp_path, {"transactions": [body(event(n, card=f"c{n}")) for n in (3, 1, 2)]})
    assert [item["transaction_id"] for item in answer.json()["predictions"]] == ["t3", "t1", "t2"]


@pytest.mark.parametrize(
    ("content", "status", "kind"),
    [
        (b"", 400, "malformed-json"),
        (b"{", 400, "malformed-json"),
        (b"\xff\xfe{}", 400, "malformed-json"),
        (b"[" * 100_00, 400, "malformed-json"),
        (b"[]", 422, "invalid-field"),
        (b"null", 422, "invalid-field"),
        (b'{"transactions": []}', 422, "invalid-field"),
        (b'{"transactions": {}}', 422, "invalid-field"),
        (b'{"transactions": [1], "more": 2}', 422, "invalid-field"),
        (b"x" * 30_000, 413, "body-too-large"),
    ],
)
def test_bodies_that_are_no_request(tmp_path: Path, content: bytes, status: int, kind: str) -> None:
    answer = post(tmp_path, content)
    assert answer.status_code == status
    assert answer.headers["content-type"] == "application/problem+json"
    problem = answer.json()
    assert problem["type"].endswith(kind)
    assert problem["status"] == status
    assert problem["fix"]


@pytest.mark.parametrize(
    ("changes", "field", "value"),
    [
        ({"amount_cents": "10"}, "amount_cents", "10"),
        ({"amount_cents": 10.5}, "amount_cents", 10.5),
        ({"amount_cents": True}, "amount_cents", True),
        ({"amount_cents": None}, "amount_cents", None),
        ({"amount_cents": -1}, "amount_cents", -1),
        ({"amount_cents": 10**30}, "amount_cents", str(10**30)),
        ({"amount_cents": float("nan")}, "amount_cents", "nan"),
        ({"amount_cents": float("inf")}, "amount_cents", "inf"),
        ({"amount_cents": float("-inf")}, "amount_cents", "-inf"),
        ({"card_id": 5}, "card_id", 5),
        ({"card_id": "with space"}, "card_id", "with space"),
        ({"card_id": "x" * 65}, "card_id", "x" * 65),
        ({"channel": "pigeon"}, "channel", "pigeon"),
        ({"event_time": 1_772_000_000}, "event_time", 1_772_000_000),
        ({"event_time": "1772000000"}, "event_time", "1772000000"),
        ({"event_time": "2026-03-01T12:00:00"}, "event_time", "2026-03-01T12:00:00"),
        ({"event_time": "2026-02-30T12:00:00Z"}, "event_time", "2026-02-30T12:00:00Z"),
        ({"event_time": "1969-12-31T23:59:59Z"}, "event_time", "1969-12-31T23:59:59+00:00"),
        ({"event_time": "2026-03-01T13:00:00Z"}, "event_time", "2026-03-01T13:00:00+00:00"),
        ({"is_fraud": False}, "is_fraud", False),
    ],
)
def test_a_wrong_field_is_named_with_its_value(tmp_path: Path, changes: dict[str, Any], field: str, value: Any) -> None:
    answer = post(tmp_path, body(event(1), **changes))
    problem = answer.json()
    assert answer.status_code == 422, problem
    assert problem["field"] == field
    assert problem["errors"][0]["value"] == value
    assert problem["errors"][0]["fix"]


def test_a_missing_field_is_named(tmp_path: Path) -> None:
    content = body(event(1))
    del content["terminal_id"]
    problem = post(tmp_path, content).json()
    assert (problem["status"], problem["field"]) == (422, "terminal_id")


def test_in_a_list_the_place_is_named_and_nothing_is_scored(tmp_path: Path) -> None:
    async def story(client: httpx.AsyncClient) -> None:
        content = {"transactions": [body(event(1)), body(event(2), amount_cents=-5)]}
        bad = await client.post("/v1/risk/score", json=content)
        assert bad.json()["field"] == "transactions.1.amount_cents"
        good = await client.post("/v1/risk/score", json=body(event(1)))
        assert good.json()["cold"] == ["card"]
        assert "x-repeated" not in good.headers

    tell(tmp_path, story)


@pytest.mark.parametrize(
    ("content", "detail"),
    [
        (b"null", "The body: null, not an object."),
        (b"[]", "The body: an array, not an object."),
        (b"1", "The body: a number, not an object."),
        (b'{"transactions": [null]}', "Field 'transactions.0' = null: not an object."),
        (b'{"transactions": [{"amount_cents": true}]}', "not a whole number"),
        (b'{"transactions": [{"card_id": {}}]}', "not a string"),
        (b'{"transactions": [{"amount_cents": null}]}', "Field 'transactions.0.transaction_id': missing."),
        (b'{"is_fraud": 1}', "missing"),
    ],
)
def test_what_is_wrong_is_said_in_words_of_json(tmp_path: Path, content: bytes, detail: str) -> None:
    answer = post(tmp_path, content)
    told = [answer.json()["detail"], *(error["detail"] for error in answer.json()["errors"])]
    assert any(detail in text for text in told), told
    for word in ("None", "dict", "Value error", "Input should", "int ", "bool"):
        assert word not in answer.text


@pytest.mark.parametrize("route", ["/v1/risk/score", "/v1/risk/feedback", "/v1/risk/threshold"])
def test_a_name_that_stands_twice_is_refused(tmp_path: Path, route: str) -> None:
    one = {
        "/v1/risk/score": body(event(1)),
        "/v1/risk/feedback": {"prediction_id": "p", "is_fraud": True, "observed_at": NOW.isoformat()},
        "/v1/risk/threshold": {"threshold": 0.25},
    }[route]
    whole = json.dumps(one)
    name, value = next(iter(one.items()))
    twice = f"{{{json.dumps(name)} : {json.dumps(value)}, {whole[1:]}"
    problem = post(tmp_path, twice.encode(), route).json()
    assert (problem["status"], problem["type"].rpartition(":")[2]) == (400, "duplicate-key")
    assert (problem["field"], problem["fix"]) == (name, "send each field once")
    if route == "/v1/risk/score":
        for many in (f'{{"transactions": [{whole}, {twice}]}}', f'{{"transactions": [], "transactions": [{whole}]}}'):
            assert post(tmp_path, many.encode()).json()["type"].endswith("duplicate-key")


def test_names_that_differ_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duplicate_keys, "check_names", _not_again)
    full = body(event(1), device_id="d1", channel="online", country="DE", merchant_category="books")
    for content in (full, body(event(2)), {"transactions": [body(event(3)), full]}):
        assert post(tmp_path, content).status_code == 200


def _not_again(content: bytes) -> None:
    raise AssertionError("a body without a doubled name is not read twice")


def test_a_packed_body_is_told_to_unpack(tmp_path: Path) -> None:
    async def story(client: httpx.AsyncClient) -> None:
        packed = gzip.compress(json.dumps(body(event(1))).encode())
        refused = await client.post("/v1/risk/score", content=packed, headers={"Content-Encoding": "gzip"})
        problem = refused.json()
        assert (refused.status_code, problem["field"]) == (415, "Content-Encoding")
        assert "Content-Encoding = 'gzip'" in problem["detail"]
        assert "without this header" in problem["fix"]
        plain = await client.post("/v1/risk/score", content=b"{", headers={"Content-Encoding": "identity"})
        assert plain.status_code == 400

    tell(tmp_path, story)


def test_clients_do_not_hear_where_the_server_keeps_its_files_and_the_log_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def story(made: Rig) -> None:
        made.app.root = str(tmp_path)
        monkeypatch.setattr(made.log, "commit", _full(tmp_path / "predictions.db"))
        async with made.client() as client:
            for number in (1, 2):
                answer = await client.post("/v1/risk/score", json=body(event(number)))
                assert answer.status_code == 503
                assert "The prediction log 'predictions.db' cannot be used" in answer.json()["detail"]
                assert str(tmp_path) not in answer.text
        monkeypatch.undo()

    with rig(tmp_path) as made:
        asyncio.run(story(made))
    lines = [record for record in caplog.records if record.message.startswith("requests are refused: ")]
    assert len(lines) == 1
    assert str(tmp_path / "predictions.db") in lines[0].message


def test_why_a_version_was_refused_is_told_without_the_servers_folders(tmp_path: Path) -> None:
    async def story(made: Rig) -> dict[str, Any]:
        why = f"The file '{tmp_path}/serving/model.safetensors' is missing."
        service = made.service(refused=lambda: why, standing=lambda: {"arms": [{"withdrawn": why}], "fallback": why})
        made.app = made.make_app(service)
        made.app.root = str(tmp_path)
        async with made.client() as client:
            return (await client.get("/v1/risk/model")).json()

    with rig(tmp_path) as made:
        told = asyncio.run(story(made))
    assert {told["refused"], told["fallback"], told["arms"][0]["withdrawn"]} == {
        "The file 'serving/model.safetensors' is missing."
    }


def _full(path: Path) -> Callable[..., Any]:
    def commit(*rows: Any, **applied: int) -> None:
        raise EnvironmentProblemError(f"The prediction log {str(path)!r} cannot be used: disk full.", fix="free space")

    return commit


def test_too_many_transactions(tmp_path: Path) -> None:
    answer = post(tmp_path, {"transactions": [{}] * 11})
    assert answer.status_code == 413
    assert "11 records; at most 10" in answer.json()["detail"]


def test_stale_duplicate_and_unknown_are_told_apart(tmp_path: Path) -> None:
    async def story(client: httpx.AsyncClient) -> None:
        first = await client.post("/v1/risk/score", json=body(event(1)))
        again = await client.post("/v1/risk/score", json=body(event(1)))
        assert again.content == first.content
        assert again.headers["x-repeated"] == "1"
        other = await client.post("/v1/risk/score", json=body(event(1, amount=7)))
        assert (other.status_code, other.json()["type"].rpartition(":")[2]) == (409, "duplicate-transaction")
        stale = await client.post("/v1/risk/score", json=body(event(2, at_s=-60)))
        assert (stale.status_code, stale.json()["type"].rpartition(":")[2]) == (409, "stale-event")

    tell(tmp_path, story)


def test_feedback_once_twice_wrong(tmp_path: Path) -> None:
    async def story(client: httpx.AsyncClient) -> None:
        known = (await client.post("/v1/risk/score", json=body(event(1)))).json()["prediction_id"]
        label = {"prediction_id": known, "is_fraud": True, "observed_at": (NOW + timedelta(seconds=60)).isoformat()}
        route = "/v1/risk/feedback"
        assert (await client.post(route, json=label)).json() == {"accepted": 1, "repeated": 0}
        assert (await client.post(route, json={"feedback": [label]})).json() == {
            "accepted": 0,
            "repeated": 1,
        }
        assert (await client.post(route, json=label | {"is_fraud": False})).status_code == 409
        assert (await client.post(route, json=label | {"prediction_id": "nope"})).status_code == 404
        assert (await client.post(route, json=label | {"is_fraud": 1})).status_code == 422
        late = label | {"observed_at": (NOW + timedelta(days=2)).isoformat()}
        assert (await client.post(route, json=late)).json()["field"] == "observed_at"

    tell(tmp_path, story)


def test_the_threshold_can_be_moved(tmp_path: Path) -> None:
    async def story(client: httpx.AsyncClient) -> None:
        moved = await client.post("/v1/risk/threshold", json={"threshold": 0.05})
        assert moved.json()["threshold"] == 0.05
        assert (await client.post("/v1/risk/score", json=body(event(1)))).json()["decision"] == "review"
        other = await client.post("/v1/risk/threshold", json={"threshold": 0.1, "model_version": "9"})
        assert (other.status_code, other.json()["field"]) == (409, "model_version")
        for wrong in ({"threshold": 1.5}, {"threshold": "0.5"}, {}, {"threshold": float("nan")}):
            data = json.dumps(wrong).encode()
            assert (await client.post("/v1/risk/threshold", content=data)).status_code == 422

    tell(tmp_path, story)


def test_every_route_but_health_asks_for_the_key(tmp_path: Path) -> None:
    async def story(made: Rig) -> None:
        async with made.client(None) as client:
            for route in ("/healthz", "/readyz"):
                assert (await client.get(route)).status_code == 200
            for route in ("/v1/risk/model", "/metrics", "/docs", "/openapi.json", "/nowhere"):
                refused = await client.get(route)
                assert refused.status_code == 401
                assert "Bearer" in refused.headers["www-authenticate"]
            assert (await client.post("/v1/risk/score", json={})).status_code == 401
        async with made.client("not-the-right-key-at-all") as client:
            assert (await client.get("/v1/risk/model")).json()["type"].endswith("wrong-api-key")

    with rig(tmp_path) as made:
        asyncio.run(story(made))


def test_wrong_routes_and_methods(tmp_path: Path) -> None:
    async def story(client: httpx.AsyncClient) -> None:
        assert (await client.get("/v2/risk/score")).status_code == 404
        wrong = await client.get("/v1/risk/score")
        assert (wrong.status_code, wrong.json()["fix"], wrong.headers["allow"]) == (405, "use POST", "POST")
        assert (await client.head("/healthz")).status_code == 200  # load balancers ask like this
        assert (await client.post("/healthz")).headers["allow"] == "GET, HEAD"

    tell(tmp_path, story)


def test_model_metrics_and_docs_tell_what_they_should(tmp_path: Path) -> None:
    async def story(client: httpx.AsyncClient) -> None:
        await client.post("/v1/risk/score", json=body(event(1)))
        model = (await client.get("/v1/risk/model")).json()
        assert (model["model_version"], model["since"]) == ("1", "2026-03-01T12:00:00.000000Z")
        metrics = (await client.get("/metrics")).text
        assert 'deepseek_ray_http_requests_total{route="/v1/risk/score",status="200"} 1.0' in metrics
        assert 'deepseek_ray_predictions_total{decision="approve",version="1"} 1.0' in metrics
        described = (await client.get("/openapi.json")).json()
        assert set(described["paths"]) >= {"/v1/risk/score", "/v1/risk/feedback", "/readyz"}
        assert "Transaction" in described["components"]["schemas"]
        page = (await client.get("/docs")).text
        assert "/v1/risk/score" in page
        assert "src=" not in page
        assert "http://" not in page
        assert "https://" not in page

    tell(tmp_path, story)


def test_a_full_queue_says_when_to_come_back(tmp_path: Path) -> None:
    async def story(client: httpx.AsyncClient) -> list[httpx.Response]:
        requests = [client.post("/v1/risk/score", json=body(event(n, card=f"c{n}"))) for n in range(40)]
        return list(await asyncio.gather(*requests))

    answers = tell(tmp_path, story, max_queued=1)
    refused = [answer for answer in answers if answer.status_code == 429]
    assert refused
    assert {answer.status_code for answer in answers} == {200, 429}
    assert refused[0].headers["retry-after"] == "1"


def test_an_unforeseen_failure_gives_500_without_inner_detail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.unit.serving_parts.FakeScorer.fail", True)
    answer = post(tmp_path, body(event(1)))
    assert answer.status_code == 500
    assert "model failed" not in answer.text


def test_a_store_outage_shows_in_readiness(tmp_path: Path) -> None:
    async def story(made: Rig) -> None:
        async with made.client() as client:
            made.state.fail_flush = True
            assert (await client.post("/v1/risk/score", json=body(event(1)))).status_code == 200
            made.batcher.close()
            assert (await client.get("/readyz")).status_code == 503

    with rig(tmp_path) as made:
        asyncio.run(story(made))


def test_asking_for_readiness_tries_the_writing_again(tmp_path: Path) -> None:
    async def story(made: Rig) -> list[int]:
        async with made.client() as client:
            made.state.fail_flush = True
            await client.post("/v1/risk/score", json=body(event(1)))
            while made.predictor.healthy:
                await asyncio.sleep(0.001)
            made.state.fail_flush = False
            seen = []
            while not seen or seen[-1] != 200:  # no traffic but the probes
                seen.append((await client.get("/readyz")).status_code)
            return seen

    with rig(tmp_path) as made:
        assert set(asyncio.run(asyncio.wait_for(story(made), 10))) == {503, 200}


def test_the_server_stop_closes_the_service(tmp_path: Path) -> None:
    with rig(tmp_path) as made:
        messages = iter([{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}])
        sent: list[str] = []

        async def receive() -> Any:
            return next(messages)

        async def send(message: Any) -> None:
            sent.append(message["type"])

        asyncio.run(made.app({"type": "lifespan"}, receive, send))
        assert sent == ["lifespan.startup.complete", "lifespan.shutdown.complete"]
