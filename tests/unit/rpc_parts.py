"""An application behind real ports: uvicorn for HTTP, gRPC beside it, in a thread of the test's process."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn

from deepseek_ray.serving.asgi import AsgiApp
from deepseek_ray.serving.rpc_server import RpcServer


class Served:
    """Addresses of the running application; ``stop_rpc`` takes gRPC away and leaves HTTP."""

    def __init__(
        self,
        app: AsgiApp,
        *,
        rpc: bool = True,
        certificate: tuple[str, str] | None = None,
        max_calls: int | None = None,
    ) -> None:
        self.app = app
        limits: dict[str, Any] = {"max_body_bytes": 20_000, "max_calls": max_calls, "grace_s": 0.5}
        self.rpc = RpcServer(app, "127.0.0.1", 0, certificate=certificate, **limits)
        app.beside = self.rpc if rpc else None
        tls = dict(zip(("ssl_certfile", "ssl_keyfile"), certificate or (), strict=False))
        config = uvicorn.Config(app, host="127.0.0.1", port=0, lifespan="on", log_level="error", ws="none", **tls)  # type: ignore[arg-type]
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run)

    @property
    def http_address(self) -> str:
        return f"127.0.0.1:{self.server.servers[0].sockets[0].getsockname()[1]}"

    @property
    def rpc_address(self) -> str:
        return f"127.0.0.1:{self.rpc.port}"

    def start(self) -> None:
        self.thread.start()
        end = time.monotonic() + 20
        while not self.server.started:
            assert self.thread.is_alive()
            assert time.monotonic() < end, "the server did not start"
            time.sleep(0.01)

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(20)


@contextmanager
def served(app: AsgiApp, **options: Any) -> Iterator[Served]:
    """Serve while the block runs."""
    before = app.beside
    made = Served(app, **options)
    made.start()
    try:
        yield made
    finally:
        made.stop()
        app.beside = before
