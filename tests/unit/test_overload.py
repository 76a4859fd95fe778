"""Overload and abuse over HTTP: late work is not done, rates and scopes hold, and nothing private is logged."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest

from deepseek_ray.serving import batching
from deepseek_ray.serving.auth import Keyring
from deepseek_ray.serving.batching import Batcher
from deepseek_ray.serving.deadline import Patience
from deepseek_ray.serving.keys import add_key
from tests.unit.serving_parts import KEY, Rig, body, event, rig

SCORE = "/v1/risk/score"


class Held:
    """A rig whose worker waits at a gate before each batch."""

    def __init__(self, made: Rig) -> None:
        self.gate, self.started = threading.Event(), threading.Event()
        self._run = made.predictor.run
        self.batcher: Batcher[Any, Any] = Batcher(self.work, max_batch_size=4, max_queued=100)

    def work(self, commands: Sequence[Any]) -> Any:
        self.started.set()
        assert self.gate.wait(10)
        return self._run(commands)


def client_of(app: Any, key: str = KEY) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://test", headers={"X-API-Key": key})


@pytest.fixture
def made(tmp_path: Path) -> Iterator[Rig]:
    with rig(tmp_path, max_transactions=10) as one:
        yield one


@pytest.mark.parametrize("patience", [Patience(), Patience(timeout_s=0.03), Patience(objective_s=0.03, batch=4)])
def test_work_past_its_deadline_is_not_done(made: Rig, patience: Patience) -> None:
    held = Held(made)
    headers = {"X-Request-Timeout-Ms": "30"} if patience == Patience() else {}

    async def story() -> tuple[httpx.Response, httpx.Response, str]:
        async with client_of(made.make_app(made.service(batcher=held.batcher, patience=patience))) as client:
            generous = {"X-Request-Timeout-Ms": "60000"}
            first = asyncio.create_task(client.post(SCORE, json=body(event(1)), headers=generous))
            await asyncio.to_thread(held.started.wait, 10)
            second = asyncio.create_task(client.post(SCORE, json=body(event(2, card="c2")), headers=headers))
            await asyncio.sleep(0.06)
            held.gate.set()
            return await first, await second, (await client.get("/metrics")).text

    first, second, metrics = asyncio.run(story())
    held.batcher.close()
    assert first.status_code == 200
    assert (second.status_code, second.json()["type"].rpartition(":")[2]) == (503, "expired")
    assert second.headers["retry-after"] == "1"
    assert "X-Request-Timeout-Ms" in second.json()["fix"]
    assert made.log.by_transaction(["t1", "t2"]).keys() == {"t1"}
    assert made.state.counts == {"c1": 1}
    assert 'deepseek_ray_shed_requests_total{reason="expired"} 1.0' in metrics


def test_a_body_that_cannot_be_taken_is_not_parsed(made: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batching, "OVERLOAD_S", 60.0)
    held = Held(made)
    for _ in range(6):
        held.batcher.queue.control.observe(1, 2.0)

    async def story() -> list[tuple[int, str]]:
        async with client_of(made.make_app(made.service(batcher=held.batcher))) as client:
            first = asyncio.create_task(client.post(SCORE, json=body(event(1))))
            await asyncio.to_thread(held.started.wait, 10)
            soon = {"X-Request-Timeout-Ms": "100"}
            whole = json.dumps(body(event(2, card="c2"))).encode()
            sent = (b"{", whole, b"{", b'{"transactions":')
            told = [await client.post(SCORE, content=content, headers=soon) for content in sent]
            held.gate.set()
            await first
            return [(answer.status_code, answer.json()["type"].rpartition(":")[2]) for answer in told]

    malformed, late = (400, "malformed-json"), (503, "deadline")
    assert asyncio.run(story()) == [malformed, late, late, malformed], "looked at once somebody was refused"
    held.batcher.close()


def test_what_would_be_late_is_refused_at_once(made: Rig) -> None:
    held = Held(made)
    for _ in range(6):
        held.batcher.queue.control.observe(1, 2.0)  # a batch takes two seconds

    async def story() -> httpx.Response:
        async with client_of(made.make_app(made.service(batcher=held.batcher))) as client:
            first = asyncio.create_task(client.post(SCORE, json=body(event(1))))
            await asyncio.to_thread(held.started.wait, 10)
            second = await client.post(SCORE, json=body(event(2)), headers={"X-Request-Timeout-Ms": "500"})
            held.gate.set()
            assert (await first).status_code == 200
            return second

    refused = asyncio.run(story())
    held.batcher.close()
    assert (refused.status_code, refused.json()["type"].rpartition(":")[2]) == (503, "deadline")
    assert int(refused.headers["retry-after"]) >= 3


def test_labels_are_not_held_to_the_objective(made: Rig) -> None:
    held = Held(made)
    app = made.make_app(made.service(batcher=held.batcher, patience=Patience(60.0, 0.01, 4)))

    async def story() -> httpx.Response:
        async with client_of(app) as client:
            label = {"prediction_id": "unknown", "is_fraud": True, "observed_at": "2026-03-01T11:00:00Z"}
            answer = asyncio.create_task(client.post("/v1/risk/feedback", json=label))
            await asyncio.to_thread(held.started.wait, 10)
            await asyncio.sleep(0.03)
            held.gate.set()
            return await answer

    assert asyncio.run(story()).status_code == 404
    held.batcher.close()


def test_a_wrong_header_names_itself(made: Rig) -> None:
    async def story() -> httpx.Response:
        async with made.client() as client:
            return await client.post(SCORE, json=body(event(1)), headers={"X-Request-Timeout-Ms": "soon"})

    answer = asyncio.run(story())
    assert (answer.status_code, answer.json()["field"]) == (400, "X-Request-Timeout-Ms")
    assert "'soon'" in answer.json()["detail"]


def test_scopes_and_rates_of_keys_hold_over_http(made: Rig, tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    _, reader = add_key(file, "dashboard", "read")
    _, gateway = add_key(file, "gateway", "write", rate_per_s=0.5)
    app = type(made.app)(made.service(), Keyring(KEY, file, burst_s=4.0))

    async def story() -> None:
        async with client_of(app, reader) as client:
            assert (await client.get("/v1/risk/model")).status_code == 200
            refused = await client.post(SCORE, json=body(event(1)))
            assert (refused.status_code, "--scope write" in refused.json()["fix"]) == (403, True)
        async with client_of(app, gateway) as client:
            assert (await client.post("/v1/risk/threshold", json={"threshold": 0.1})).status_code == 403
            many = {"transactions": [body(event(n, card=f"c{n}")) for n in range(5)]}
            assert (await client.post(SCORE, json=many)).status_code == 200
            refused = await client.post(SCORE, json=body(event(9)))
            assert (refused.status_code, refused.json()["type"].rpartition(":")[2]) == (429, "rate-limited")
            assert int(refused.headers["retry-after"]) > 5  # five records, two of them granted so far
        async with client_of(app) as client:
            assert 'reason="rate-limited"} 1.0' in (await client.get("/metrics")).text

    asyncio.run(story())


def test_the_metrics_show_cap_prediction_and_age(made: Rig) -> None:
    async def story() -> str:
        async with made.client() as client:
            for number in range(8):
                await client.post(SCORE, json=body(event(number, card=f"c{number}")))
            return (await client.get("/metrics")).text

    lines = dict(line.rsplit(" ", 1) for line in asyncio.run(story()).splitlines() if line[0] != "#")
    assert float(lines["deepseek_ray_batch_cap"]) == 4
    assert 0 < float(lines["deepseek_ray_predicted_batch_seconds"]) < 5
    assert float(lines["deepseek_ray_queue_age_seconds"]) == 0


def test_nothing_private_is_logged(made: Rig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(self.format(record))

    listener = Listener(level=logging.DEBUG)
    for name in (None, "deepseek_ray"):
        logging.getLogger(name).addHandler(listener)
    private = {
        "id": "tx-77-private",
        "card": "card-4929-private",
        "device": "device-private",
        "key": "wrong-key-private",
    }

    def fail(self: Any, features: Any, sequence: Any) -> Any:
        raise KeyError(private["card"])  # a bug whose message quotes what it worked on

    async def story() -> list[int]:
        sent = body(event(1), transaction_id=private["id"], card_id=private["card"], device_id=private["device"])
        async with made.client() as client:
            answers = [
                await client.post(SCORE, json=sent),
                await client.post(SCORE, json=sent | {"amount_cents": 7}),
                await client.post(SCORE, json=sent | {"card_id": private["card"] + "!"}),
                await client.get("/" + private["card"]),
                await client.post(SCORE, json=sent, headers={"X-API-Key": private["key"]}),
                await client.post(SCORE, content=private["card"].encode()),
            ]
            monkeypatch.setattr("tests.unit.serving_parts.FakeScorer.predict_proba", fail)
            answers.append(await client.post(SCORE, json=sent | {"transaction_id": private["id"] + "2"}))
            made.state.fail_flush = True
            await client.post(SCORE, json=sent | {"transaction_id": private["id"] + "3"})
        return [answer.status_code for answer in answers]

    try:
        assert asyncio.run(story()) == [200, 409, 422, 404, 401, 400, 500]
    finally:
        for name in (None, "deepseek_ray"):
            logging.getLogger(name).removeHandler(listener)
    text = "\n".join(said)
    assert "KeyError at test_overload.py" in text  # the cause is there, what it quotes is not
    assert [word for word in (*private.values(), KEY) if word in text] == []
