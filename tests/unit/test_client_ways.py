"""The client where things are not as they should be: other programs behind the address, TLS, limits, its own end."""

from __future__ import annotations

import gc
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import grpc
import orjson
import pytest

from deepseek_ray import channels, rpc
from deepseek_ray.client import Client
from deepseek_ray.errors import (
    ClosedError,
    DeadlineError,
    OverloadedError,
    RequestError,
    ServingError,
    UnreachableError,
    WrongAddressError,
)
from tests.certificate import make_certificate
from tests.unit.rpc_parts import Served, served
from tests.unit.serving_parts import KEY, Rig, body, event, rig


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


@contextmanager
def another_program(status: int, answer: bytes, headers: dict[str, str] | None = None) -> Iterator[str]:
    """An HTTP server of somebody else; every GET gets the same answer."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            for name, value in ({"Content-Length": str(len(answer))} | (headers or {})).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def raw(talk: Callable[[socket.socket], None]) -> Iterator[str]:
    """A listener that speaks neither HTTP nor gRPC."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def run() -> None:
            while True:
                try:
                    line, _ = listener.accept()
                except OSError:
                    return
                with line, suppress(ConnectionError):  # whom it speaks to may have had enough
                    talk(line)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(5)


@pytest.mark.parametrize(
    ("status", "answer", "why"),
    [
        (200, b'{"status": "alive"}', "'rpc_port' = None"),
        (200, b'{"rpc_port": "1"}', "'rpc_port' = '1'"),
        (200, b'{"rpc_port": 70000}', "'rpc_port' = 70000"),
        (200, b'{"rpc_port": true}', "'rpc_port' = True"),
        (200, b"[1]", "no JSON object"),
        (200, b"<html>hello</html>", "no JSON object: '<html>hello"),
        (404, b"nothing here", "status 404 to /healthz"),
        (302, b"", "answered 302"),
    ],
)
def test_another_program_behind_the_address_is_told_from_a_service(status: int, answer: bytes, why: str) -> None:
    with another_program(status, answer, {"Location": "http://127.0.0.1:1/"}) as address:
        with pytest.raises(WrongAddressError, match=why) as wrong, client(address):
            pass
        assert address in str(wrong.value)
        assert "the address that the service printed" in wrong.value.fix


@pytest.mark.parametrize(("status", "error"), [(503, OverloadedError), (429, OverloadedError), (502, ServingError)])
def test_a_service_that_is_not_ready_is_not_taken_for_another(status: int, error: type[Exception]) -> None:
    with another_program(status, b"later", {"Retry-After": "7"}) as address:
        with pytest.raises(error, match="later") as refused, client(address):
            pass
        assert not isinstance(refused.value, UnreachableError)
        assert getattr(refused.value, "retry_after_s", 7.0) == 7.0


@pytest.mark.parametrize("words", [b"SSH-2.0-OpenSSH_9.2\r\n", b""])
def test_what_speaks_something_else_is_named(words: bytes) -> None:
    def talk(line: socket.socket) -> None:
        line.recv(4_096)
        line.sendall(words)

    with raw(talk) as address:
        with pytest.raises(UnreachableError, match=r"neither gRPC nor HTTP.*speaks no HTTP") as wrong:
            client(address, connect_timeout_s=1.0).connect()
        assert "the address that the service printed" in wrong.value.fix


def test_what_says_nothing_is_given_up_in_time() -> None:
    with raw(lambda line: time.sleep(1)) as address:
        start = time.monotonic()
        with pytest.raises(UnreachableError, match=r"neither gRPC nor HTTP .*within 0\.2 s"):
            client(address, connect_timeout_s=0.4).connect()
        assert time.monotonic() - start < 2


def test_a_grpc_server_of_somebody_else_is_told_from_ours() -> None:
    from concurrent.futures import ThreadPoolExecutor

    server = grpc.server(ThreadPoolExecutor(1))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        with client(f"127.0.0.1:{port}") as caller, pytest.raises(WrongAddressError, match="UNIMPLEMENTED"):
            caller.call("risk.model", idempotent=False)
    finally:
        server.stop(None).wait()


