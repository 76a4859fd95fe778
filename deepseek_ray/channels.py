"""How a call travels to a service: over gRPC, or over HTTP. Connections are kept; failures are typed errors."""

from __future__ import annotations

import asyncio
import re
import threading
import weakref
from collections.abc import Coroutine
from typing import Any, Protocol

from deepseek_ray.address import Address, Trust
from deepseek_ray.answers import another, closed, refusal, rpc_port, seconds, too_late, unreachable
from deepseek_ray.errors import OverloadedError, RequestError, ServingError
from deepseek_ray.http_session import HttpSession
from deepseek_ray.rpc import CALL, PROBLEM_KEY, STATUS_KEY, CallReply, CallRequest, path_of

MAX_MESSAGE_BYTES = 64 << 20
"""Of an answer over gRPC; over HTTP there is no limit."""
_GET = re.compile(r"(risk\.model|models[./][^./]+)")
"""Calls whose HTTP route takes no body."""
_END_S = 5.0


class Channel(Protocol):
    """A way to a service."""

    def send(self, method: str, payload: bytes, timeout_s: float) -> bytes:
        """The answer's body.

        Raises:
            RequestError, OverloadedError, ServingError: the service refused or failed.
            UnreachableError: there is no connection; DeadlineError: there was no answer in time.
            ClosedError: the channel is closed.
        """

    def close(self) -> None: ...


class HttpChannel:
    """HTTP/1.1 with connections that stay open, on a thread of its own; safe to share between threads.

    Args:
        address: of the service.
        api_key: of the service.
        trust: needed where the address is encrypted.
        connections: kept open at most.
    """

    def __init__(self, address: Address, api_key: str, trust: Trust | None = None, connections: int = 8) -> None:
        self._session = HttpSession(address, api_key, trust, connections)
        self._loop = asyncio.new_event_loop()
        thread = threading.Thread(target=_run, args=(self._loop,), name="deepseek-ray-http", daemon=True)
        thread.start()
        self._end = weakref.finalize(self, _end, self._loop, thread, self._session)  # also when nobody closes it

    def send(self, method: str, payload: bytes, timeout_s: float) -> bytes:
        verb = "GET" if not payload and _GET.fullmatch(method) else "POST"
        return self._ask(verb, path_of(method), payload, timeout_s)

    def rpc_port(self, timeout_s: float) -> int:
        """The port of gRPC that the service names, 0 for none.

        Raises:
            UnreachableError: nothing answers at the address, or not HTTP.
            WrongAddressError: another program answers.
        """
        try:
            return rpc_port(self._ask("GET", "/healthz", b"", timeout_s), f"{self._session.url}/healthz")
        except RequestError as error:  # a service of ours refuses this to nobody
            raise another(self._session.url, f"status {error.status} to /healthz") from error

    def close(self) -> None:
        self._end()

    def _ask(self, verb: str, path: str, payload: bytes, timeout_s: float) -> bytes:
        if not self._end.alive:
            raise closed(self._session.url)
        return self._wait(self._session.ask(verb, path, payload, timeout_s), timeout_s)

    def _wait(self, work: Coroutine[Any, Any, bytes], timeout_s: float) -> bytes:
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result(timeout_s + _END_S)  # the session ends it before, unless its thread has ended
        except (asyncio.CancelledError, TimeoutError) as error:
            raise closed(self._session.url) from error
        finally:
            future.cancel()


def _run(loop: asyncio.AbstractEventLoop) -> None:
    try:
        loop.run_forever()
    finally:
        loop.close()


def _end(loop: asyncio.AbstractEventLoop, thread: threading.Thread, session: HttpSession) -> None:
    ended = asyncio.run_coroutine_threadsafe(_finish(session), loop)
    ended.add_done_callback(lambda _: loop.call_soon_threadsafe(loop.stop))
    if threading.current_thread() is not thread:  # garbage is collected on any thread
        thread.join(_END_S)


async def _finish(session: HttpSession) -> None:
    await session.close()
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)


