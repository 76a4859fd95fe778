"""What breaks under the service while 50 requests a second come in, and what its clients see of it.

Nothing is lost: each request, repeated under its transaction id until it is answered, has exactly one prediction,
and each label that was answered 2xx is in the log once. The replica is the ingress: it listens itself, so whoever kills
the ingress kills the replica. The updater's faults are in test_updater_service and test_update_cycle.
"""

from __future__ import annotations

import os
import signal
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path

import polars as pl
import psutil
import pytest
import redis

from deepseek_ray.config import ModelConfig
from deepseek_ray.data.batch_engine import compute
from deepseek_ray.data.prediction_archive import read_predictions
from deepseek_ray.data.redis_store import PASSWORD_ENV
from deepseek_ray.data.windows import load
from deepseek_ray.registry import CHAMPION
from serve_apps.ingress import free_port
from tests import served_run
from tests.integration.risk_process import KEY, Server, event, score
from tests.integration.traffic import Traffic
from tests.served_run import DELAY_DAYS, SEQUENCE_LEN, ServedRun, add_version, make_run
from tests.stores import redis_server

SHAPE = ModelConfig(d_model=16, num_layers=1, num_heads=2, d_expert=16, num_bins=4)
LARGER = ModelConfig(d_model=32, num_layers=2, num_heads=4, num_experts=8, d_expert=32, num_bins=4)
FULL_AT = 1 << 16
PARTS = ("raylet/raylet", "ServeController", "ServeReplica")
pytestmark = [pytest.mark.timeout(400), pytest.mark.slow]


def traffic(server: Server) -> Traffic:
    return Traffic(server.port, KEY)


def check_nothing_lost(sent: Traffic, run: ServedRun) -> None:
    """Each transaction one prediction, in the log once; each accepted label on disk once."""
    assert sent.refused == []
    assert len(sent.predictions) > 50
    assert {len(ids) for ids in sent.predictions.values()} == {1}
    logged = read_predictions(run.paths)
    assert logged["transaction_id"].n_unique() == logged["prediction_id"].n_unique() == len(logged)
    held = dict(zip(logged["transaction_id"], logged["prediction_id"], strict=True))
    assert {name: {held[name]} for name in sent.predictions} == dict(sent.predictions)
    with closing(sqlite3.connect(run.paths.prediction_log)) as log:
        labels = [row[0] for row in log.execute("SELECT prediction_id FROM feedback")]
    assert len(labels) == len(set(labels))
    assert sent.labelled <= set(labels)


def wait_for(condition: Callable[[], bool], timeout_s: float = 60) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "not in time"
        time.sleep(0.1)


def metric(server: Server, name: str) -> float:
    for line in server.client.get("/metrics").text.splitlines():
        if line.startswith(name):
            return float(line.rpartition(" ")[2])
    raise AssertionError(f"no metric {name}")


def processes(server: Server, title: str) -> list[psutil.Process]:
    children = psutil.Process(server.process.pid).children(recursive=True)
    return [
        child
        for child in children
        if child.status() != psutil.STATUS_ZOMBIE and any(title in part for part in child.cmdline())
    ]


def process(server: Server, title: str) -> psutil.Process:
    return processes(server, title)[0]


def promote_shape(run: ServedRun, shape: ModelConfig, seed: int) -> str:
    spec = load().vector("default")
    features = compute(run.history, spec, label_delay_days=DELAY_DAYS, sequence_len=SEQUENCE_LEN)
    return add_version(run, spec, features, shape, seed=seed)


def serving_version(server: Server) -> str:
    return str(server.client.get("/v1/risk/model").json()["model_version"])


def test_a_killed_replica_which_is_the_ingress(server: Server) -> None:
    with traffic(server).running() as sent:
        time.sleep(2)
        server.replica().kill()
        time.sleep(1)
        server.wait_ready()
        time.sleep(2)
    check_nothing_lost(sent, server.run)
    assert sent.retried, "the kill went unnoticed"


