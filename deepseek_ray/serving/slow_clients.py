"""Connections that send too slowly, or are too many, are closed.

uvicorn bounds the time between requests and nothing else: who opens a connection and sends a byte a minute keeps it
for ever (Slowloris). The protocol below closes a connection whose headers, or whose body, are not complete in time.
A request that arrives whole, in one read, costs it a comparison and no timer.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any, ClassVar

from uvicorn import config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

_IDLE, _HEADERS, _BODY = range(3)
_GRACE_S = 1.0
"""A body that is late is answered by the application; only a connection that does not end then is cut here."""
_TOO_MANY = b"HTTP/1.1 503 Service Unavailable\r\nretry-after: 1\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"
_TOO_SLOW = b"HTTP/1.1 408 Request Timeout\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"


@dataclass(frozen=True)
class ConnectionLimits:
    """What a connection may take.

    Attributes:
        header_s: from the connection's start, or from a request's first byte, to the end of its headers.
        body_s: from there to the end of its body.
        connections: open at a time.
    """

    header_s: float = 10.0
    body_s: float = 10.0
    connections: int = 1_000


class GuardedProtocol(HttpToolsProtocol):
    """uvicorn's HTTP protocol with limits; see ``guard``."""

    limits: ClassVar[ConnectionLimits] = ConnectionLimits()

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._part = self._timed = _IDLE
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the clock of the first request."""
        super().connection_made(transport)
        if len(self.connections) > self.limits.connections:
            transport.write(_TOO_MANY)
            transport.close()
            return
        self._part = _HEADERS
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the clock."""
        self._part = _IDLE
        self._watch()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse, then see what is missing."""
        super().data_received(data)
        if self._part != self._timed:
            self._watch()

    def on_message_begin(self) -> None:
        """A request's first byte is here."""
        self._part = _HEADERS
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """Its headers are."""
        self._part = _BODY
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """All of it is."""
        self._part = _IDLE
        super().on_message_complete()

    def _watch(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._timed = self._part
        if self._part == _HEADERS:
            self._timer = self.loop.call_later(self.limits.header_s, self._cut)
        elif self._part == _BODY:
            self._timer = self.loop.call_later(self.limits.body_s + _GRACE_S, self._cut)

    def _cut(self) -> None:
        if self.transport.is_closing():
            return
        if self._part == _HEADERS and self.cycle is not None and not self.cycle.response_complete:
            self._watch()  # the request before it waits for its answer, and reading is paused until then
            return
        if self._part == _HEADERS:
            self.transport.write(_TOO_SLOW)
        self.transport.close()


def guard(limits: ConnectionLimits) -> None:
    """Make every uvicorn server that this process starts from now on keep the limits, Ray Serve's included."""
    GuardedProtocol.limits = limits
    config.HTTP_PROTOCOLS["auto"] = f"{__name__}:{GuardedProtocol.__name__}"