class GrpcChannel:
    """One HTTP/2 connection that all calls share; gRPC restores it in the background when it breaks.

    Args:
        address: of the service's gRPC.
        api_key: of the service.
        trust: needed where the address is encrypted.
    """

    def __init__(self, address: Address, api_key: str, trust: Trust | None = None) -> None:
        import grpc  # here, so that a user of HTTP alone does without

        self._grpc, self.target = grpc, address.target(address.port)
        options = [
            ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
            ("grpc.max_reconnect_backoff_ms", 2_000),
            ("grpc.enable_http_proxy", 0),
        ]
        if address.tls:
            credentials = grpc.ssl_channel_credentials(trust.roots if trust else None)
            self._channel = grpc.secure_channel(self.target, credentials, options=options)
        else:
            self._channel = grpc.insecure_channel(self.target, options=options)
        self._metadata = (("x-api-key", api_key),)
        self._call = self._channel.unary_unary(
            CALL, request_serializer=CallRequest.SerializeToString, response_deserializer=CallReply.FromString
        )
        self._ready, self._closed = threading.Event(), False
        self._channel.subscribe(self._on_state, try_to_connect=True)

    @property
    def ready(self) -> bool:
        """Whether the connection stands now."""
        return self._ready.is_set()

    def wait_ready(self, timeout_s: float) -> bool:
        """Wait for the connection; False when it does not come about."""
        return self._ready.wait(timeout_s)

    def send(self, method: str, payload: bytes, timeout_s: float) -> bytes:
        path_of(method)  # a name that is none is refused here
        request = CallRequest(method=method, payload=payload)
        try:
            return bytes(self._call(request, timeout=timeout_s, metadata=self._metadata).payload)
        except self._grpc.RpcError as error:
            raise self._typed(error, method, len(payload), timeout_s) from error
        except ValueError as error:  # what gRPC raises on a closed channel
            if self._closed:
                raise closed(self.target) from error
            raise

    def close(self) -> None:
        self._closed = True
        self._channel.unsubscribe(self._on_state)
        self._channel.close()

    def _on_state(self, state: Any) -> None:
        states = self._grpc.ChannelConnectivity
        if state is states.READY:
            self._ready.set()
        elif state is not states.IDLE:
            self._ready.clear()

    def _typed(self, error: Any, method: str, size: int, timeout_s: float) -> ServingError:
        trailing = dict(error.trailing_metadata() or ())
        if status := trailing.get(STATUS_KEY):
            return refusal(int(status), trailing.get(PROBLEM_KEY, b""), method, seconds(trailing.get("retry-after")))
        codes, where = self._grpc.StatusCode, f"{method} at {self.target}"
        if self._closed:
            return closed(self.target)
        if error.code() is codes.DEADLINE_EXCEEDED:
            return too_late(where, timeout_s)
        if error.code() in (codes.UNAVAILABLE, codes.CANCELLED):
            return unreachable(where, error.details())
        if error.code() is codes.UNIMPLEMENTED:
            return another(where, f"{error.code().name} {error.details()}")
        if error.code() is codes.RESOURCE_EXHAUSTED:
            return _exhausted(where, str(error.details()), size)
        return ServingError(f"{where} failed: {error.code().name} {error.details()}", fix="see the service's log")


def _exhausted(where: str, details: str, size: int) -> ServingError:
    """gRPC's own limits: too many calls, too large a request, too large an answer."""
    if "message larger" not in details:
        detail = f"{where} takes no more calls at a time (serving.max_connections): {details}"
        return OverloadedError(detail, fix="send more slowly, or raise serving.max_connections")
    if "CLIENT:" in details:  # who noticed
        return ServingError(
            f"The answer of {where} is larger than {MAX_MESSAGE_BYTES} bytes: {details}",
            fix="ask for fewer records a call, or use a client without gRPC: serve with serving.rpc_port=-1",
        )
    return RequestError(
        f"The payload of {where} has {size} bytes, more than serving.max_body_bytes allows: {details}",
        status=413,
        kind="urn:deepseek-ray:problem:body-too-large",
        fix="send fewer records a call, or raise serving.max_body_bytes",
    )
