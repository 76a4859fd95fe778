"""Calls over gRPC and over HTTP give the same answers and the same errors; a broken way is left for the other one."""

from __future__ import annotations

import asyncio
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest

import deepseek_ray.rpc as rpc
from deepseek_ray.client import Client
from deepseek_ray.errors import (
    DeadlineError,
    EnvironmentProblemError,
    OverloadedError,
    RequestError,
    ServingError,
    UnreachableError,
)
from deepseek_ray.serving.rpc_server import RpcServer
from tests.unit.rpc_parts import Served, served
from tests.unit.serving_parts import KEY, NOW, Rig, body, event, rig

PROTO = Path(rpc.__file__).with_name("rpc.proto")


@pytest.fixture
def made(tmp_path: Path) -> Iterator[Rig]:
    with rig(tmp_path) as made:
        yield made


@pytest.fixture
def service(made: Rig) -> Iterator[Served]:
    with served(made.app) as running:
        yield running


def client(address: str, **options: Any) -> Client:
    return Client(address, **({"api_key": KEY, "timeout_s": 5.0} | options))


def test_the_file_for_other_languages_says_the_same_as_the_messages_here() -> None:
    text = re.sub(r"//.*", "", PROTO.read_text())
    found = {}
    for name, fields in re.findall(r"message (\w+) {(.*?)}", text, re.DOTALL):
        rows = sorted(re.findall(r"(\w+) (\w+) = (\d+);", fields), key=lambda row: int(row[2]))
        assert [int(number) for _, _, number in rows] == list(range(1, len(rows) + 1))
        found[name] = {field: kind for kind, field, _ in rows}
    assert found == rpc.MESSAGES
    assert f"package {rpc.PACKAGE};" in text
    assert "service Rpc" in text
    assert "rpc Call(CallRequest) returns (CallReply);" in text


def test_a_message_has_the_bytes_that_protobuf_prescribes() -> None:
    assert rpc.CallRequest(method="a", payload=b"{}").SerializeToString() == b"\x0a\x01a\x12\x02{}"
    assert rpc.CallReply(payload=b"x").SerializeToString() == b"\x0a\x01x"


@pytest.mark.parametrize(
    ("name", "path"), [("risk.score", "/v1/risk/score"), ("models/a.b/predict", "/v1/models/a.b/predict")]
)
def test_a_call_is_named_after_its_path(name: str, path: str) -> None:
    assert rpc.path_of(name) == path
    with pytest.raises(RequestError, match="names no call"):
        rpc.path_of("risk..score")


def test_both_ways_give_the_same_answer(service: Served) -> None:
    with client(service.http_address) as both, client(service.rpc_address) as alone:
        assert (both.transport, alone.transport) == ("grpc", "grpc")
        first = both.call("risk.score", body(event(1)))
        assert alone.call("risk.score", body(event(1))) == first
        assert both.call("risk.model")["model_version"] == "1"
        many = both.call("risk.score", {"transactions": [body(event(n, card=f"k{n}")) for n in (3, 2)]})
        assert [item["transaction_id"] for item in many["predictions"]] == ["t3", "t2"]
    with served(service.app, rpc=False) as plain, client(plain.http_address) as http:
        assert http.transport == "http"
        assert http.call("risk.score", body(event(1))) == first
        assert http.call("risk.model")["model_version"] == "1"


@pytest.mark.parametrize("way", ["rpc_address", "http"])
def test_each_refusal_is_the_same_error_on_both_ways(made: Rig, way: str) -> None:
    with served(made.app, rpc=way != "http") as service, client(service.http_address) as caller:
        assert caller.transport == ("http" if way == "http" else "grpc")
        with pytest.raises(RequestError, match="amount_cents") as wrong:
            caller.call("risk.score", body(event(1), amount_cents=-1))
        assert (wrong.value.status, wrong.value.field) == (422, "amount_cents")
        assert wrong.value.fix
        assert wrong.value.kind.endswith("invalid-field")
        with pytest.raises(RequestError) as unknown:
            caller.call("risk.nothing", {})
        assert unknown.value.status == 404
        with pytest.raises(RequestError) as big:
            caller.call("risk.score", {"transactions": ["x" * 30_000]})
        assert big.value.status == 413
        made.predictor.live.scorer.fail = True  # type: ignore[attr-defined]
        with pytest.raises(ServingError, match="500"):
            caller.call("risk.score", body(event(2)))