def test_both_ways_are_encrypted_and_trust_the_same_file(
    made: Rig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cert, key = make_certificate(tmp_path)
    with served(made.app, certificate=(str(cert), str(key))) as service:
        with client(service.http_address, ca_file=cert) as caller:
            assert caller.transport == "grpc"
            first = caller.call("risk.score", body(event(1)))
            rpc, caller._rpc = caller._rpc, None
            assert (caller.transport, caller.call("risk.score", body(event(1)))) == ("http", first)
            caller._rpc = rpc
        with client(f"https://{service.rpc_address}", ca_file=cert) as alone:
            assert alone.transport == "grpc"
            assert alone.call("risk.score", body(event(1))) == first
        monkeypatch.setenv("SSL_CERT_FILE", str(cert))
        with client(f"https://{service.http_address}") as caller:
            assert caller.transport == "grpc"


def test_who_is_not_trusted_gets_no_key(made: Rig, tmp_path: Path) -> None:
    cert, key = make_certificate(tmp_path)
    with served(made.app, certificate=(str(cert), str(key))) as service:
        with pytest.raises(WrongAddressError, match="certificate is not trusted") as wrong:
            client(f"https://{service.http_address}").connect()
        assert "ca_file" in wrong.value.fix
        with pytest.raises(UnreachableError, match="https:// where it has TLS"):
            client(service.http_address, connect_timeout_s=1.0).connect()


def test_an_encrypted_address_without_encryption_is_named(service: Served) -> None:
    with pytest.raises(UnreachableError, match=r"does not speak TLS.*write http://"):
        client(f"https://{service.http_address}", connect_timeout_s=1.0).connect()


@pytest.mark.parametrize("way", ["grpc", "http"])
def test_a_closed_client_says_so_and_does_not_connect_again(made: Rig, way: str) -> None:
    with served(made.app, rpc=way == "grpc") as service:
        caller = client(service.http_address)
        assert caller.call("risk.model")["model_version"]
        channel = caller._channel()
        caller.close()
        caller.close()
        for use in (lambda: caller.call("risk.model"), caller.connect, lambda: caller.transport):
            with pytest.raises(ClosedError, match=r"closed.*make a new one"):
                use()
        with pytest.raises(ClosedError, match="closed"):
            channel.send("risk.model", b"", 1.0)
    never = client("127.0.0.1:1")
    never.close()
    with pytest.raises(ClosedError):
        never.call("risk.model")


def test_a_client_that_nobody_closed_ends_its_thread(made: Rig) -> None:
    def threads() -> set[threading.Thread]:
        return {one for one in threading.enumerate() if one.name == "deepseek-ray-http"}

    before = threads()
    with served(made.app, rpc=False) as service:
        caller = client(service.http_address)
        assert caller.call("risk.model")
        assert len(threads() - before) == 1
        del caller
        gc.collect()
        assert threads() == before


@pytest.mark.parametrize("way", ["grpc", "http"])
def test_a_call_that_is_open_when_the_client_is_closed_ends_with_an_error(made: Rig, way: str) -> None:
    gate, failed = threading.Event(), []
    model = made.predictor.live.scorer
    score = model.predict_proba
    model.predict_proba = lambda *rows: (gate.wait(10), score(*rows))[1]  # type: ignore[method-assign]
    with served(made.app, rpc=way == "grpc") as service:
        caller = client(service.http_address, timeout_s=8.0)

        def ask() -> None:
            try:
                caller.call("risk.score", body(event(1)))
            except ClosedError as error:
                failed.append(error)

        caller.connect()
        asking = threading.Thread(target=ask)
        asking.start()
        time.sleep(0.3)
        caller.close()
        asking.join(5)
        gate.set()
        assert len(failed) == 1


def test_a_payload_over_grpcs_limit_names_the_setting(service: Served) -> None:
    with client(service.http_address) as caller:
        assert caller.transport == "grpc"
        with pytest.raises(RequestError, match=r"200\d{3} bytes.*serving\.max_body_bytes") as large:
            caller.call("risk.score", {"transactions": ["x" * 200_000]})
    assert (large.value.status, large.value.kind) == (413, "urn:deepseek-ray:problem:body-too-large")


def test_an_answer_over_grpcs_limit_names_the_limit(service: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channels, "MAX_MESSAGE_BYTES", 50)
    with client(service.http_address) as caller, pytest.raises(ServingError, match=r"larger than 50 bytes.*fewer"):
        caller.call("risk.score", body(event(1)))


def test_more_calls_than_the_server_takes_are_told_to_come_back(made: Rig) -> None:
    gate = threading.Event()
    model = made.predictor.live.scorer
    score = model.predict_proba
    model.predict_proba = lambda *rows: (gate.wait(10), score(*rows))[1]  # type: ignore[method-assign]
    alone = [("grpc.use_local_subchannel_pool", 1)]  # else both would share a connection, and wait for each other
    with (
        served(made.app, max_calls=1) as service,
        grpc.insecure_channel(service.rpc_address, options=alone) as other,
        client(service.rpc_address, retries=0) as caller,
    ):
        send = other.unary_unary(
            rpc.CALL,
            request_serializer=rpc.CallRequest.SerializeToString,
            response_deserializer=rpc.CallReply.FromString,
        )
        request = rpc.CallRequest(method="risk.score", payload=orjson.dumps(body(event(1))))
        blocker = send.future(request, timeout=10, metadata=(("x-api-key", KEY),))
        time.sleep(0.3)
        with pytest.raises(OverloadedError, match=r"no more calls at a time \(serving\.max_connections\)"):
            caller.call("risk.model")
        gate.set()
        assert blocker.result(5).payload


def test_a_deadline_over_http_is_that_of_the_whole_call() -> None:
    def drip(line: socket.socket) -> None:
        line.recv(4_096)
        line.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n")
        for _ in range(30):
            time.sleep(0.05)
            line.sendall(b" ")

    with raw(drip) as address:
        channel = channels.HttpChannel(channels.Address.parse(address, "address"), KEY)
        start = time.monotonic()
        with pytest.raises(DeadlineError, match=r"within 0\.2 s"):
            channel.send("risk.score", b"{}", 0.2)
        assert time.monotonic() - start < 1.0
        channel.close()
