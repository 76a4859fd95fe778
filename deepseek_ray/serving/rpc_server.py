"""gRPC beside HTTP: a server in the replica whose one method asks the application's own routes.

Key, limits, queue, batches and problem bodies are therefore those of HTTP. Ray Serve's own gRPC ingress is not used:
it listens on every address of the machine without encryption, hides the caller's deadline from the application, and
takes longer (docs/serving.md has the figures). A call whose deadline passes is cancelled here, and the batcher drops
what still waits.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import grpc

from deepseek_ray.config import ServingConfig
from deepseek_ray.errors import EnvironmentProblemError, RequestError
from deepseek_ray.rpc import (
    MAX_PROBLEM_BYTES,
    MAX_TIMEOUT_S,
    PROBLEM_KEY,
    SERVICE,
    STATUS_KEY,
    TIMEOUT_HEADER,
    CallReply,
    CallRequest,
    grpc_code,
    path_of,
)
from deepseek_ray.serving.asgi import AsgiApp, Message, Response, Scope

NOWHERE = "/v1/"
"""A path that no route has."""
_ROOM = 64 << 10
"""Bytes of a message beside its payload: a body over the limit still reaches the route, which says so.

Anything larger gRPC refuses by its length, before it is read: RESOURCE_EXHAUSTED without our metadata. To let it in for
a better word would let everybody fill the memory.
"""


class RpcServer:
    """Serves one application's routes over gRPC; started inside the application's event loop.

    Args:
        app: whose routes answer.
        host: address to listen on.
        port: port to listen on, 0 for a free one.
        max_body_bytes: of a payload.
        certificate: files of a certificate and its key, None for no encryption.
        max_calls: open at a time, over all connections; None for any number.
        idle_s: how long a connection without a call stays open; None for ever.
        grace_s: time that open calls may take after a stop.
    """

    def __init__(
        self,
        app: AsgiApp,
        host: str,
        port: int,
        *,
        max_body_bytes: int,
        certificate: tuple[str, str] | None = None,
        max_calls: int | None = None,
        idle_s: float | None = None,
        grace_s: float = 10.0,
    ) -> None:
        self._app = app
        self._host, self._wanted, self._certificate = host, port, certificate
        self._limit, self._grace_s = max_body_bytes + _ROOM, grace_s
        self._max_calls, self._idle_s = max_calls, idle_s
        self._server: Any = None
        self._port = 0

    @property
    def port(self) -> int:
        """The port it listens on; 0 before :meth:`start`."""
        return self._port

    async def start(self) -> None:
        """Listen.

        Raises:
            EnvironmentProblemError: the port is taken.
        """
        self._server = grpc.aio.server(options=self._options(), maximum_concurrent_rpcs=self._max_calls)
        handler = grpc.unary_unary_rpc_method_handler(
            self._call, request_deserializer=CallRequest.FromString, response_serializer=CallReply.SerializeToString
        )
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {"Call": handler}),))
        address = f"[{self._host}]" if ":" in self._host else self._host
        try:
            self._port = self._bind(f"{address}:{self._wanted}")
        except RuntimeError as error:
            raise EnvironmentProblemError(
                f"{address}:{self._wanted} cannot be listened on for gRPC.",
                fix="stop the other server, or choose another serving.rpc_port",
            ) from error
        await self._server.start()

    def _options(self) -> list[tuple[str, int]]:
        options = [("grpc.max_receive_message_length", self._limit)]
        if self._max_calls is not None:
            options.append(("grpc.max_concurrent_streams", self._max_calls))
        if self._idle_s is not None:
            options.append(("grpc.max_connection_idle_ms", round(1e3 * self._idle_s)))
        return options

    def _bind(self, address: str) -> int:
        if self._certificate is None:
            return int(self._server.add_insecure_port(address))
        certfile, keyfile = (Path(file).read_bytes() for file in self._certificate)
        credentials = grpc.ssl_server_credentials([(keyfile, certfile)])
        return int(self._server.add_secure_port(address, credentials))

    async def stop(self) -> None:
        """Take no new call, finish open ones. Stopping twice is stopping once."""
        if self._server is not None:
            await self._server.stop(self._grace_s)
            self._server = None

    async def _call(self, request: Any, context: Any) -> Any:
        response = await self._ask(request.method, request.payload, _headers(context))
        if response.status < 400:
            return CallReply(payload=response.body)
        code = getattr(grpc.StatusCode, grpc_code(response.status))
        await context.abort(code, _detail(response), _trailing(response))
        raise AssertionError("abort raises")

    async def _ask(self, method: str, payload: bytes, headers: list[tuple[bytes, bytes]]) -> Response:
        scope: Scope = {"type": "http", "path": self._path(method), "headers": headers}
        scope["method"] = next(iter(self._app.routes.get(scope["path"], ("POST",))))

        async def receive() -> Message:
            return {"type": "http.request", "body": payload, "more_body": False}

        return await self._app.answer(scope, receive)

    def _path(self, method: str) -> str:
        try:
            return path_of(method)
        except RequestError:
            return NOWHERE  # the application answers, after it has seen the key; the name itself may be a route's path


def attach(app: AsgiApp, config: ServingConfig) -> None:
    """Put gRPC beside an application, unless the settings say that there is none."""
    if config.rpc_port >= 0:
        certificate = (config.tls_certfile, config.tls_keyfile) if config.tls_certfile else None
        app.beside = RpcServer(
            app,
            config.host,
            config.rpc_port,
            max_body_bytes=config.max_body_bytes,
            certificate=certificate,
            max_calls=config.max_connections,
            idle_s=config.keep_alive_timeout_s,
        )


def _headers(context: Any) -> list[tuple[bytes, bytes]]:
    """A call's metadata as the routes know it, with what is left of its deadline."""
    pairs = [(name, value) for name, value in context.invocation_metadata() if name != TIMEOUT_HEADER]
    left_s = context.time_remaining()
    if left_s is not None and 0 < left_s < MAX_TIMEOUT_S:  # a client without a deadline has one of centuries
        pairs.append((TIMEOUT_HEADER, f"{1e3 * left_s:.3f}"))
    return [(name.encode(), value if isinstance(value, bytes) else value.encode()) for name, value in pairs]


def _detail(response: Response) -> str:
    return str(_problem(response).get("detail", ""))[:1_000]


def _problem(response: Response) -> dict[str, Any]:
    return cast("dict[str, Any]", json.loads(response.body))


def _trailing(response: Response) -> tuple[tuple[str, str | bytes], ...]:
    body = response.body
    if len(body) > MAX_PROBLEM_BYTES:
        body = json.dumps({key: value for key, value in _problem(response).items() if key != "errors"}).encode()
    retry = tuple((name.decode(), value.decode()) for name, value in response.headers if name == b"retry-after")
    return ((STATUS_KEY, str(response.status)), (PROBLEM_KEY, body[:MAX_PROBLEM_BYTES]), *retry)