def test_many_wrong_fields_fit_in_what_grpc_carries(service: Served) -> None:
    with client(service.http_address) as caller, pytest.raises(RequestError) as wrong:
        caller.call("risk.score", {"transactions": [{"é" * 70: "ü" * 70} for _ in range(10)]})
    assert wrong.value.status == 422
    assert wrong.value.fix


def test_a_wrong_key_is_refused(service: Served) -> None:
    for address in (service.http_address, service.rpc_address):
        with client(address, api_key="another key of some length") as caller, pytest.raises(RequestError) as refused:
            caller.call("risk.model")
        assert refused.value.status == 401


def test_other_languages_see_grpcs_own_status_codes(service: Served) -> None:
    with grpc.insecure_channel(service.rpc_address) as channel:
        call = channel.unary_unary(
            rpc.CALL,
            request_serializer=rpc.CallRequest.SerializeToString,
            response_deserializer=rpc.CallReply.FromString,
        )
        with pytest.raises(grpc.RpcError) as refused:
            call(rpc.CallRequest(method="risk.model"), timeout=5)
        assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
        with pytest.raises(grpc.RpcError) as wrong:
            call(rpc.CallRequest(method="risk.score", payload=b"{"), timeout=5, metadata=(("x-api-key", KEY),))
        assert wrong.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "JSON" in wrong.value.details()


def test_a_message_that_is_too_large_to_read_is_refused_by_grpc_and_harms_no_other_call(service: Served) -> None:
    with grpc.insecure_channel(service.rpc_address) as channel:
        call = channel.unary_unary(
            rpc.CALL,
            request_serializer=rpc.CallRequest.SerializeToString,
            response_deserializer=rpc.CallReply.FromString,
        )

        def refused(size: int) -> tuple[grpc.StatusCode, dict[str, Any]]:
            request = rpc.CallRequest(method="risk.score", payload=b"x" * size)
            with pytest.raises(grpc.RpcError) as error:
                call(request, timeout=5, metadata=(("x-api-key", KEY),))
            return error.value.code(), dict(error.value.trailing_metadata() or ())

        code, said = refused(20_001)  # the route says it
        assert (code, said[rpc.STATUS_KEY]) == (grpc.StatusCode.INVALID_ARGUMENT, "413")
        code, said = refused(20_000 + (64 << 10))
        assert (code, rpc.STATUS_KEY in said) == (grpc.StatusCode.RESOURCE_EXHAUSTED, False)
        answer = call(rpc.CallRequest(method="risk.model"), timeout=5, metadata=(("x-api-key", KEY),))
        assert b"model_version" in answer.payload


def test_a_deadline_ends_the_call_and_what_waits_is_not_done(made: Rig, service: Served) -> None:
    gate = threading.Event()
    model = made.predictor.live.scorer
    score = model.predict_proba
    model.predict_proba = lambda *rows: (gate.wait(5), score(*rows))[1]  # type: ignore[method-assign]
    with client(service.http_address) as caller:
        blocker = threading.Thread(target=caller.call, args=("risk.score", body(event(1))))
        blocker.start()
        while not made.log.by_transaction or made.batcher.queued:
            time.sleep(0.001)
        time.sleep(0.05)
        start = time.monotonic()
        with pytest.raises(DeadlineError, match=r"0\.\d+ s"):
            caller.call("risk.score", body(event(2, card="c2")), timeout_s=0.1)
        assert time.monotonic() - start < 1.0
        time.sleep(0.1)  # the server hears of the cancellation
        gate.set()
        blocker.join(10)
        assert caller.call("risk.score", body(event(3, card="c3")))
    assert made.log.by_transaction(["t1", "t2", "t3"]).keys() == {"t1", "t3"}


