"""The replica's own HTTP server: it answers, it finishes what is open, and it says when it has ended."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import httpx
import pytest

from deepseek_ray.errors import ServingError
from serve_apps import ingress
from serve_apps.ingress import Ingress, free_port
from serve_apps.listener import Listener, bound


class Slow:
    """Answers after a moment; notes its start and stop."""

    def __init__(self, *, fail: bool = False) -> None:
        self.fail = fail
        self.seen: list[str] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
            return
        await asyncio.sleep(0.2)
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})

    async def _lifespan(self, receive: Any, send: Any) -> None:
        while True:
            event = (await receive())["type"]
            self.seen.append(event)
            if self.fail:
                await send({"type": "lifespan.startup.failed"})
                return
            await send({"type": f"{event}.complete"})
            if event == "lifespan.shutdown":
                return


def test_open_requests_are_finished_and_the_application_is_told() -> None:
    async def story() -> None:
        app, port = Slow(), free_port()
        listener = Listener(app, bound("127.0.0.1", port))
        await listener.ready()
        async with httpx.AsyncClient() as client:
            open_request = asyncio.create_task(client.get(f"http://127.0.0.1:{port}"))
            await asyncio.sleep(0.1)
            await listener.close()
            assert (await open_request).text == "ok"
        assert app.seen == ["lifespan.startup", "lifespan.shutdown"]
        with pytest.raises(ServingError, match="ended"):
            listener.check()
        again = Listener(Slow(), bound("127.0.0.1", port))  # at once, though connections of the last one linger
        await again.ready()
        await again.close()

    asyncio.run(story())


def test_an_application_that_does_not_start_is_an_error() -> None:
    async def story() -> None:
        with pytest.raises(ServingError):
            await Listener(Slow(fail=True), bound("127.0.0.1", free_port())).ready()

    asyncio.run(story())


class Unended(Ingress):
    """An ingress that Serve does not end."""

    def __del__(self) -> None: ...  # type: ignore[override]


def test_nothing_is_opened_where_another_server_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ingress, "_stay_on_this_machine", lambda: None)
    made: list[str] = []

    async def story(port: int) -> None:
        await Unended.__init__(Unended.__new__(Unended), ("127.0.0.1", port), {}, made.append, "application")

    with socket.create_server(("127.0.0.1", 0)) as other, pytest.raises(OSError, match="in use"):
        asyncio.run(story(other.getsockname()[1]))
    assert made == []
