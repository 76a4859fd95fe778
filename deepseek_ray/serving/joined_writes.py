"""Head and body of an answer leave in one write.

uvicorn hands them to the transport one after the other, and uvloop makes a system call of each: two packets, and a
client that is woken twice.
"""

from __future__ import annotations

import asyncio
from typing import Any

_HEAD, _END = b"HTTP/1.1 ", b"\r\n\r\n"
_CONTINUE = b"HTTP/1.1 100 "


class JoinedWrites:
    """A transport that keeps the head of an answer until its body comes, which with our applications is at once.

    Whole answers, bodies and ``100 Continue`` pass. Closing writes what was kept.
    """

    __slots__ = ("_head", "_transport")

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._head = b""

    def write(self, data: bytes) -> None:
        """Write, or keep a head."""
        if self._head:
            data, self._head = self._head + data, b""
        elif data.startswith(_HEAD) and data.endswith(_END) and not data.startswith(_CONTINUE):
            self._head = data
            return
        self._transport.write(data)

    def close(self) -> None:
        """Close when all is written."""
        if self._head:
            self.write(b"")
        self._transport.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)
