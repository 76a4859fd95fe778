"""Addresses as users write them: what is meant is taken, what is odd is named with the fix."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from deepseek_ray.address import Address, Trust
from deepseek_ray.client import Client, RiskClient
from deepseek_ray.errors import ConfigError, EnvironmentProblemError
from tests.certificate import make_certificate

KEY = "a-key-for-the-tests-only"


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("127.0.0.1:8000", "http://127.0.0.1:8000"),
        ("http://svc", "http://svc:80"),
        ("HTTP://svc:81/", "http://svc:81"),
        ("https://my_svc.local", "https://my_svc.local:443"),
        ("https://[::1]:8000", "https://[::1]:8000"),
        ("[fe80::1%eth0]:1", "http://[fe80::1%eth0]:1"),
    ],
)
def test_what_is_meant_is_taken(text: str, url: str) -> None:
    assert Address.parse(text, "address").url == url
    assert Address.parse(text, "address").tls == url.startswith("https")


def test_a_port_of_its_own_goes_with_the_same_host() -> None:
    assert Address.parse("[::1]:8000", "address").target(9000) == "[::1]:9000"
    assert Address.parse("svc:1", "address", tls=True).url == "https://svc:1"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "names no host"),
        ("  ", "names no host"),
        (None, "names no host"),
        ("host", "names no port"),
        ("http://host:1/x", "'x' is too much"),
        ("host:1?a=b", "'a=b' is too much"),
        ("host:0", "a port is 1-65535"),
        ("host:65536", "port out of range 0-65535"),
        ("host:-1", "port"),
        ("host:abc", "port could not be cast"),
        (":8000", "it names no host"),
        ("a b:1", "it names no host"),
        ("::1:8000", "stands in brackets"),
        ("[::1:8000", "invalid IPv6 URL"),
        ("grpc://host:1", "the scheme 'grpc' is not"),
        ("http://http://host:1", "the scheme 'http://http' is not"),
    ],
)
def test_an_odd_address_is_named_with_the_fix(text: Any, why: str) -> None:
    with pytest.raises(ConfigError, match=why) as odd:
        Client(text, api_key=KEY)
    assert odd.value.message.startswith("address = ")
    assert repr(text) in odd.value.message
    assert "write host:port" in odd.value.fix
    with pytest.raises(ConfigError, match="base_url"):
        RiskClient(text, api_key=KEY)


def test_a_password_in_an_address_is_not_repeated() -> None:
    with pytest.raises(ConfigError) as odd:
        Client("http://me:secret@host:1", api_key=KEY)
    assert "secret" not in str(odd.value)


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 0, -1, 601, "1", None, True])
@pytest.mark.parametrize("field", ["timeout_s", "connect_timeout_s"])
def test_what_is_no_time_is_named_with_the_fix(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"{field} = .* is no time.*above 0 and at most 600"):
        Client("127.0.0.1:1", api_key=KEY, **{field: value})
    with pytest.raises(ConfigError, match="timeout_s"):
        RiskClient("http://127.0.0.1:1", api_key=KEY, timeout_s=value)
    if value is not None:
        with pytest.raises(ConfigError, match="timeout_s"):  # before anything is sent
            Client("127.0.0.1:1", api_key=KEY).call("risk.model", timeout_s=value)


@pytest.mark.parametrize("value", [-1, 0.5, None])
def test_retries_are_counted(value: Any) -> None:
    with pytest.raises(ConfigError, match="retries = "):
        Client("127.0.0.1:1", api_key=KEY, retries=value)


@pytest.mark.parametrize("key", ["the-key\n", " the-key", "the-ké"])
def test_a_key_that_no_header_may_hold_is_refused_and_not_shown(key: str) -> None:
    with pytest.raises(EnvironmentProblemError, match="key alone") as odd:
        Client("127.0.0.1:1", api_key=key)
    assert "the-k" not in str(odd.value)


def test_a_file_without_an_authority_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for content in (None, b"", b"no certificate"):
        file = tmp_path / "ca.pem"
        if content is not None:
            file.write_bytes(content)
        with pytest.raises(EnvironmentProblemError, match=r"ca_file = .*ca\.pem.*PEM file"):
            Client("127.0.0.1:1", api_key=KEY, ca_file=file)
    with pytest.raises(ConfigError, match=r"is not encrypted.*write https"):
        Client("http://127.0.0.1:1", api_key=KEY, ca_file=file)
    cert, _ = make_certificate(tmp_path)
    address = Address("svc", 1, tls=True)
    trusts = [Trust.of(cert, address)]
    monkeypatch.setenv("SSL_CERT_FILE", str(cert))
    trusts.append(Trust.of(None, address))
    assert [trust and trust.roots for trust in trusts] == [cert.read_bytes()] * 2
    assert Trust.of(None, Address("svc", 1)) is None
