"""The service put together from a run folder, without Ray: real store, log and registry."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import psutil
import pytest

from deepseek_ray.cli import main
from deepseek_ray.config import Config, ModelConfig, ServingConfig
from deepseek_ray.data.batch_engine import compute
from deepseek_ray.data.feature_client import FeatureClient
from deepseek_ray.data.prediction_archive import read_predictions
from deepseek_ray.data.prediction_log import PredictionLog
from deepseek_ray.data.verify import verify_run
from deepseek_ray.data.windows import load
from deepseek_ray.errors import EnvironmentProblemError, RegistryUnavailableError
from deepseek_ray.paths import RunPaths
from deepseek_ray.registry import Registry
from deepseek_ray.serving import drift_watch
from deepseek_ray.serving import service as service_module
from deepseek_ray.serving.follower import Reopening
from deepseek_ray.serving.service import REHEARSAL, RiskService, open_app
from tests.served_run import DELAY_DAYS, SEQUENCE_LEN, ServedRun, add_version, make_run, register_version
from tests.stores import redis_server
from tests.unit.test_prediction_log import row

KEY = "a-key-for-the-tests"


@pytest.fixture
def run(tmp_path: Path) -> ServedRun:
    return make_run(tmp_path, customers=30, days=20, future_days=2)


def make_service(run: ServedRun, registry: Registry | Callable[[], Registry]) -> RiskService:
    store = FeatureClient(run.paths)
    return RiskService(run.paths, registry, store, store.declaration(), ServingConfig(compact_every_s=0.1), KEY)


@pytest.fixture
def service(run: ServedRun) -> Iterator[RiskService]:
    made = make_service(run, run.registry)
    yield made
    made.close()


def test_the_rehearsal_before_the_first_request_leaves_no_trace(service: RiskService, tmp_path: Path) -> None:
    assert read_predictions(RunPaths(tmp_path)).height == 0
    assert service.log.by_transaction([REHEARSAL.transaction_id]) == {}
    assert service.features.last_event_us([REHEARSAL.card_id]) == {}
    assert service.features.peek(REHEARSAL).cold == ["card", "terminal", "device"]


def test_the_log_is_compacted_without_being_asked(service: RiskService, tmp_path: Path) -> None:
    service.log.commit([row(1), row(2)])
    service.start()
    give_up = time.monotonic() + 60
    while service.predictor.archived < 2:
        assert time.monotonic() < give_up
        time.sleep(0.05)
    service.predictor.settle()
    assert [served.values.size for name in ("p1", "p2") if (served := service.log.get(name))] == [0, 0]
    assert read_predictions(RunPaths(tmp_path))["prediction_id"].to_list() == ["p1", "p2"]


def test_one_service_at_a_time_has_a_run(service: RiskService, run: ServedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service_module, "PREDECESSOR_S", 0.1)
    with pytest.raises(EnvironmentProblemError, match=r"Another service has the run .*--run"):
        make_service(run, run.registry)
    service.close()
    with monkeypatch.context() as patch:
        patch.setattr(service_module, "warm_up", _fails)
        with pytest.raises(RuntimeError, match="cannot warm up"):
            make_service(run, run.registry)
    make_service(run, run.registry).close()  # neither a service that has closed nor one that failed keeps it


def _fails(*_: object) -> None:
    raise RuntimeError("cannot warm up")


async def scored(service: RiskService, events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Answers to events, and last what the replica says of itself."""
    transport = httpx.ASGITransport(app=service.app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test", headers={"X-API-Key": KEY}) as client:
        answers = [await client.post("/v1/risk/score", json=event) for event in events]
        assert [answer.status_code for answer in answers] == [200] * len(events)
        return [answer.json() for answer in [*answers, await client.get("/v1/risk/model")]]


def events(first: int, count: int = 40) -> list[dict[str, Any]]:
    fixed = {"event_time": datetime.now(UTC).isoformat(), "terminal_id": "m1", "amount_cents": 900}
    return [{"transaction_id": f"x{first + n}", "card_id": f"k{n}", **fixed} for n in range(count)]


def test_traffic_is_set_shown_and_taken_back_without_a_restart(
    service: RiskService, run: ServedRun, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = load().vector("default")
    features = compute(run.history, spec, label_delay_days=DELAY_DAYS, sequence_len=SEQUENCE_LEN)
    register_version(run, spec, features, ModelConfig(d_model=16, num_layers=1, num_heads=2, d_expert=16, num_bins=4))
    traffic = ["--run", str(run.paths.root), "--note", "a trial"]
    assert main(["traffic", "set", "canary@2=50", "--shadow", "2", *traffic]) == 0
    service.watcher.check()
    *answers, model = asyncio.run(scored(service, events(0)))
    first = {answer["transaction_id"]: answer["model_version"] for answer in answers}
    assert set(first.values()) == {"1", "2"}
    assert (model["model_version"], model["shadow_version"], model["fallback"]) == ("1", "2", "")
    assert [(arm["arm"], arm["model_version"], arm["percent"]) for arm in model["arms"]] == [("canary", "2", 50.0)]
    service.rollout.tick()
    assert service.rollout.report["canary"]["decisions"] == list(first.values()).count("2")
    assert main(["traffic", "rollback", *traffic]) == 0
    service.watcher.check()
    *answers, model = asyncio.run(scored(service, events(100)))
    assert ({answer["model_version"] for answer in answers}, model["arms"]) == ({"1"}, [])
    service.shadow.close()
    capsys.readouterr()
    assert main(["traffic", "show", *traffic[:2]]) == 0
    assert main(["registry", "history", *traffic[:2]]) == 0
    shown = capsys.readouterr().out
    assert "80 scored" in shown
    assert shown.count("canary (version 2) 50 %, shadow (version 2) -> champion 100 %, shadow (version 2)  by ") == 2


@pytest.mark.slow
def test_with_the_registry_away_the_last_good_version_starts_and_follows_it_again(run: ServedRun) -> None:
    first = make_service(run, lambda: Registry.open(run.paths))
    first.watcher.check()
    first.close()
    database = run.paths.root / "mlflow.db"
    database.rename(database.with_suffix(".away"))
    second = make_service(run, Reopening(lambda: Registry.open(run.paths, create=False)))
    *answers, model = asyncio.run(scored(second, events(200, 3)))
    assert {answer["model_version"] for answer in answers} == {"1"}
    assert "does not exist" in model["fallback"]
    assert second.monitor.registry.get_sample_value("deepseek_ray_last_good_serves") == 1
    with pytest.raises(RegistryUnavailableError):
        second.watcher.check()
    database.with_suffix(".away").rename(database)
    second.watcher.check()
    assert asyncio.run(scored(second, []))[-1]["fallback"] == ""
    second.close()


@pytest.mark.slow
def test_with_the_feature_store_away_a_service_starts_degraded_and_catches_up(tmp_path: Path) -> None:
    (tmp_path / "redis").mkdir()
    with redis_server(tmp_path / "redis") as redis:
        run = make_run(tmp_path / "run", customers=30, days=20, future_days=2, online_store=redis.url)

        def start() -> RiskService:
            store = FeatureClient(run.paths, redis.url)
            serving = ServingConfig(compact_every_s=0)
            return RiskService(
                run.paths, run.registry, store, store.declaration(), serving, KEY, online_store=redis.url
            )

        (server,) = (child for child in psutil.Process().children() if child.name().startswith("redis"))
        server.suspend()
        with pytest.raises(EnvironmentProblemError, match=r"stores\.online_store"):
            start()  # it has never served: the setting is wrong, for all that is known
        server.resume()
        first = start()
        asyncio.run(scored(first, events(0, 5)))
        first.close()
        server.suspend()
        second = start()
        blind, _ = asyncio.run(scored(second, events(10, 1)))
        assert (blind["degraded"], blind["cold"]) == (True, [])
        server.resume()
        time.sleep(1.1)  # it is asked again a second later
        seen, _ = asyncio.run(scored(second, events(11, 1)))
        assert (seen["degraded"], seen["cold"], second.features.behind) == (False, [], False)
        second.close()
    assert differences(run, "default") == (6, 0)


def promote_vector(run: ServedRun, vector: str) -> str:
    """Make a version champion that reads another vector, of another shape too."""
    spec = load().vector(vector)
    features = compute(run.history, spec, label_delay_days=DELAY_DAYS, sequence_len=SEQUENCE_LEN)
    shape = ModelConfig(d_model=8, num_layers=1, num_heads=1, num_experts=4, d_expert=8, num_bins=4)
    return add_version(run, spec, features, shape, seed=5)


def differences(run: ServedRun, vector: str) -> tuple[int, int]:
    """Served vectors compared with the point-in-time join, and numbers that differ."""
    found = verify_run(run.paths, vector, label_delay_days=DELAY_DAYS, sequence_len=SEQUENCE_LEN)
    return found.rows, found.num_differences


@pytest.mark.slow
def test_a_champion_that_reads_another_vector_takes_over_without_a_failed_request(run: ServedRun) -> None:
    service = make_service(run, run.registry)
    asyncio.run(scored(service, events(0)))
    version = promote_vector(run, "wide")
    waits: list[float] = []
    versions: list[str] = []

    async def story() -> None:
        done = asyncio.create_task(asyncio.to_thread(service.watcher.check))
        while not done.done() or not waits:
            start = time.perf_counter()
            *answers, _ = await scored(service, events(1_000 + len(waits), 1))
            waits.append(time.perf_counter() - start)
            versions.append(answers[0]["model_version"])
        await done

    asyncio.run(story())
    *answers, model = asyncio.run(scored(service, events(50_000)))
    service.close()
    assert set(versions) == {"1"} or versions == sorted(versions)
    assert {answer["model_version"] for answer in answers} == {version}
    assert (model["refused"], model["feature_service"]) == ("", load().vector("wide").service)
    slowest, usual = 1e3 * max(waits), 1e3 * median(waits)
    print(f"{len(waits)} requests during the handover: slowest {slowest:.0f} ms, median {usual:.0f} ms")
    assert max(waits) < 2
    assert differences(run, "default")[1] == 0
    rows, wrong = differences(run, "wide")
    assert rows >= 40
    assert wrong == 0


@pytest.mark.slow
def test_a_start_with_another_vector_takes_over_all_that_was_served(run: ServedRun) -> None:
    first = make_service(run, run.registry)
    asyncio.run(scored(first, events(0)))
    first.close()
    version = promote_vector(run, "wide")
    second = make_service(run, run.registry)
    *answers, model = asyncio.run(scored(second, events(500)))
    second.close()
    assert ({answer["model_version"] for answer in answers}, model["model_version"]) == ({version}, version)
    assert all("card" not in answer["cold"] for answer in answers)
    assert differences(run, "wide") == (40, 0)


@pytest.mark.slow
def test_drift_is_reported_without_being_asked(run: ServedRun, caplog: pytest.LogCaptureFixture) -> None:
    """The run holds no training rows: that the report says so shows that it was made, and from these settings."""
    with closing(PredictionLog(run.paths.prediction_log)) as log:
        log.commit([row(1), row(2)])
    settings = Config(serving=ServingConfig(drift_every_s=0.1)).model_dump()
    drift_watch.logger.addHandler(caplog.handler)
    app = open_app(str(run.paths.root), settings, KEY)
    try:
        give_up = time.monotonic() + 60
        while "the report on drift failed, trying again in 0.1 s: error: Version 1 was trained on" not in caplog.text:
            assert time.monotonic() < give_up
            time.sleep(0.05)
    finally:
        drift_watch.logger.removeHandler(caplog.handler)
        app._service.shutdown()
