"""Connections that send too slowly, or are too many, are closed.

uvicorn bounds the time between requests and nothing else: who opens a connection and sends a byte a minute keeps it
for ever (Slowloris). The protocol below closes a connection whose headers, or whose body, are not complete in time.
A request that arrives whole, in one read, costs it a comparison and no timer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from deepseek_ray.config import ServingConfig
from deepseek_ray.errors import DeepseekRayError, OverloadedError, RequestError
from deepseek_ray.serving import problem
from deepseek_ray.serving.joined_writes import JoinedWrites

_IDLE, _HEADERS, _BODY = range(3)
MAX_HEADER_BYTES = 64 << 10
"""Of headers that come in several reads. The parser keeps them all, and whoever sends them needs no key yet."""


@dataclass(frozen=True)
class ConnectionLimits:
    """What a connection may take.

    Attributes:
        header_s: from the connection's start, or from a request's first byte, to the end of its headers.
        body_s: from there to the end of its body; and the time in which answers that wait must be read.
        connections: open at a time.
    """

    header_s: float = 10.0
    body_s: float = 10.0
    connections: int = 1_000

    @classmethod
    def of(cls, config: ServingConfig) -> ConnectionLimits:
        """The limits that the settings ask for."""
        return cls(config.header_timeout_s, config.body_timeout_s, config.max_connections)


class GuardedProtocol(HttpToolsProtocol):
    """uvicorn's HTTP protocol with limits; see ``guard``."""

    limits: ClassVar[ConnectionLimits] = ConnectionLimits()
    refused: ClassVar[Callable[[str], object]] = staticmethod(lambda reason: None)

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._part = self._timed = _IDLE
        self._header_bytes = 0
        self._timer: asyncio.TimerHandle | None = None
        self._unread: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the clock of the first request."""
        super().connection_made(transport)
        self.transport = JoinedWrites(transport)  # type: ignore[assignment]  # as much of one as uvicorn uses
        if len(self.connections) > self.limits.connections:
            self._refuse(_too_many(self.limits.connections))
            return
        self._part = _HEADERS
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the clock."""
        self._part = _IDLE
        self._watch()
        self._stop_waiting()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse, then see what is missing."""
        self._header_bytes += len(data)
        super().data_received(data)
        if self._part == _HEADERS and self._header_bytes > MAX_HEADER_BYTES and not self.transport.is_closing():
            self._refuse(_too_long())
            return
        if self._part == _IDLE and self.cycle is not None and self.cycle.response_complete:
            self._part = _HEADERS  # bytes that begin no request, as an empty line, have ended uvicorn's keep-alive
        if self._part != self._timed:
            self._watch()

    def send_400_response(self, msg: str) -> None:
        """What the parser cannot read is answered by a problem body, as everything else."""
        own_body = self._part == _BODY and not self.pipeline and self.cycle and not self.cycle.response_started
        if self.cycle is None or self.cycle.response_complete or own_body:
            self.transport.write(_answer(_no_http(self.scheme)))
        self.transport.close()  # a request before it that still waits must not take this answer for its own

    def on_message_begin(self) -> None:
        """A request's first byte is here; headers that come in one read with it are bounded by the read."""
        self._part, self._header_bytes = _HEADERS, 0
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """Its headers are."""
        self._part = _BODY
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """All of it is."""
        self._part = _IDLE
        super().on_message_complete()

    def pause_writing(self) -> None:
        """Answers pile up: start the clock of who should read them."""
        super().pause_writing()
        self._stop_waiting()
        self._unread = self.loop.call_later(self.limits.body_s, self._give_up)

    def resume_writing(self) -> None:
        """They have been read."""
        self._stop_waiting()
        super().resume_writing()

    def _stop_waiting(self) -> None:
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None

    def _give_up(self) -> None:
        type(self).refused("slow-reading")
        self.transport.abort()  # closing would wait for what is not read

    def _watch(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._timed = self._part
        if self._part == _HEADERS:
            self._timer = self.loop.call_later(self.limits.header_s, self._cut)
        elif self._part == _BODY:
            self._timer = self.loop.call_later(self.limits.body_s, self._cut)

    def _cut(self) -> None:
        waits = self.cycle is not None and not self.cycle.response_complete
        if self.transport.is_closing():
            return
        if self._part == _HEADERS and waits:
            self._watch()  # the request before it waits for its answer, and reading is paused until then
        elif self._part == _HEADERS:
            self._refuse(_too_slow("headers", self.limits.header_s))
        elif waits and not self.cycle.response_started:
            self._refuse(_too_slow("body", self.limits.body_s))
        else:  # answered long ago, and still sending
            self.transport.close()

    def _refuse(self, error: RequestError | OverloadedError) -> None:
        type(self).refused(error.kind)
        self.transport.write(_answer(error))
        self.transport.close()


def _no_http(scheme: str | None) -> RequestError:
    return RequestError(
        f"The connection does not carry requests of HTTP/1.1 over {scheme}, or a request line or header is malformed.",
        status=400,
        kind="malformed-http",
        fix=f"use an {scheme}:// address, and a client that writes its own request line and headers",
    )


def _too_slow(part: str, allowed_s: float) -> RequestError:
    return RequestError(
        f"The {part} of the request did not arrive within {allowed_s:g} s.",
        status=408,
        kind=f"slow-{part}",
        fix="send the request again, on a better line or with fewer records",
    )


def _too_long() -> RequestError:
    return RequestError(
        f"The headers of the request have more than {MAX_HEADER_BYTES} bytes.",
        status=431,
        kind="long-headers",
        fix="send fewer or shorter headers",
    )


def _too_many(allowed: int) -> OverloadedError:
    return OverloadedError(
        f"{allowed} connections are open, and no more are taken.",
        fix="keep fewer connections and use each for many requests, or raise serving.max_connections",
        kind="connections",
    )


def _answer(error: DeepseekRayError) -> bytes:
    """A whole answer for a connection that no application serves, and its end."""
    status, body = problem.to_problem(error)
    text = problem.encode(body)
    headers = [
        (b"content-type", problem.CONTENT_TYPE),
        (b"content-length", str(len(text)).encode()),
        (b"connection", b"close"),
        *problem.headers_for(status, error),
    ]
    return b"".join([STATUS_LINE[status], *(b"%s: %s\r\n" % header for header in headers), b"\r\n", text])


def guard(limits: ConnectionLimits, refused: Callable[[str], object] = lambda reason: None) -> None:
    """Set the limits of every connection that this process takes with the protocol from now on.

    Args:
        refused: told the reason whenever a connection is ended: slow-headers, slow-body,
            slow-reading or connections.
    """
    GuardedProtocol.limits = limits
    GuardedProtocol.refused = staticmethod(refused)
