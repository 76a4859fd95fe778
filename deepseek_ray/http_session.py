"""HTTP to one service: connections that stay open, one total time a request, every failure a typed error.

For asynchronous callers; :class:`deepseek_ray.channels.HttpChannel` is the same for others.
"""

from __future__ import annotations

import io

import aiohttp

from deepseek_ray.address import Address, Trust
from deepseek_ray.answers import accepted, closed, seconds, too_late, unreachable
from deepseek_ray.errors import UnreachableError, WrongAddressError
from deepseek_ray.rpc import TIMEOUT_HEADER


class HttpSession:
    """Asks one service; used and closed in one event loop.

    Args:
        address: of the service.
        api_key: of the service.
        trust: needed where the address is encrypted.
        connections: kept open at most.
    """

    def __init__(self, address: Address, api_key: str, trust: Trust | None, connections: int = 8) -> None:
        self.url = address.url
        self._headers = {"X-API-Key": api_key, "Content-Type": "application/json"}
        self._trust, self._connections = trust, connections
        self._session: aiohttp.ClientSession | None = None
        self._closed = False

    async def ask(self, verb: str, path: str, body: bytes, timeout_s: float) -> bytes:
        """The body of the answer.

        Args:
            timeout_s: from now to the answer's last byte; the service is told, and does not do what would be late.

        Raises:
            RequestError, OverloadedError, ServingError: the service refused or failed.
            UnreachableError: there is no connection, or it broke; WrongAddressError: to something else.
            DeadlineError: there was no answer in time.
            ClosedError: the session is closed.
        """
        where = f"{self.url}{path}"
        limit, told = aiohttp.ClientTimeout(total=timeout_s), {TIMEOUT_HEADER: f"{1e3 * timeout_s:.3f}"}
        try:
            async with self._opened().request(
                verb, where, data=_sendable(body), timeout=limit, headers=told, allow_redirects=False
            ) as answer:
                wait_s = seconds(answer.headers.get("Retry-After"))
                return accepted(answer.status, await answer.read(), where, wait_s)
        except TimeoutError as error:
            raise too_late(where, timeout_s) from error
        except (aiohttp.ClientError, ConnectionError) as error:
            if self._closed:
                raise closed(self.url) from error
            raise _broken(where, error) from error

    async def close(self) -> None:
        """Give the connections back. Closing twice is closing once."""
        self._closed = True
        if self._session is not None:
            await self._session.close()

    def _opened(self) -> aiohttp.ClientSession:
        if self._closed:
            raise closed(self.url)
        if self._session is None:  # made here, because it belongs to the loop that runs
            tls = self._trust.context if self._trust else True
            self._session = aiohttp.ClientSession(
                headers=self._headers,
                connector=aiohttp.TCPConnector(limit=self._connections, ssl=tls),
                cookie_jar=aiohttp.DummyCookieJar(),
            )
        return self._session


def _sendable(body: bytes) -> bytes | io.BytesIO | None:
    """A large body in pieces: sent at once it would hold the event loop."""
    return io.BytesIO(body) if len(body) > 1 << 20 else body or None


def _broken(where: str, error: Exception) -> UnreachableError:
    if isinstance(error, aiohttp.ClientConnectorCertificateError):
        why = f"its certificate is not trusted ({error.certificate_error})"
        fix = "name the authority that signed it with ca_file, or with the environment's SSL_CERT_FILE"
        return WrongAddressError(f"{where} did not answer: {why}.", fix=fix)
    if isinstance(error, aiohttp.ClientSSLError):
        return unreachable(where, f"it does not speak TLS ({error})", "write http:// where the service has no TLS")
    if isinstance(error, aiohttp.ClientResponseError | aiohttp.ServerDisconnectedError | ConnectionError):
        fix = "give the address that the service printed, with https:// where it has TLS"
        return unreachable(where, f"what listens there ended the connection or speaks no HTTP ({error!r})", fix)
    return unreachable(where, repr(error))
