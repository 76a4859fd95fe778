"""Keys of the file: made once, kept as digests, taken back without a restart."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from deepseek_ray.cli import main
from deepseek_ray.errors import ConfigError, EnvironmentProblemError
from deepseek_ray.serving.keys import add_key, digest, file_of, generate_key, read_keys, revoke_key


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "api_keys.json"


def test_the_file_holds_a_digest_and_nothing_of_the_key(file: Path) -> None:
    record, key = add_key(file, "gateway", "admin", days=1, rate_per_s=5)
    assert len(key) >= 32
    assert key not in file.read_text()
    assert read_keys(file) == [record]
    assert record.sha256 == digest(key.encode()).hex()
    assert record.expires == record.created + timedelta(days=1)
    assert file.stat().st_mode & 0o777 == 0o600


def test_a_key_is_revoked_by_id_or_by_a_name_that_it_has_alone(file: Path) -> None:
    first, _ = add_key(file, "shop")
    old, new = (add_key(file, "bank")[0] for _ in range(2))
    assert revoke_key(file, first.id) == first
    with pytest.raises(ConfigError, match=f"2 keys have.*{old.id}.*{new.id}"):  # the successor must not go too
        revoke_key(file, "bank")
    assert revoke_key(file, old.id) == old
    assert revoke_key(file, "bank") == new
    assert read_keys(file) == []
    with pytest.raises(ConfigError, match="'bank'"):
        revoke_key(file, "bank")


def test_an_expired_key_is_known_as_such(file: Path) -> None:
    record, _ = add_key(file, "short", days=0.5)
    now = datetime.now(UTC)
    assert not record.expired(now)
    assert record.expired(now + timedelta(days=1))


@pytest.mark.parametrize(
    "options", [{"days": 0}, {"days": float("nan")}, {"rate_per_s": -1}, {"rate_per_s": float("inf")}, {"days": 1e12}]
)
def test_impossible_keys_are_refused(file: Path, options: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        add_key(file, "odd", **options)
    with pytest.raises(ConfigError, match="name: String should have at least 1 character"):
        add_key(file, "")
    assert not file.exists()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"version": 2}', '{"keys": [{"id": "x"}]}', "\x00"])
def test_a_damaged_file_is_named_and_never_overwritten(file: Path, text: str) -> None:
    file.write_text(text)
    file.chmod(0o600)
    for use in (lambda: read_keys(file), lambda: add_key(file, "more")):
        with pytest.raises(EnvironmentProblemError, match=r"api_keys\.json"):
            use()
    assert file.read_text() == text


def test_a_file_that_others_may_write_is_refused(file: Path) -> None:
    add_key(file, "gateway")
    file.chmod(0o666)
    with pytest.raises(EnvironmentProblemError, match="chmod 600"):
        read_keys(file)


def test_no_file_is_no_keys_and_relative_names_are_seen_from_the_run(tmp_path: Path) -> None:
    assert read_keys(tmp_path / "none.json") == []
    assert file_of(tmp_path, "") == tmp_path / "api_keys.json"
    assert file_of(tmp_path, "secrets/keys.json") == tmp_path / "secrets" / "keys.json"
    assert file_of(tmp_path, "/etc/keys.json") == Path("/etc/keys.json")


def test_generated_keys_are_long_and_differ() -> None:
    first, second = generate_key(), generate_key()
    assert first != second
    assert len(first) >= 32


def test_the_commands_add_list_and_revoke(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = ["--run", str(tmp_path)]
    assert main(["keys", "add", "gateway", "--scope", "read", "--days", "90", "--rate", "50", *where]) == 0
    key = capsys.readouterr().out.partition("API key: ")[2].split()[0]
    record = read_keys(tmp_path / "api_keys.json")[0]
    assert digest(key.encode()).hex() == record.sha256
    assert main(["keys", "list", *where]) == 0
    shown = capsys.readouterr().out
    assert "gateway" in shown
    assert "read, 50 records/s" in shown
    assert main(["keys", "list", "--json", *where]) == 0
    listed = capsys.readouterr().out
    assert json.loads(listed)[0]["id"] == record.id
    assert record.sha256 not in listed + shown
    assert main(["keys", "revoke", "gateway", *where]) == 0
    assert read_keys(tmp_path / "api_keys.json") == []
    assert main(["keys", "revoke", "gateway", *where]) == 2
    assert main(["keys", "list", "--run", str(tmp_path / "nowhere")]) == 2
