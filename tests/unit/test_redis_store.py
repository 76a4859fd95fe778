"""What a run writes down about its Redis."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from deepseek_ray.data.feature_client import FeatureClient
from deepseek_ray.data.redis_store import PASSWORD_ENV, address, address_of, reaching, settings
from deepseek_ray.errors import ConfigError
from deepseek_ray.paths import RunPaths


@pytest.fixture(autouse=True)
def no_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(PASSWORD_ENV, raising=False)


def test_redis_comes_by_one_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = settings("redis://cache:7000", tmp_path)["online_store"]
    assert plain["connection_string"] == "cache:7000,socket_timeout=5,socket_connect_timeout=5"
    monkeypatch.setenv(PASSWORD_ENV, "12345")
    full = settings("rediss://cache/2", tmp_path)["online_store"]["connection_string"]
    assert full.startswith("cache:6379,db=2,")
    assert full.endswith(f',ssl=true,password="${{{PASSWORD_ENV}}}"')


@pytest.mark.parametrize("url", ["redis://:secret@cache", "redis://me:secret@cache", "memcached://cache", "cache:1"])
def test_other_stores_and_logins_in_the_address_are_refused(url: str) -> None:
    with pytest.raises(ConfigError, match=r"stores\.online_store") as refused:
        address_of(url)
    assert "secret" not in str(refused.value)


def test_a_password_that_feast_would_cut_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PASSWORD_ENV, "half,other")
    with pytest.raises(ConfigError, match=PASSWORD_ENV) as refused:
        settings("redis://cache", tmp_path)
    assert "half" not in str(refused.value)


def test_the_address_is_the_same_from_both_sides(tmp_path: Path) -> None:
    for url in ("redis://cache:7000", "rediss://cache/2"):
        assert address(SimpleNamespace(**settings(url, tmp_path)["online_store"])) == address_of(url)
    assert address(SimpleNamespace(type="sqlite")) == ""


def test_each_run_has_keys_of_its_own_and_keeps_them(tmp_path: Path) -> None:
    projects = set()
    for name in ("one", "two", "one"):
        client = FeatureClient(RunPaths(tmp_path / name), "redis://127.0.0.1:1")
        client.apply()
        projects.add(yaml.safe_load((client.paths.feature_store / "feature_store.yaml").read_text())["project"])
        assert len(client.services()) == 4
    assert len(projects) == 2


def test_a_setting_that_is_not_the_runs_own_is_an_error(tmp_path: Path) -> None:
    FeatureClient(RunPaths(tmp_path)).apply()
    with pytest.raises(ConfigError, match="this run uses 'SQLite'"):
        FeatureClient(RunPaths(tmp_path), "redis://127.0.0.1:1").services()


def test_errors_of_others_pass() -> None:
    with pytest.raises(KeyError), reaching(SimpleNamespace(type="sqlite")):
        raise KeyError("ours")
