"""Connections that send too slowly are cut by the server's own protocol; the others do not notice it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from deepseek_ray.serving.slow_clients import ConnectionLimits, GuardedProtocol, guard
from serve_apps.ingress import free_port
from tests.unit.serving_parts import KEY, body, event, rig

LIMITS = ConnectionLimits(header_s=0.3, body_s=0.3, connections=3)
PATIENT = ConnectionLimits(header_s=30, body_s=30, connections=3)
Story = Callable[[int], Awaitable[None]]


@pytest.fixture(autouse=True)
def guarded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every server of a test keeps the limits; afterwards none does."""
    monkeypatch.setattr(GuardedProtocol, "limits", LIMITS)
    monkeypatch.setattr(GuardedProtocol, "refused", GuardedProtocol.refused)
    guard(LIMITS)


@contextlib.asynccontextmanager
async def serving(app: Any) -> AsyncIterator[int]:
    """A uvicorn server such as the replica has; gives its port."""
    port = free_port()
    quiet = {"lifespan": "off", "log_config": None, "access_log": False}
    options = uvicorn.Config(app, port=port, http=GuardedProtocol, timeout_keep_alive=2, **quiet)
    server = uvicorn.Server(options)
    server.install_signal_handlers = lambda: None  # type: ignore[attr-defined]
    task = asyncio.create_task(server._serve())
    while not server.started:
        await asyncio.sleep(0.005)
    try:
        yield port
    finally:
        server.should_exit = True
        await task


def tell(path: Path, story: Story, **changes: Any) -> None:
    async def run() -> None:
        with rig(path) as made:
            async with serving(made.make_app(made.service(**changes))) as port:
                await asyncio.wait_for(story(port), 20)

    asyncio.run(run())


async def talk(port: int, *parts: bytes, pause_s: float = 0.0) -> tuple[bytes, float]:
    """Send parts with pauses; what comes back until the server closes, and when it did."""
    start = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    answer = asyncio.create_task(reader.read())
    for part in parts:
        if answer.done():
            break
        writer.write(part)
        await asyncio.sleep(pause_s)
    text = await answer
    writer.close()
    return text, time.perf_counter() - start


def request(content: bytes, *, length: int | None = None, close: bool = True) -> bytes:
    end = "connection: close\r\n" if close else ""
    return (
        f"POST /v1/risk/score HTTP/1.1\r\nhost: x\r\nx-api-key: {KEY}\r\n{end}"
        f"content-length: {len(content) if length is None else length}\r\n\r\n"
    ).encode() + content


CONTENT = event(1).model_dump_json().encode()


def test_a_request_that_arrives_whole_or_in_pieces_is_answered(tmp_path: Path) -> None:
    guard(PATIENT)

    async def story(port: int) -> None:
        whole, _ = await talk(port, request(CONTENT))
        assert whole.startswith(b"HTTP/1.1 200")
        data = request(CONTENT)
        pieces, _ = await talk(port, data[:20], data[20:150], data[150:], pause_s=0.02)
        assert pieces.startswith(b"HTTP/1.1 200")

    tell(tmp_path, story)


@pytest.mark.parametrize("sent", [b"", b"GET /healthz HTT", b"GET /healthz HTTP/1.1\r\nhost: x\r\n"])
def test_headers_that_do_not_come_end_the_connection(tmp_path: Path, sent: bytes) -> None:
    async def story(port: int) -> None:
        answer, took_s = await talk(port, sent)
        assert answer.startswith(b"HTTP/1.1 408")
        assert 0.25 < took_s < 2

    tell(tmp_path, story)


def test_endless_headers_end_the_connection(tmp_path: Path) -> None:
    guard(PATIENT)

    async def story(port: int) -> None:
        answer, _ = await talk(port, b"GET /healthz HTTP/1.1\r\nhost: x\r\nx-a: ", *[b"a" * 8_192] * 40, pause_s=0.01)
        assert answer.startswith(b"HTTP/1.1 431")
        pieces = [request(CONTENT, close=False)] * 3 + [request(CONTENT)]
        many, _ = await talk(port, *pieces, pause_s=0.01)
        assert many.count(b"HTTP/1.1 200") == 4

    tell(tmp_path, story)


def test_a_byte_now_and_then_buys_no_time(tmp_path: Path) -> None:
    async def story(port: int) -> None:
        answer, took_s = await talk(port, b"GET /healthz HTTP/1.1\r\n", *[b"x-a: 1\r\n"] * 40, pause_s=0.05)
        assert answer.startswith(b"HTTP/1.1 408")
        assert took_s < 1.9

    tell(tmp_path, story)


def test_a_slow_body_is_told_so_and_the_connection_ends(tmp_path: Path) -> None:
    reasons: list[str] = []
    guard(LIMITS, reasons.append)

    async def story(port: int) -> None:
        start = request(b"{", length=500, close=False)
        answer, took_s = await talk(port, start, *[b" "] * 40, pause_s=0.05)
        head, _, text = answer.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 408")
        assert b"connection: close" in head.lower()
        assert b"urn:deepseek-ray:problem:slow-body" in text
        assert took_s < 1.9

    tell(tmp_path, story)
    assert reasons == ["slow-body"]


