"""What every HTTP face of ours shares: plain ASGI with routes, key, problem bodies and metrics; no framework, no Ray.

Every route but the open ones asks for the API key; every error is a problem body (RFC 9457). A server of another
protocol can stand beside: it starts and stops with the application and asks it through :meth:`AsgiApp.answer`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Awaitable, Callable, Collection, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any, Protocol

from deepseek_ray.errors import DeepseekRayError, EnvironmentProblemError, OverloadedError, RegistryError, RequestError
from deepseek_ray.logs import get_logger, hide_folders, trace_of
from deepseek_ray.serving import openapi, problem
from deepseek_ray.serving.auth import Keyring
from deepseek_ray.serving.keys import Scope as KeyScope
from deepseek_ray.serving.monitor import HttpMonitor

logger = get_logger(__name__)

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

JSON = b"application/json"
TELL_EVERY_S = 60.0


@dataclass(frozen=True)
class Response:
    """Status, body and headers of an answer."""

    status: int
    body: bytes
    content_type: bytes = JSON
    headers: tuple[tuple[bytes, bytes], ...] = ()


Handler = Callable[[Scope, Receive], Awaitable[Response]]
Routes = Mapping[str, Mapping[str, Handler]]


class Beside(Protocol):
    """A server of another protocol in front of the same routes."""

    @property
    def port(self) -> int:
        """Where it listens; 0 before it has started."""

    async def start(self) -> None: ...
    async def stop(self) -> None: ...


class AsgiApp:
    """ASGI application over a table of routes.

    Attributes:
        routes: path -> method -> handler.
        beside: started and stopped with the application, None for none.
        root: the run folder; clients hear of its files by names that are seen from there.

    Args:
        routes: path -> method -> handler.
        keys: who may call.
        monitor: where requests are counted and timed.
        document: the OpenAPI document, shown as data and as a page.
        shutdown: called once when the server stops.
        admin_routes: paths that change what the service does for everyone.
    """

    def __init__(
        self,
        routes: Routes,
        keys: Keyring,
        monitor: HttpMonitor,
        *,
        document: Callable[[], dict[str, Any]],
        shutdown: Callable[[], None],
        admin_routes: Collection[str] = (),
    ) -> None:
        self.routes: Routes = {
            **routes,
            "/healthz": {"GET": self._healthz},
            "/metrics": {"GET": self._metrics},
            "/openapi.json": {"GET": self._openapi},
            "/docs": {"GET": self._docs},
        }
        self.beside: Beside | None = None
        self.root = ""
        self._told = ("", 0.0)
        self._keys = keys
        self._admin_routes = frozenset(admin_routes)
        self._monitor = monitor
        self._document = document
        self._shutdown = shutdown

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one HTTP request, or the server's start and stop."""
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1003})
            return
        await _send(send, await self.answer(scope, receive))

    async def answer(self, scope: Scope, receive: Receive) -> Response:
        """One request's answer, counted and timed; a failure is a problem body."""
        start = time.perf_counter()
        path = scope["path"]
        response = await self._respond(scope, receive, path)
        route = path if path in self.routes else "other"
        self._monitor.answered(route, response.status, time.perf_counter() - start)
        return response

    async def _respond(self, scope: Scope, receive: Receive, path: str) -> Response:
        try:
            if path not in openapi.OPEN_ROUTES:
                scope["grant"] = self._keys.check(scope["headers"], self._needed(path, scope["method"]))
            return await self._find(path, scope["method"])(scope, receive)
        except Exception as error:
            if isinstance(error, OverloadedError):
                self._monitor.shed.labels(error.kind).inc()
            elif isinstance(error, EnvironmentProblemError | RegistryError):
                self._tell(str(error))
            elif not isinstance(error, DeepseekRayError):
                route = path if path in self.routes else "an unknown path"
                logger.error("request to %s failed: %s", route, trace_of(error))
            return self._refusal(_unpacked(error, scope), path)

    def _tell(self, problem: str) -> None:
        """Log what is wrong with this machine, with the paths that clients do not see; one line a minute is enough."""
        now_s = time.monotonic()
        if problem != self._told[0] or now_s - self._told[1] > TELL_EVERY_S:
            self._told = problem, now_s
            logger.error("requests are refused: %s", problem)

    def _needed(self, path: str, method: str) -> KeyScope:
        if path in self._admin_routes:
            return "admin"
        return "read" if method in ("GET", "HEAD") else "write"

    def _find(self, path: str, method: str) -> Handler:
        methods = self.routes.get(path)
        if methods is None:
            detail = f"There is no route {path[:80]!r}."
            raise RequestError(detail, status=404, kind="unknown-route", fix="see /docs for the routes")
        if method == "HEAD":  # the server leaves the body out
            method = "GET"
        if method not in methods:
            fix = f"use {self._allowed(path)}"
            raise RequestError(f"{path} does not take {method}.", status=405, kind="wrong-method", fix=fix)
        return methods[method]

    def _allowed(self, path: str) -> str:
        methods = self.routes[path]
        return ", ".join([*methods, *(["HEAD"] if "GET" in methods else [])])

    def _refusal(self, error: Exception, path: str) -> Response:
        status, body = problem.to_problem(error, self.root)
        headers = problem.headers_for(status, error)
        if status == 405:
            headers.append((b"allow", self._allowed(path).encode()))
        return Response(status, problem.encode(body), problem.CONTENT_TYPE, tuple(headers))

    def without_folders(self, tree: Any) -> Any:
        """Texts, also those of lists and mappings, without the folders of this server."""
        if isinstance(tree, str):
            return hide_folders(tree, self.root)
        if isinstance(tree, Mapping):
            return {key: self.without_folders(value) for key, value in tree.items()}
        return [self.without_folders(value) for value in tree] if isinstance(tree, list) else tree

    async def _healthz(self, scope: Scope, receive: Receive) -> Response:
        return json_response({"status": "alive", "rpc_port": self.beside.port if self.beside else 0})

    async def _metrics(self, scope: Scope, receive: Receive) -> Response:
        return Response(200, self._monitor.render(), self._monitor.content_type.encode())

    async def _openapi(self, scope: Scope, receive: Receive) -> Response:
        return json_response(self._document())

    async def _docs(self, scope: Scope, receive: Receive) -> Response:
        return Response(200, openapi.page(self._document()).encode("utf-8"), b"text/html; charset=utf-8")

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        while True:
            message = await receive()
            if message["type"] == "lifespan.shutdown":
                if self.beside:
                    await self.beside.stop()
                self._shutdown()
                await send({"type": "lifespan.shutdown.complete"})
                return
            if self.beside:
                await self.beside.start()
            await send({"type": "lifespan.startup.complete"})


