"""A key opens the service in three spellings, as far as its scope and rate go; nothing else does."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest

from deepseek_ray.errors import EnvironmentProblemError, OverloadedError, RequestError
from deepseek_ray.serving.auth import Keyring, load_key
from deepseek_ray.serving.keys import add_key, hashed, revoke_key

KEY = "sixteen-chars-or-more"
Headers = list[tuple[bytes, bytes]]


class Clock:
    """Both clocks of a keyring, set by hand."""

    def __init__(self) -> None:
        self.s = 1_000.0

    def __call__(self) -> float:
        return self.s


def ring(file: Path, **options: float) -> tuple[Keyring, Clock]:
    clock = Clock()
    return Keyring(KEY, file, clock_s=clock, **options), clock


def carrying(key: str) -> Headers:
    return [(b"host", b"x"), (b"x-api-key", key.encode())]


def refusal(keys: Keyring, headers: Headers, scope: str = "read") -> tuple[int, str]:
    with pytest.raises(RequestError) as caught:
        keys.check(headers, scope)  # type: ignore[arg-type]
    assert KEY not in str(caught.value)
    return caught.value.status, caught.value.kind


@pytest.mark.parametrize(
    "header",
    [
        (b"x-api-key", KEY.encode()),
        (b"authorization", f"Bearer {KEY}".encode()),
        (b"authorization", f"bearer {KEY}".encode()),
        (b"authorization", b"Basic " + base64.b64encode(f"anyone:{KEY}".encode())),
    ],
)
def test_the_environments_key_may_do_everything(header: tuple[bytes, bytes]) -> None:
    Keyring(KEY).check([(b"host", b"x"), header], "admin")


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
def test_any_other_is_refused_with_401(headers: Headers, kind: str) -> None:
    assert refusal(Keyring(KEY), headers) == (401, kind)


def test_the_object_does_not_hold_the_key() -> None:
    assert KEY not in repr(vars(Keyring(KEY)))


def test_a_hashed_key_opens_to_the_key_and_not_to_itself() -> None:
    keys = Keyring(hashed(KEY))
    keys.check([(b"x-api-key", KEY.encode())], "admin")
    assert refusal(keys, [(b"x-api-key", hashed(KEY).encode())]) == (401, "wrong-api-key")
    assert hashed("") == ""


def test_scopes_contain_each_other(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    made = {scope: add_key(file, scope, scope)[1] for scope in ("read", "write", "admin")}  # type: ignore[arg-type]
    keys, _ = ring(file)
    for has, key in made.items():
        for needs in made:
            if list(made).index(has) >= list(made).index(needs):
                keys.check(carrying(key), needs)  # type: ignore[arg-type]
            else:
                assert refusal(keys, carrying(key), needs) == (403, "scope-too-small")


def test_keys_come_and_go_without_a_restart(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    keys, clock = ring(file)
    keys.check(carrying(KEY))
    record, key = add_key(file, "late")
    assert refusal(keys, carrying(key)) == (401, "wrong-api-key")
    clock.s += 1
    keys.check(carrying(key))
    revoke_key(file, record.id)
    clock.s += 1
    assert refusal(keys, carrying(key)) == (401, "wrong-api-key")
    keys.check(carrying(KEY))


def test_an_expired_key_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    record, key = add_key(file, "short", days=1)
    assert record.expires is not None
    end_s = record.expires.timestamp()
    for now_s, wanted in ((end_s - 1, None), (end_s, (401, "expired-api-key"))):
        keys = Keyring(KEY, file, now_s=lambda now_s=now_s: now_s)
        if wanted is None:
            keys.check(carrying(key))
        else:
            assert refusal(keys, carrying(key)) == wanted


def test_a_file_that_is_damaged_while_serving_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr("deepseek_ray.serving.auth.logger.error", lambda text, *_: said.append(text))
    file = tmp_path / "keys.json"
    _, key = add_key(file, "gateway")
    keys, clock = ring(file)
    file.write_text("{")
    for _ in range(2):
        clock.s += 1
        keys.check(carrying(key))
    assert len(said) == 1
    with pytest.raises(EnvironmentProblemError, match="damaged"):
        Keyring(KEY, file)


def test_a_rate_is_kept_by_key_and_not_renewed_by_the_file(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    _, slow = add_key(file, "slow", rate_per_s=10)
    keys, clock = ring(file, rate=1_000.0, burst_s=1.0)
    for _ in range(10):
        keys.check(carrying(slow))
    with pytest.raises(OverloadedError, match="10 records a second") as caught:
        keys.check(carrying(slow))
    assert (caught.value.kind, caught.value.retry_after_s) == ("rate-limited", pytest.approx(0.1))
    keys.check(carrying(KEY))
    add_key(file, "other")
    clock.s += 1.0  # refills ten, and the file is read again
    for _ in range(10):
        keys.check(carrying(slow))
    with pytest.raises(OverloadedError):
        keys.check(carrying(slow))


def test_no_key_no_service(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(EnvironmentProblemError, match="--generate-key"):
        load_key("DEEPSEEK_RAY_API_KEY")
    with pytest.raises(EnvironmentProblemError, match="keys add"):
        Keyring("", tmp_path / "none.json")
    monkeypatch.setenv("DEEPSEEK_RAY_API_KEY", "short")
    with pytest.raises(EnvironmentProblemError, match="5 characters"):
        load_key("DEEPSEEK_RAY_API_KEY")
    monkeypatch.setenv("DEEPSEEK_RAY_API_KEY", f" {KEY}\n")
    assert load_key("DEEPSEEK_RAY_API_KEY") == KEY


def test_a_file_of_keys_is_enough(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    _, key = add_key(file, "gateway")
    assert load_key("DEEPSEEK_RAY_API_KEY", file) == ""
    Keyring("", file).check(carrying(key))