def test_an_endless_body_after_the_answer_is_cut(tmp_path: Path) -> None:
    async def story(port: int) -> None:
        start = request(b"", length=10**9, close=False)  # refused at once, and goes on sending
        answer, took_s = await talk(port, start, *[b"x" * 10] * 100, pause_s=0.05)
        assert answer.startswith(b"HTTP/1.1 413")
        assert took_s < 3

    tell(tmp_path, story)


def test_an_idle_connection_between_requests_is_left_to_keep_alive(tmp_path: Path) -> None:
    async def story(port: int) -> None:
        first = request(CONTENT, close=False)
        answer, _ = await talk(port, first, b"", request(CONTENT), pause_s=0.3)
        assert answer.count(b"HTTP/1.1 200") == 2  # the limits are shorter than the pause between the two

    tell(tmp_path, story)


def test_more_connections_than_allowed_are_sent_away(tmp_path: Path) -> None:
    guard(PATIENT)

    async def story(port: int) -> None:
        held = [await asyncio.open_connection("127.0.0.1", port) for _ in range(3)]
        await asyncio.sleep(0.05)
        answer, _ = await talk(port, request(CONTENT))
        assert answer.startswith(b"HTTP/1.1 429")
        assert b"retry-after: 1" in answer
        assert b"serving.max_connections" in answer
        for _, writer in held:
            writer.close()
        await asyncio.sleep(0.05)
        answer, _ = await talk(port, request(CONTENT))
        assert answer.startswith(b"HTTP/1.1 200")

    tell(tmp_path, story)


def test_pipelined_requests_wait_for_each_other(tmp_path: Path) -> None:
    guard(PATIENT)

    async def story(port: int) -> None:
        second = request(body_of(2))
        answer, _ = await talk(port, request(CONTENT, close=False) + second[:30], second[30:], pause_s=0.05)
        assert answer.count(b"HTTP/1.1 200") == 2

    tell(tmp_path, story)


def body_of(number: int) -> bytes:
    return json.dumps(body(event(number, card=f"c{number}"))).encode()


def test_an_empty_line_after_an_answer_does_not_hold_the_connection(tmp_path: Path) -> None:
    async def story(port: int) -> None:
        answer, took_s = await talk(port, request(CONTENT, close=False), b"\r\n", pause_s=0.2)
        assert answer.startswith(b"HTTP/1.1 200")
        assert b"HTTP/1.1 408" in answer
        assert took_s < 2

    tell(tmp_path, story)


async def _floods(scope: Any, receive: Any, send: Any) -> None:
    """Answers with more than any buffer takes."""
    await send({"type": "http.response.start", "status": 200, "headers": []})
    for _ in range(64):
        await send({"type": "http.response.body", "body": bytes(1 << 20), "more_body": True})


def test_who_does_not_read_the_answers_is_cut_off() -> None:
    reasons: list[str] = []
    guard(LIMITS, reasons.append)

    async def story() -> None:
        async with serving(_floods) as port:
            _, writer = await asyncio.open_connection("127.0.0.1", port, limit=1)
            writer.write(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
            async with asyncio.timeout(5):
                while not reasons:
                    await asyncio.sleep(0.02)
            writer.close()

    asyncio.run(story())
    assert reasons == ["slow-reading"]


NO_HTTP = b"\x16\x03\x01\x02\x00 the start of TLS\r\n\r\n"


@pytest.mark.parametrize(
    "sent",
    [
        NO_HTTP,
        b"GET /healthz\r\nno header\r\n\r\n",
        b"GET /%ff\xff http\r\n\r\n",
        b"POST /v1/risk/score HTTP/1.1\r\nhost: x\r\nx-api-key: "
        + KEY.encode()
        + b"\r\ntransfer-encoding: chunked\r\n\r\nno length\r\n",
    ],
)
def test_what_is_no_http_gets_a_problem_body(tmp_path: Path, sent: bytes) -> None:
    guard(PATIENT)

    async def story(port: int) -> None:
        answer, _ = await talk(port, sent)
        head, _, text = answer.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 400")
        assert b"content-type: application/problem+json" in head
        problem = json.loads(text)
        assert (problem["status"], problem["type"].rpartition(":")[2]) == (400, "malformed-http")
        assert "use an http:// address" in problem["fix"]

    tell(tmp_path, story)


def test_the_answer_to_a_malformed_request_is_not_given_to_the_one_before() -> None:
    guard(PATIENT)

    async def waits(scope: Any, receive: Any, send: Any) -> None:
        await asyncio.sleep(0.2)

    async def story() -> None:
        async with serving(waits) as port:
            answer, _ = await talk(port, b"GET / HTTP/1.1\r\nhost: x\r\n\r\n" + NO_HTTP)
            assert answer == b""

    asyncio.run(story())
