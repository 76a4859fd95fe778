"""The HTTP server inside a replica: uvicorn on the replica's own event loop, nothing between socket and application.

Ray Serve's direct ingress wraps each request in two tasks, a queue, an access-log record and its metrics, all
in Python; on two cores that is more than the application itself costs (docs/serving.md has the figures). Serve still
starts, watches, restarts and stops the replica.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn

from deepseek_ray.errors import ServingError
from deepseek_ray.serving.slow_clients import GuardedProtocol

BACKLOG = 2_048
KEEP_ALIVE_S = 60
FINISH_S = 20
"""Open requests may take so long after a stop."""


class Listener:
    """Serves one ASGI application on one address; made inside a running event loop.

    Args:
        application: ASGI, with lifespan events.
        address: a socket from :func:`bound`; closed at the end.
        keep_alive_timeout_s: how long an idle connection stays open.
        tls: ``ssl_certfile``, ``ssl_keyfile`` and other ``ssl_`` settings of ``uvicorn.Config``.

    Raises:
        OSError: another process listens at the address by now.
    """

    def __init__(
        self, application: Any, address: socket.socket, *, keep_alive_timeout_s: int = KEEP_ALIVE_S, **tls: Any
    ) -> None:
        self._socket = address
        address.listen(BACKLOG)
        config = uvicorn.Config(
            application,
            http=GuardedProtocol,  # httptools, with limits for slow clients
            ws="none",
            lifespan="on",
            interface="asgi3",
            access_log=False,
            log_config=None,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=keep_alive_timeout_s,
            timeout_graceful_shutdown=FINISH_S,
            **tls,
        )
        self._server = _Server(config)
        self._task = asyncio.get_running_loop().create_task(self._serve())

    async def _serve(self) -> None:
        try:
            await self._server.serve(sockets=[self._socket])
        except SystemExit as error:  # uvicorn's way to say that the application did not start
            raise ServingError("The application did not start.", fix="see the service's log") from error
        finally:
            self._socket.close()

    async def ready(self) -> None:
        """Wait until requests are answered.

        Raises:
            ServingError: the application did not start.
        """
        while not self._server.started:
            self.check()
            await asyncio.sleep(0.01)

    def check(self) -> None:
        """Raise when the server is not running any more.

        Raises:
            ServingError: it ended.
        """
        if self._task.done():
            self._task.result()
            raise ServingError("The HTTP server has ended.", fix="see the service's log; Serve restarts the replica")

    async def close(self) -> None:
        """Take no new connection, finish open requests, then stop the application."""
        self._server.should_exit = True
        await self._task


class _Server(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield  # signals belong to Ray


def bound(host: str, port: int) -> socket.socket:
    """A socket that has its address, and does not listen yet: whoever connects early is turned away, not kept waiting.

    A port whose last owner has just died can be taken at once.

    Raises:
        OSError: the port is taken.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    made = socket.socket(family, socket.SOCK_STREAM)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        made.bind((host, port))
    except OSError:
        made.close()
        raise
    made.setblocking(False)
    return made