def test_a_killed_controller_costs_no_request_and_is_back_for_the_next_fault(server: Server) -> None:
    with traffic(server).running() as sent:
        time.sleep(1)
        controller = process(server, "ServeController")
        controller.kill()
        time.sleep(8)
    check_nothing_lost(sent, server.run)
    assert not sent.retried
    wait_for(lambda: process(server, "ServeController").pid != controller.pid)
    time.sleep(5)
    server.replica().kill()
    time.sleep(1)
    server.wait_ready()


def test_a_killed_gcs_is_started_again_and_finds_its_state_in_redis(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(PASSWORD_ENV, "a-password-of-redis")
    (tmp_path / "redis").mkdir()
    with redis_server(tmp_path / "redis", "a-password-of-redis") as store:
        run = make_run(tmp_path / "run")
        server = Server(run, free_port(), f"stores.gcs_store={store.url}")
        try:
            before = [process(server, title).pid for title in PARTS]
            with traffic(server).running() as sent:
                time.sleep(2)
                gcs = process(server, "gcs_server")
                gcs.kill()
                gcs.wait(10)
                wait_for(lambda: [one.pid for one in processes(server, "gcs_server")] not in ([], [gcs.pid]))
                time.sleep(10)
                version = promote_shape(run, SHAPE, seed=3)
                wait_for(lambda: serving_version(server) == version)
            assert [process(server, title).pid for title in PARTS] == before, "they went on all the while"
            with traffic(server).running() as later:  # Serve's controller is told of a death, and starts the next one
                server.replica().kill()
                time.sleep(1)
                server.wait_ready()
        finally:
            stopped = server.stop()
        left = redis.Redis.from_url(store.url, password=store.password).dbsize()
    for one in (sent, later):
        check_nothing_lost(one, run)
    assert (dict(sent.retried), stopped, left) == ({}, 0, 0)
    assert "was started again" in "".join(server.output)


def test_a_killed_gcs_without_redis_ends_the_service_with_a_word(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    first = Server(run, free_port())
    with traffic(first).running() as sent:
        time.sleep(2)
        process(first, "gcs_server").kill()
        assert first.process.wait(30) == 2
        second = Server(run, first.port)  # as whoever supervises it would
        time.sleep(2)
    assert (first.stop(), second.stop()) == (2, 0)
    check_nothing_lost(sent, run)
    assert "Ray's control server (GCS) has ended with status -9" in "".join(first.output)


def test_a_champion_of_another_shape_takes_over_without_a_lost_request(server: Server) -> None:
    """An architecture comes with its version: more layers, experts and widths need no new process."""
    before, replica = serving_version(server), server.replica().pid
    with traffic(server).running() as sent:
        time.sleep(1)
        version = promote_shape(server.run, LARGER, seed=7)
        wait_for(lambda: serving_version(server) == version)
        time.sleep(2)
    check_nothing_lost(sent, server.run)
    assert (dict(sent.retried), server.replica().pid) == ({}, replica)
    logged = read_predictions(server.run.paths).filter(pl.col("transaction_id").is_in(list(sent.predictions)))
    served = logged.sort("order_us")["model_version"].to_list()
    assert served == sorted(served, key=[before, version].index), "no batch went back to the old one"
    assert served[-50:] == [version] * 50


def test_a_locked_registry_costs_no_request(server: Server) -> None:
    with traffic(server).running() as sent, closing(sqlite3.connect(server.run.paths.root / "mlflow.db")) as other:
        other.execute("BEGIN EXCLUSIVE")
        time.sleep(5)
        other.rollback()
        time.sleep(1)
    check_nothing_lost(sent, server.run)
    assert not sent.retried


def test_a_corrupt_version_is_refused_and_the_last_good_one_stays(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = server.run
    monkeypatch.setattr(served_run, "promote", lambda registry, version: None)
    version = promote_shape(run, SHAPE, seed=2)
    weights = Path(run.registry.get(version).path) / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    good = serving_version(server)
    with traffic(server).running() as sent:
        point_champion_to(run, version)
        wait_for(lambda: server.client.get("/v1/risk/model").json()["refused"] != "")
        time.sleep(2)
        described = server.client.get("/v1/risk/model").json()
        point_champion_to(run, good)
        wait_for(lambda: server.client.get("/v1/risk/model").json()["refused"] == "")
    assert described["model_version"] == good
    assert "SHA-256" in described["refused"]
    assert metric(server, 'deepseek_ray_model_swaps_total{outcome="refused"}') == 1
    check_nothing_lost(sent, run)
    assert not sent.retried


def point_champion_to(run: ServedRun, version: str) -> None:
    """By hand and past the gate, as a broken deployment would."""
    with run.registry.tracking.guard(write=True) as client:
        client.set_registered_model_alias("risk", CHAMPION, version)


def test_a_locked_feature_store_costs_no_request_and_no_event(server: Server) -> None:
    store = server.run.paths.feature_store / "online.db"
    with traffic(server).running() as sent, closing(sqlite3.connect(store)) as other:
        other.execute("BEGIN IMMEDIATE")
        time.sleep(12)
        other.rollback()
        wait_for(lambda: metric(server, "deepseek_ray_state_write_failures") == 0)
    check_nothing_lost(sent, server.run)
    seen = score(server, event(card_id="x7", terminal_id="y7")).json()
    assert (seen["cold"], seen["degraded"]) == ([], False)


def test_a_full_disk_pushes_back_and_drops_nothing(server: Server) -> None:
    replica = server.replica()
    with traffic(server).running() as sent:
        time.sleep(1)
        replica.rlimit(psutil.RLIMIT_FSIZE, (FULL_AT, -1))  # the log beside the database passes that at once
        try:
            wait_for(lambda: sent.retried["503"] > 20)
            assert server.client.get("/readyz").status_code == 503
            assert metric(server, "deepseek_ray_log_write_failures") == 1
        finally:
            replica.rlimit(psutil.RLIMIT_FSIZE, (-1, -1))
        wait_for(lambda: server.client.get("/readyz").status_code == 200)
        wait_for(lambda: metric(server, "deepseek_ray_state_write_failures") == 0)  # its disk was full too
    check_nothing_lost(sent, server.run)
    assert metric(server, "deepseek_ray_log_write_failures") == 0


def test_clients_whose_clocks_differ(server: Server) -> None:
    """A clock ahead of its card's other clients makes theirs stale: said by 409, and no feature is wrong for it."""
    ahead = (datetime.now(UTC) + timedelta(minutes=4)).isoformat()
    with traffic(server).running() as sent:
        time.sleep(2)
        assert score(server, event(card_id="two-clocks", event_time=ahead)).status_code == 200
        behind = score(server, event(card_id="two-clocks"))
        too_far = score(
            server, event(card_id="other", event_time=(datetime.now(UTC) + timedelta(minutes=6)).isoformat())
        )
        assert score(server, event(card_id="two-clocks", event_time=ahead)).json()["cold"] == []
    assert (behind.status_code, behind.json()["type"]) == (409, "urn:deepseek-ray:problem:stale-event")
    assert (too_far.status_code, too_far.json()["field"]) == (422, "event_time")
    check_nothing_lost(sent, server.run)


def test_without_redis_scores_are_degraded_bounded_and_made_good(tmp_path: Path) -> None:
    (tmp_path / "redis").mkdir()
    with redis_server(tmp_path / "redis") as store:
        run = make_run(tmp_path / "run", online_store=store.url)
        server = Server(run, free_port(), f"stores.online_store={store.url}")
        try:
            redis = listener_on(store.port)
            with traffic(server).running() as sent:
                time.sleep(2)
                os.kill(redis, signal.SIGSTOP)
                time.sleep(15)
                os.kill(redis, signal.SIGCONT)
                wait_for(lambda: metric(server, "deepseek_ray_state_write_failures") == 0)
            fresh = score(server, event(card_id="x3", terminal_id="y3")).json()
        finally:
            stopped = server.stop()
    check_nothing_lost(sent, run)
    assert max(sent.latencies_s) < 8, "one time-out of Redis is 5 s"
    assert (fresh["degraded"], fresh["cold"], stopped) == (False, [], 0)


def listener_on(port: int) -> int:
    """Process id of the server on a port."""
    found = (c for c in psutil.net_connections("tcp") if c.laddr.port == port and c.status == psutil.CONN_LISTEN)
    pid = next(found).pid
    assert pid is not None
    return pid