@pytest.mark.parametrize("way", ["grpc", "http"])
def test_the_routes_hear_of_the_deadline(made: Rig, way: str) -> None:
    seen: list[float] = []
    answer = made.app.answer

    async def listening(scope: Any, receive: Any) -> Any:
        seen.extend(float(value) for name, value in scope["headers"] if name == b"x-request-timeout-ms")
        return await answer(scope, receive)

    made.app.answer = listening  # type: ignore[method-assign]
    with served(made.app, rpc=way == "grpc") as service, client(service.http_address) as caller:
        seen.clear()
        caller.call("risk.model", timeout_s=3)
    assert len(seen) == 1
    assert 1_000 < seen[0] <= 3_100  # gRPC rounds up


def test_a_full_queue_is_tried_again_only_within_the_deadline(tmp_path: Path) -> None:
    with rig(tmp_path, max_queued=1) as made, served(made.app) as service, client(service.http_address) as caller:
        made.batcher.queue.queued = 5  # as if others waited
        with pytest.raises(OverloadedError) as full:
            caller.call("risk.score", body(event(1)), timeout_s=0.5)
        assert full.value.retry_after_s == 1.0
        threading.Timer(0.3, lambda: setattr(made.batcher.queue, "queued", 0)).start()
        assert caller.call("risk.score", body(event(1)), timeout_s=5)["transaction_id"] == "t1"


def await_transport(caller: Client, name: str) -> None:
    """The channel's state is told by a thread of its own, a moment later."""
    end = time.monotonic() + 10
    while caller.transport != name:
        assert time.monotonic() < end
        time.sleep(0.05)


def test_when_grpc_goes_away_calls_go_over_http_and_come_back(made: Rig, service: Served) -> None:
    loop_of = service.server.servers[0].get_loop()

    def on_server(work: Any) -> None:
        asyncio.run_coroutine_threadsafe(work, loop_of).result(10)

    with client(service.http_address) as caller:
        first = caller.call("risk.score", body(event(1)))
        port = service.rpc.port
        on_server(service.rpc.stop())
        assert caller.call("risk.score", body(event(1))) == first
        await_transport(caller, "http")
        again = RpcServer(made.app, "127.0.0.1", port, max_body_bytes=20_000)
        on_server(again.start())
        await_transport(caller, "grpc")
        assert caller.call("risk.score", body(event(1))) == first
        on_server(again.stop())


def test_what_is_not_idempotent_is_sent_once(service: Served) -> None:
    with client(service.http_address, retries=5) as caller:
        sent: list[str] = []

        class Broken:
            ready = True

            def send(self, method: str, payload: bytes, timeout_s: float) -> bytes:
                sent.append(method)
                raise UnreachableError("broke")

            def close(self) -> None: ...

        kept, caller._rpc = caller._rpc, Broken()  # type: ignore[assignment]
        with pytest.raises(UnreachableError, match="broke"):
            caller.call("risk.threshold", {"threshold": 0.3})
        assert sent == ["risk.threshold"]
        label = {"prediction_id": "none", "is_fraud": True, "observed_at": NOW.isoformat()}
        with pytest.raises(RequestError, match="404"):  # the broken way, then HTTP
            caller.call("risk.feedback", label)
        assert sent == ["risk.threshold", "risk.feedback"]
        caller._rpc = kept


def test_a_service_that_is_away_is_named(made: Rig) -> None:
    with served(made.app) as service:
        address = service.http_address
    with pytest.raises(UnreachableError, match=address):
        client(address, connect_timeout_s=0.5).call("risk.model")


def test_a_client_without_a_key_is_refused() -> None:
    with pytest.raises(EnvironmentProblemError, match="DEEPSEEK_RAY_API_KEY"):
        Client("127.0.0.1:1")


def test_connections_are_kept(service: Served) -> None:
    with client(service.http_address) as caller:
        caller.call("risk.model")
        before = len(psutil.Process().net_connections("tcp"))
        for _ in range(50):
            caller.call("risk.model")
        assert len(psutil.Process().net_connections("tcp")) <= before


def test_a_name_that_is_a_routes_path_reaches_no_route(made: Rig) -> None:
    path = next(iter(made.app.routes))
    assert RpcServer(made.app, "127.0.0.1", 0, max_body_bytes=1)._path(path) not in made.app.routes
