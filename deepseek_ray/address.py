"""Where a service is, as its user writes it, and whose certificates are believed there."""

from __future__ import annotations

import re
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Self
from urllib.parse import SplitResult, urlsplit

from deepseek_ray.errors import ConfigError, EnvironmentProblemError

_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?|[0-9A-Fa-f:.]*:[0-9A-Fa-f:.]*(%[A-Za-z0-9._-]+)?")
_PORTS = {"http": 80, "https": 443}
_FIX = "write host:port, http://host:port or https://host:port, as the service printed it"


@dataclass(frozen=True)
class Address:
    """A host and a port.

    Args:
        host: name or number; an IPv6 number without brackets.
        port: 1-65535.
        tls: whether the connection is encrypted.
    """

    host: str
    port: int
    tls: bool = False

    @classmethod
    def parse(cls, text: str, field: str, *, tls: bool = False) -> Self:
        """Read ``host:port``, ``http://host[:port]`` or ``https://host[:port]``.

        Args:
            text: what was given.
            field: what it was given as.
            tls: whether an address without a scheme is encrypted.

        Raises:
            ConfigError: it is none of them.
        """
        if not isinstance(text, str) or not text.strip():
            raise ConfigError(f"{field} = {text!r} names no host.", fix=_FIX)
        if "@" in text:
            raise ConfigError(f"{field} holds an '@', so it may hold a password.", fix=f"{_FIX}; give the key apart")
        scheme, marked, rest = text.rpartition("://")
        scheme = scheme.lower() if marked else ("https" if tls else "http")
        if problem := _problem(scheme, rest):
            raise ConfigError(f"{field} = {text!r}: {problem}.", fix=_FIX)
        parts = urlsplit(f"//{rest}")
        if parts.port is None and not marked:
            raise ConfigError(f"{field} = {text!r} names no port.", fix=_FIX)
        return cls(str(parts.hostname), parts.port or _PORTS[scheme], tls=scheme == "https")

    @property
    def url(self) -> str:
        """As HTTP writes it."""
        return f"{'https' if self.tls else 'http'}://{self.target(self.port)}"

    def target(self, port: int) -> str:
        """This host with a port, as gRPC writes it."""
        return f"{f'[{self.host}]' if ':' in self.host else self.host}:{port}"


def _problem(scheme: str, rest: str) -> str:
    if scheme not in _PORTS:
        return f"the scheme {scheme!r} is not http or https"
    if rest.partition("/")[0].count(":") > 1 and "[" not in rest:
        return "an IPv6 address stands in brackets, as in [::1]:8000"
    try:
        parts = urlsplit(f"//{rest}")
        port = parts.port
    except ValueError as error:
        return f"{str(error)[:1].lower()}{str(error)[1:]}"
    if not parts.hostname or not _HOST.fullmatch(parts.hostname):
        return "it names no host"
    if port == 0:
        return "a port is 1-65535"
    return _too_much(parts)


def _too_much(parts: SplitResult) -> str:
    more = parts.path.removeprefix("/") or parts.query or parts.fragment
    return f"{more!r} is too much: paths follow from the names of the calls" if more else ""


@dataclass(frozen=True)
class Trust:
    """Whose certificates are believed: the same over HTTP and over gRPC.

    Args:
        context: for HTTP.
        roots: for gRPC, PEM; None for gRPC's own.
    """

    context: ssl.SSLContext
    roots: bytes | None

    @classmethod
    def of(cls, ca_file: str | Path | None, address: Address) -> Self | None:
        """What to trust at an address; None where nothing is encrypted.

        Args:
            ca_file: its authorities, PEM; None for those of the system or of the environment's SSL_CERT_FILE.
            address: of the service.

        Raises:
            ConfigError: there is a file, and nothing is encrypted.
            EnvironmentProblemError: the file cannot be used.
        """
        if address.tls:
            return cls._loaded(ca_file)
        if ca_file is not None:
            raise ConfigError(
                f"ca_file = {str(ca_file)!r}, but {address.url} is not encrypted.",
                fix="write https://, or leave it out",
            )
        return None

    @classmethod
    def _loaded(cls, ca_file: str | Path | None) -> Self:
        file = ca_file or ssl.get_default_verify_paths().cafile
        try:
            context = ssl.create_default_context(cafile=str(ca_file) if ca_file else None)
            return cls(context, Path(file).read_bytes() if file else None)
        except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
            raise EnvironmentProblemError(
                f"ca_file = {str(file)!r} cannot be used: {error}.",
                fix="give a PEM file with the certificate of the authority that signed the service's",
            ) from error
