"""Where Ray's control server is told to keep what it knows; what happens when it dies is in test_serving_faults."""

from __future__ import annotations

import os
import socket

import pytest

from deepseek_ray.errors import ConfigError, EnvironmentProblemError
from serve_apps import head


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a job of a cluster that keeps its own state in Redis."""
    monkeypatch.setenv("RAY_REDIS_ADDRESS", "cluster:6379")
    monkeypatch.setenv("RAY_external_storage_namespace", "cluster")


def test_the_redis_of_the_cluster_around_it_is_left_alone() -> None:
    head.use("")
    assert "RAY_REDIS_ADDRESS" not in os.environ
    assert "RAY_external_storage_namespace" not in os.environ
    assert head.options() == {}


@pytest.mark.parametrize(
    ("store", "says"),
    [("memcached://cache", "not understood"), ("redis://:secret@cache", "password"), ("redis://cache/2", "database")],
)
def test_an_address_that_ray_cannot_use_is_refused(store: str, says: str) -> None:
    with pytest.raises(ConfigError, match=rf"stores\.gcs_store.*{says}") as refused:
        head.use(store)
    assert "secret" not in str(refused.value)


def test_a_redis_that_does_not_answer_is_said_before_anything_starts() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        with pytest.raises(EnvironmentProblemError, match=r"stores\.gcs_store = 'redis://127.* cannot be used"):
            head.use(f"redis://127.0.0.1:{silent.getsockname()[1]}")
    assert "RAY_REDIS_ADDRESS" not in os.environ