async def read_body(scope: Scope, receive: Receive, limit: int) -> bytes:
    """The whole body of a request; how long it may take is the server's business, see slow_clients.py.

    Raises:
        RequestError: 413 more than ``limit`` bytes, 400 the client left.
    """
    declared = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
    if declared.isdigit() and int(declared) > limit:
        raise _too_large(int(declared), limit)
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise RequestError("The client closed the connection.", status=400, kind="disconnected")
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > limit:
            raise _too_large(size, limit)
        if not message.get("more_body", False):
            return parts[0] if len(parts) == 1 else b"".join(parts)


def _unpacked(error: Exception, scope: Scope) -> Exception:
    """Of a packed body say that it is packed, not where its JSON breaks off; a body that can be read is not asked."""
    if not isinstance(error, RequestError) or error.kind != "malformed-json":
        return error
    coding = next((value for name, value in scope["headers"] if name == b"content-encoding"), b"identity")
    if coding.lower() == b"identity":
        return error
    return RequestError(
        f"The header Content-Encoding = {coding.decode('latin-1')[:80]!r} is not supported.",
        status=415,
        kind="unsupported-encoding",
        field="Content-Encoding",
        fix="send the body as it is, without this header",
    )


def _too_large(size: int, limit: int) -> RequestError:
    return RequestError(
        f"The body has at least {size} bytes; at most {limit} are taken.",
        status=413,
        kind="body-too-large",
        fix="send fewer records a request, or raise serving.max_body_bytes",
    )


def json_response(value: Mapping[str, Any]) -> Response:
    """200 with a JSON object."""
    return Response(200, json.dumps(value, allow_nan=False).encode("utf-8"))


async def _send(send: Send, response: Response) -> None:
    length = str(len(response.body)).encode()
    headers = [(b"content-type", response.content_type), (b"content-length", length), *response.headers]
    await send({"type": "http.response.start", "status": response.status, "headers": headers})
    await send({"type": "http.response.body", "body": response.body})
