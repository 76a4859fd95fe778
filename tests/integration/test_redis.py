"""A real Redis as the online store: what is written is there, each served vector recomputes."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest

from deepseek_ray.cli import main
from deepseek_ray.data.feature_client import FeatureClient
from deepseek_ray.data.redis_store import PASSWORD_ENV
from deepseek_ray.errors import EnvironmentProblemError
from deepseek_ray.paths import RunPaths
from tests.integration.risk_process import Server, event, score
from tests.served_run import make_run
from tests.stores import Store, free_port, redis_server
from tests.unit.feature_worlds import world
from tests.unit.test_verify import serve, verify


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    with redis_server(tmp_path_factory.mktemp("redis")) as store:
        yield store


def opened(folder: Path, store: Store) -> FeatureClient:
    client = FeatureClient(RunPaths(folder), store.url)
    client.apply()
    return client


def test_what_is_not_there_is_none_and_an_equal_time_is_written(redis: Store, tmp_path: Path) -> None:
    client = opened(tmp_path, redis)
    client.write_states([("s/card/a", b"event", 5)])
    client.write_states([("s/card/a", b"label", 5), ("s/card/b", b"older", 9)])
    client.write_states([("s/card/b", b"warmed again", 7)])
    assert client.read_states(["s/card/b", "s/card/new", "s/card/a"]) == [b"warmed again", None, b"label"]
    client.close()
    assert client.read_states(["s/card/a"]) == [b"label"]
    client.close()


def test_runs_on_one_server_keep_apart(redis: Store, tmp_path: Path) -> None:
    one, two = opened(tmp_path / "one", redis), opened(tmp_path / "two", redis)
    one.write_states([("s/card/a", b"of one", 1)])
    two.write_states([("s/card/a", b"of two", 2)])
    assert one.read_states(["s/card/a"]) == [b"of one"]
    for client in (one, two):
        client.close()


@pytest.mark.parametrize("warmed", [0, 150])
def test_served_vectors_recompute_with_their_labels(redis: Store, tmp_path: Path, warmed: int) -> None:
    paths = RunPaths(tmp_path)
    serve(paths, world(220, seed=1, days=40), warmed=warmed, online_store=redis.url)
    result = verify(paths)
    assert (result.rows, result.num_differences) == (220 - warmed, 0)


@pytest.mark.slow
def test_a_password_comes_from_the_environment_and_stays_out_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "server").mkdir()
    for number, password in enumerate((secrets.token_urlsafe(24), "1234567890")):
        with redis_server(tmp_path / "server", password) as store:
            monkeypatch.setenv(PASSWORD_ENV, password)
            client = opened(tmp_path / str(number), store)
            client.write_states([("s/card/a", b"one", 1)])
            assert client.read_states(["s/card/a"]) == [b"one"]
            client.close()
            monkeypatch.delenv(PASSWORD_ENV)
            with pytest.raises(EnvironmentProblemError, match=f"127.0.0.1:{store.port}.*{PASSWORD_ENV}") as refused:
                client.read_states(["s/card/a"])
            client.close()
            assert password not in str(refused.value)
        written = [path for path in (tmp_path / str(number)).rglob("*") if path.is_file()]
        assert written
        assert [path for path in written if password.encode() in path.read_bytes()] == []


def test_a_server_that_is_away_is_named(tmp_path: Path) -> None:
    store = Store(f"redis://127.0.0.1:{(port := free_port())}", port)
    with pytest.raises(EnvironmentProblemError, match=f"redis://127.0.0.1:{port}"):
        opened(tmp_path, store).read_states(["s/card/a"])


@pytest.mark.timeout(400)
def test_the_service_serves_from_redis(redis: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path, customers=30, days=20, future_days=2, online_store=redis.url)
    setting = f"stores.online_store={redis.url}"
    for part in range(2):  # the second one starts from what the first one left in Redis
        server = Server(run, free_port(), setting)
        try:
            sent = ("transaction_id", "event_time", "card_id", "terminal_id", "amount_cents")
            for row in run.future.slice(20 * part, 20).select(sent).to_dicts():
                answer = score(server, row | {"event_time": row["event_time"].isoformat()})
                assert answer.status_code == 200, answer.text
                label = {"prediction_id": answer.json()["prediction_id"], "is_fraud": True}
                label["observed_at"] = row["event_time"].isoformat()
                assert server.client.post("/v1/risk/feedback", json=label).status_code == 200
            cold = score(server, event(card_id=f"never-seen-{part}"))
            assert cold.json()["cold"][0] == "card"
        finally:
            assert server.stop() == 0
    assert not (run.paths.feature_store / "online.db").exists()
    arguments = ["--set", setting, "--set", "data.label_delay_days=1", "--run", str(run.paths.root)]
    assert main(["verify", "features", *arguments]) == 0
    assert "0 differences in 42 predictions" in capsys.readouterr().out
