"""An update goes live through shadow and canary, or is taken back, and every label counts once in what serves."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import polars as pl
import pytest
import torch

from deepseek_ray.cli import main
from deepseek_ray.config import Config, ServingConfig, build_config
from deepseek_ray.data.batch_engine import compute
from deepseek_ray.data.datasets import RiskDataset
from deepseek_ray.data.feature_client import FeatureClient
from deepseek_ray.data.windows import load
from deepseek_ray.errors import EnvironmentProblemError, RegistryError
from deepseek_ray.online import cycle
from deepseek_ray.online.backlog import Backlog
from deepseek_ray.online.ledger import Ledger
from deepseek_ray.online.recorded import decide_again
from deepseek_ray.paths import RunPaths
from deepseek_ray.registry import CHAMPION, Registry, TrafficBook, Words
from deepseek_ray.serving import shadow_trial
from deepseek_ray.serving.release_desk import ReleaseDesk
from deepseek_ray.serving.service import RiskService
from deepseek_ray.serving.traffic import Limits, TrafficPolicy
from serve_apps import updater
from tests import served_run, update_run
from tests.integration.test_service import KEY
from tests.integration.test_update_cycle import check_account
from tests.served_run import DELAY_DAYS, SEQUENCE_LEN, ServedRun
from tests.update_run import make_config, serve_days

CANARY: dict[str, Any] = {"update.release": "canary"}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def release(config: Config, paths: RunPaths, registry: Registry) -> dict[str, Any]:
    return cycle.update(config, paths, registry, route=ReleaseDesk(registry, config))


def actions(registry: Registry) -> list[str]:
    return [move.action for move in TrafficBook(registry).moves()]


def crown(registry: Registry, before: str, version: str) -> str:
    after = TrafficPolicy.parse(before).ended().model_dump_json()
    words = Words("promote", "the service", "healthy", "done")
    return TrafficBook(registry).crown(before, after, version, decide_again(registry, version), words)


def test_labels_of_a_release_count_when_it_is_champion_and_wait_again_when_it_is_taken_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths, registry = update_run.make_run(tmp_path / "run")
    serve_days(paths, 0, 10)
    config, here = make_config(**CANARY), f"--run={paths.root}"
    waiting = Backlog(config, paths, registry).waiting()
    stage = release(config, paths, registry)
    assert (stage["promoted"], stage["released"], stage["refusal"]) == (False, True, "")
    assert stage["seconds_label_to_live"] is None
    assert json.loads((paths.results / "update.json").read_text())["released"]
    assert {alias: registry.version_of(alias) for alias in ("champion", "canary", "shadow")} == {
        "champion": "1", "canary": "2", "shadow": "2",
    }  # fmt: skip
    assert check_account(paths, registry) == ("1", 0)
    with pytest.raises(EnvironmentProblemError, match="a release is under way: version 2 is the shadow"):
        release(config, paths, registry)
    assert registry.versions() == ["1", "2"], "it is asked before it trains"
    assert updater.main(["--show", here]) == 0
    shown = capsys.readouterr().out
    assert "version 2 is the shadow since" in shown
    assert f"deepseek-ray traffic rollback --run {paths.root}" in shown
    assert main(["traffic", "rollback", here, "--note", "not on a Friday"]) == 0
    assert check_account(paths, registry) == ("1", 0)
    assert Backlog(config, paths, registry).waiting() == waiting
    stale = registry.standing().traffic
    assert release(config, paths, registry)["released"]
    with pytest.raises(RegistryError, match="moved by somebody else"):
        crown(registry, stale, "3")
    assert registry.version_of(CHAMPION) == "1"
    assert crown(registry, registry.standing().traffic, "3") == ""
    champion, counted = check_account(paths, registry)
    assert (champion, counted > 0, ReleaseDesk(registry, config).standing()) == ("3", True, "")
    assert actions(registry) == ["release", "rollback", "release", "promote"]
    assert [(entry.action, entry.version) for entry in registry.history()] == [("promote", "1"), ("promote", "3")]
    assert Backlog(config, paths, registry).waiting() < waiting


def test_what_the_gate_refuses_begins_no_release(tmp_path: Path) -> None:
    paths, registry = update_run.make_run(tmp_path / "run")
    serve_days(paths, 0, 10)
    config = make_config(**CANARY, **{"gate.max_label_shift": 1.0, "gate.max_forgetting": 0.0})
    stage = release(config, paths, registry)
    assert (stage["promoted"], stage["released"]) == (False, False)
    assert stage["refusal"]
    assert (actions(registry), registry.standing().traffic) == ([], "")
    assert [entry.action for entry in registry.history()] == ["promote", "refuse"]


QUICK = {
    "data": {"label_delay_days": DELAY_DAYS},
    "update": {"release": "canary", "epochs": 1, "min_labels": 20, "memory_rows": 500, "holdout_fraction": 0.3},
    "release": {"shadow_s": 0.5, "shadow_decisions": 60, "steps": [30, 100], "dwell_s": 0.5, "min_decisions": 40},
    "gate": {
        "max_average_precision_drop": 1.0, "max_cp100_drop": 1.0, "max_calibration_error": 1.0, "max_p99_ms": 1_000.0,
        "max_forgetting": 1.0, "max_label_shift": 1_000.0,
    },
}  # fmt: skip
GIVE_UP_S = 120.0
PAST_DAYS = 6


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ServedRun:
    """A champion with features from the store, and rows to replay; what comes after them is for the test to send."""
    monkeypatch.setattr(shadow_trial.ShadowTrial.__init__, "__defaults__", (0.2,))
    end = str((datetime.now(UTC) - timedelta(days=PAST_DAYS + 1)).date())
    monkeypatch.setattr(served_run, "LINEAGE", replace(served_run.LINEAGE, train_end=end))
    run = served_run.make_run(tmp_path / "run", customers=80, days=20, future_days=PAST_DAYS)
    made = compute(run.history, load().vector("default"), label_delay_days=DELAY_DAYS, sequence_len=SEQUENCE_LEN)
    label = run.history["is_fraud"].fill_null(0).to_numpy()
    card = run.history["card_id"].to_numpy()
    rows = RiskDataset.build(made.values, made.sequence, label, made.order_us, card, feature_names=made.names)
    rows.save(run.paths.datasets / "train.safetensors")
    rows.select(rows.order_us > np.quantile(rows.order_us, 0.5)).save(run.paths.datasets / "holdout.safetensors")
    return run


def make_service(run: ServedRun) -> RiskService:
    store = FeatureClient(run.paths)
    settings = ServingConfig(poll_registry_s=0.1, compact_every_s=0, drift_every_s=0)
    service = RiskService(run.paths, run.registry, store, store.declaration(), settings, KEY)
    service.start()
    return service


class Client:
    """Sends events, and labels where it is told to; no answer may be anything but 200.

    Attributes:
        versions: answers by the version that gave them.
    """

    def __init__(self, service: RiskService) -> None:
        self.service = service
        self.versions: Counter[str] = Counter()

    async def send(self, path: str, bodies: list[dict[str, Any]]) -> list[dict[str, Any]]:
        transport = httpx.ASGITransport(app=self.service.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test", headers={"X-API-Key": KEY}) as client:
            answers = [await client.post(path, json=body) for body in bodies]
        assert {answer.status_code for answer in answers} <= {200}, answers[-1].text
        return [answer.json() for answer in answers]

    def score(self, bodies: list[dict[str, Any]]) -> list[dict[str, Any]]:
        answers = asyncio.run(self.send("/v1/risk/score", bodies))
        self.versions.update(answer["model_version"] for answer in answers)
        return answers

    def label(self, ids: list[str], frauds: list[bool]) -> None:
        at = datetime.now(UTC).isoformat()
        bodies = [
            {"prediction_id": one, "is_fraud": bad, "observed_at": at} for one, bad in zip(ids, frauds, strict=True)
        ]
        asyncio.run(self.send("/v1/risk/feedback", bodies))

    @contextmanager
    def flowing(self) -> Iterator[None]:
        """Live events of many cards while the block runs; an answer that is not 200 fails the test."""
        done, errors = threading.Event(), []

        def flow() -> None:
            number = time.time_ns()
            try:
                while not done.is_set():
                    self.score([live(number + n) for n in range(20)])
                    number += 20
            except BaseException as error:  # told to the test's own thread
                errors.append(error)

        thread = threading.Thread(target=flow)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
        assert errors == []


def live(number: int) -> dict[str, Any]:
    fixed = {"event_time": datetime.now(UTC).isoformat(), "terminal_id": "m1"}
    return {
        "transaction_id": f"x{number}",
        "card_id": f"k{number % 997}",
        "amount_cents": 100 + number % 9_000,
        **fixed,
    }


def send_past(run: ServedRun, client: Client) -> None:
    """The days before, with a label for each decision: what is expensive is fraud."""
    sent = ["transaction_id", "event_time", "card_id", "terminal_id", "amount_cents"]
    rows = run.future.sort("event_time").select(sent).to_dicts()
    answers = client.score([row | {"event_time": row["event_time"].isoformat()} for row in rows])
    dear = float(pl.Series([row["amount_cents"] for row in rows]).quantile(0.8) or 0.0)
    client.label([one["prediction_id"] for one in answers], [row["amount_cents"] > dear for row in rows])


def limit(registry: Registry, **limits: float) -> None:
    """What ``traffic set --limit`` writes."""
    policy = TrafficPolicy(limits=Limits.model_validate(limits))
    TrafficBook(registry).move("", policy.model_dump_json(), action="set", who="test", why="", summary="limits")


def wait_for(what: Callable[[], bool], registry: Registry) -> None:
    give_up = time.monotonic() + GIVE_UP_S
    while not what():
        assert time.monotonic() < give_up, [(move.action, move.summary) for move in TrafficBook(registry).moves()]
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_an_update_becomes_champion_by_way_of_shadow_and_canary_while_traffic_flows(served: ServedRun) -> None:
    config, registry, paths = build_config(QUICK), served.registry, served.paths
    limit(registry, max_psi=1_000.0, max_latency_ms=10_000.0)  # trained on what is dear, it must score otherwise
    first = make_service(served)
    client = Client(first)
    send_past(served, client)
    with client.flowing():
        assert release(config, paths, registry)["released"]
        assert ReleaseDesk(registry, config).blocked().startswith("a release is under way: version 2")
        wait_for(lambda: "advance" in actions(registry), registry)
        wait_for(lambda: client.versions["2"] > 0, registry)
    first.close()  # the service goes in the middle, and the next one goes on
    assert registry.version_of(CHAMPION) == "1"
    second = make_service(served)
    client.service = second
    with client.flowing():
        wait_for(lambda: registry.version_of(CHAMPION) == "2", registry)
        wait_for(lambda: second.predictor.live.version == "2" and not second.predictor.plan.arms, registry)
    before = client.versions["2"]
    client.score([live(time.time_ns() + n) for n in range(20)])
    assert client.versions["2"] == before + 20
    second.close()
    assert actions(registry) == ["set", "release", "advance", "advance", "promote"]
    assert [move.who for move in TrafficBook(registry).moves()][2:] == ["the service"] * 3
    assert Ledger(paths.updates).descent("2").steps == ("2",)
    assert ReleaseDesk(registry, config).blocked() == ""


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_canary_that_scores_otherwise_is_taken_back_and_its_labels_wait_again(served: ServedRun) -> None:
    at_once = {"release.shadow_s": 0.0, "release.min_decisions": 10_000}  # there is time to compare scores
    config, registry, paths = build_config(QUICK, overrides=at_once), served.registry, served.paths
    limit(registry, max_psi=0.05, min_scores=200, max_latency_ms=10_000.0)
    service = make_service(served)
    client = Client(service)
    send_past(served, client)
    client.score([live(time.time_ns())])  # labels ripen with the newest event: none does between the two counts
    waiting = Backlog(config, paths, registry).waiting()
    assert waiting > 0
    with client.flowing():
        assert release(config, paths, registry)["released"]
        wait_for(lambda: "rollback" in actions(registry), registry)
        wait_for(lambda: not service.predictor.plan.arms, registry)
    service.close()
    assert (actions(registry), registry.version_of(CHAMPION)) == (["set", "release", "rollback"], "1")
    move = TrafficBook(registry).moves()[-1]
    assert "scores moved: PSI" in move.why
    assert move.summary == "canary (version 2) 30 % -> 0 %"
    assert Backlog(config, paths, registry).waiting() == waiting
    assert ReleaseDesk(registry, config).blocked() == ""
    assert [entry.action for entry in registry.history()] == ["promote"]
