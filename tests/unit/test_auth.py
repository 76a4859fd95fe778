"""A key opens the service in three spellings; nothing else does."""

from __future__ import annotations

import base64

import pytest

from deepseek_ray.errors import EnvironmentProblemError, RequestError
from deepseek_ray.serving.auth import ApiKey, generate_key, load_key

KEY = "sixteen-chars-or-more"


@pytest.mark.parametrize(
    "header",
    [
        (b"x-api-key", KEY.encode()),
        (b"authorization", f"Bearer {KEY}".encode()),
        (b"authorization", f"bearer {KEY}".encode()),
        (b"authorization", b"Basic " + base64.b64encode(f"anyone:{KEY}".encode())),
    ],
)
def test_the_right_key_passes(header: tuple[bytes, bytes]) -> None:
    ApiKey(KEY).check([(b"host", b"x"), header])


@pytest.mark.parametrize(
    ("headers", "kind"),
    [
        ([], "missing-api-key"),
        ([(b"authorization", b"Digest abc")], "missing-api-key"),
        ([(b"authorization", b"Basic !!!")], "missing-api-key"),
        ([(b"x-api-key", b"")], "wrong-api-key"),
        ([(b"x-api-key", KEY[:-1].encode())], "wrong-api-key"),
        ([(b"authorization", b"Bearer \xff\xfe")], "wrong-api-key"),
    ],
)
def test_any_other_is_refused_with_401(headers: list[tuple[bytes, bytes]], kind: str) -> None:
    with pytest.raises(RequestError) as caught:
        ApiKey(KEY).check(headers)
    assert (caught.value.status, caught.value.kind) == (401, kind)
    assert KEY not in str(caught.value)


def test_the_object_does_not_hold_the_key() -> None:
    assert KEY not in repr(vars(ApiKey(KEY)))


def test_no_key_no_service(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EnvironmentProblemError, match="--generate-key"):
        load_key("DEEPSEEK_RAY_API_KEY")
    monkeypatch.setenv("DEEPSEEK_RAY_API_KEY", "short")
    with pytest.raises(EnvironmentProblemError, match="5 characters"):
        load_key("DEEPSEEK_RAY_API_KEY")
    monkeypatch.setenv("DEEPSEEK_RAY_API_KEY", f" {KEY}\n")
    assert load_key("DEEPSEEK_RAY_API_KEY") == KEY


def test_generated_keys_are_long_and_differ() -> None:
    first, second = generate_key(), generate_key()
    assert first != second
    assert len(first) >= 32
